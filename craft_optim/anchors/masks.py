"""Masks: positions of the logits that count, and the logits there."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .names import base_model
from .passes import is_encoder_decoder
from .structure import Inputs

__all__ = ["IGNORED", "Mask", "places_of", "rows", "select", "valid_positions", "within"]

Mask = str | Callable[[Any], Tensor]

IGNORED = -100  # Hugging Face's labels of positions that do not count


def valid_positions(model: nn.Module, inputs: Inputs, mask: Mask | None) -> Tensor | None:
    """The positions that a mask selects: bool on the CPU; None where there is none.

    Default: `attention_mask`; for an encoder-decoder model `decoder_attention_mask`, else its labels that are not -100.

    Args:
        model: Any model, of transformers or not.
        inputs: A batch.
        mask: Function `mask(batch) -> bool`, or the name of an input: true where a position counts. "labels" are -100
            where a token does not count, as everywhere in transformers. Logits predict the label at their own position,
            or in a language model without an encoder the label at the next one.

    Raises:
        ValueError: The input is missing, or the label that a position predicts is unknown.
    """
    if callable(mask):
        return mask(inputs).bool().cpu()
    if mask is None:
        return _default(model, inputs)
    if not isinstance(inputs, dict) or mask not in inputs:
        raise ValueError(f"`mask` must be a function, or the name of an input of a mapping. Found {mask!r}.")
    if mask == "labels":
        counts = (inputs[mask] != IGNORED).cpu()
        return counts if counts.ndim < 2 or not _predict_the_next(model) else _the_one_before(counts)
    return inputs[mask].bool().cpu()


def _default(model: nn.Module, inputs: Inputs) -> Tensor | None:
    if not isinstance(inputs, dict):
        return None
    if not is_encoder_decoder(model):
        found = inputs.get("attention_mask")
        return None if found is None else found.bool().cpu()
    # `attention_mask` is the encoder's there
    found, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if found is not None:
        return found.bool().cpu()
    return None if labels is None else (labels != IGNORED).cpu()


def _predict_the_next(model: nn.Module) -> bool:
    kind = type(base_model(model)).__name__
    if is_encoder_decoder(model) or any(kind.endswith(end) for end in ("ForMaskedLM", "ForCTC", "Classification")):
        return False
    if any(kind.endswith(end) for end in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return True
    raise ValueError(
        f'mask="labels" needs a model that says whether its logits at a position predict the label there or the next '
        f"one. Found {kind}: pass a function, mask=lambda batch: ..., that is true where the logits count."
    )


def _the_one_before(counts: Tensor) -> Tensor:
    """True at the position before each that counts."""
    valid = counts.roll(-1, 1)
    valid[:, -1] = False
    return valid


def rows(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Rows `[positions, V]` of `[..., V]` that `valid` `[...]`, on the CPU, selects; None selects all.

    Positions are selected on the host: the host does not wait for an accelerator, and only counted positions are
    computed.
    """
    flat, places = logits.flatten(0, -2), places_of(valid, tuple(logits.shape[:-1]))
    return flat if places is None else select(flat, places)


def places_of(valid: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Indices of the positions that `valid` selects, in row-major order; None for all.

    Raises:
        ValueError: The mask has another shape than the positions.
    """
    if valid is None:
        return None
    if tuple(valid.shape) != shape:
        raise ValueError(f"The logits' mask must have shape {shape}. Found {tuple(valid.shape)}.")
    return valid.flatten().nonzero().flatten()


def select(x: Tensor, places: Tensor) -> Tensor:
    """Rows of `x` by indices on the CPU."""
    return x.index_select(0, places.to(x.device, non_blocking=True))


def within(wanted: Tensor, valid: Tensor) -> Tensor:
    """Indices of the wanted positions among those of `valid`.

    Raises:
        ValueError: The shapes differ, or a wanted position is not valid.
    """
    if wanted.shape != valid.shape:
        raise ValueError(f"The mask must have shape {tuple(valid.shape)}. Found {tuple(wanted.shape)}.")
    if bool((wanted & ~valid).any()):
        raise ValueError(
            f"The mask selects {int((wanted & ~valid).sum())} positions of which the cache holds nothing: its own mask "
            "leaves them out. Build the cache with this mask."
        )
    return wanted[valid].nonzero().flatten()
