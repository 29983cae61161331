"""Packing of a shard's tensors, see `shards`: anchors of different lengths one after another, without padding."""

import torch
from torch import Tensor

__all__ = ["MAX_LEFT_OUT", "packed"]

# Most positions left out at an anchor's end: a small file with an error must not make a large tensor.
MAX_LEFT_OUT = 1 << 20


def packed(key: str, parts: list[Tensor]) -> dict[str, Tensor]:
    """Batches `[b, T, ...]` of one tensor as a shard stores them: under `key` and, if they are packed, its index.

    They are packed if they differ in T, or if integers or booleans `[b, T]` shrink by a tenth without the repeated
    values at their ends.
    """
    first = parts[0]
    if first.ndim < 2:
        return {key: torch.cat(parts)}
    ragged = len({part.shape[1] for part in parts}) > 1
    widths = torch.cat([torch.full((len(part),), part.shape[1], dtype=torch.int32) for part in parts])
    if first.ndim == 2 and not first.is_floating_point() and not first.is_complex() and int(widths.min()) > 0:
        lengths = torch.cat([_without_repetition(part) for part in parts])
        fits = int((widths - lengths).max()) <= MAX_LEFT_OUT
        if fits and int(lengths.sum()) <= 0.9 * int(widths.sum()):
            cut = [x[:length] for part, of in _split(parts, lengths) for x, length in zip(part, of, strict=True)]
            return {
                key: torch.cat(cut),
                f"lengths.{key}": lengths,
                f"widths.{key}": widths,
                f"fills.{key}": torch.cat([part[:, -1] for part in parts]),
            }
    if not ragged:
        return {key: torch.cat(parts)}
    return {key: torch.cat([part.flatten(0, 1) for part in parts]), f"lengths.{key}": widths}


def _split(parts: list[Tensor], lengths: Tensor) -> list[tuple[Tensor, list[int]]]:
    pieces = torch.split_with_sizes(lengths, [len(part) for part in parts])
    return [(part, piece.tolist()) for part, piece in zip(parts, pieces, strict=True)]


def _without_repetition(part: Tensor) -> Tensor:
    """Position in each anchor `[T]` where the run of its last value begins; int32 `[b]`."""
    same = (part == part[:, -1:]).flip(1).int().cumprod(1).sum(1)
    return (part.shape[1] - same).int()
