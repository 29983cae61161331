"""Positions of the logits that count, and the logits there."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .structure import Inputs

__all__ = ["IGNORED", "Mask", "rows", "select", "valid_positions", "within"]

Mask = str | Callable[[Any], Tensor]

IGNORED = -100  # Hugging Face's labels of positions that do not count


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
        counts = (inputs[mask] != IGNORED).cpu()
        valid = counts.roll(-1, 1)
        valid[:, -1] = False
        return valid
    return inputs[mask].bool().cpu()


def rows(logits: Tensor, valid: Tensor | None) -> Tensor:
    """`[..., V]` as `[positions, V]`: those that `valid` `[...]`, on the CPU, selects; None selects all.

    Positions are selected on the host: an accelerator need not be waited for, and only what counts is computed with.
    """
    if valid is not None and valid.shape != logits.shape[:-1]:
        raise ValueError(f"The logits' mask must have shape {tuple(logits.shape[:-1])}. Found {tuple(valid.shape)}.")
    flat = logits.flatten(0, -2)
    return flat if valid is None else select(flat, valid.flatten().nonzero().flatten())


def select(x: Tensor, places: Tensor) -> Tensor:
    """Rows of `x` by number; the numbers are on the CPU."""
    return x.index_select(0, places.to(x.device, non_blocking=True))


def within(wanted: Tensor, valid: Tensor) -> Tensor:
    """The wanted positions as numbers among those of `valid`, counted one after another.

    Raises:
        ValueError: The shapes differ, or a wanted position is not among them.
    """
    if wanted.shape != valid.shape:
        raise ValueError(f"The mask must have shape {tuple(valid.shape)}. Found {tuple(wanted.shape)}.")
    if bool((wanted & ~valid).any()):
        raise ValueError(
            f"The mask selects {int((wanted & ~valid).sum())} positions of which the cache holds nothing: its own mask "
            "leaves them out. Build the cache with this mask."
        )
    return wanted[valid].nonzero().flatten()
