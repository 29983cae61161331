"""Which positions of the logits count."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .structure import Inputs

__all__ = ["Mask", "valid_positions"]

Mask = str | Callable[[Any], Tensor]

_IGNORED = -100  # Hugging Face's labels of positions that do not count


def valid_positions(inputs: Inputs, mask: Mask | None) -> Tensor | None:
    """The positions that a mask selects, or by default `attention_mask`: bool on the CPU; None where there is neither.

    Args:
        inputs: A batch.
        mask: `mask(batch) -> bool`, or the name of an input: true where a position counts. "labels" are, as everywhere
            in transformers, -100 where a token does not count, and each position of the logits predicts the next token.

    Raises:
        ValueError: There is no such input.
    """
    if callable(mask):
        return mask(inputs).bool().cpu()
    if mask is None:
        found = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        return None if found is None else found.bool().cpu()
    if not isinstance(inputs, dict) or mask not in inputs:
        raise ValueError(f"`mask` must be a function, or the name of an input of a mapping. Found {mask!r}.")
    if mask == "labels":
        counts = (inputs[mask] != _IGNORED).cpu()
        valid = counts.roll(-1, 1)
        valid[:, -1] = False
        return valid
    return inputs[mask].bool().cpu()
