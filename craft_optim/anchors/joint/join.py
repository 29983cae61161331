"""Two batches as one: the rows of the task batch, then those of the anchors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..structure import Inputs, flatten

__all__ = ["JoinError", "Joined", "join"]

_MASK = "attention_mask"


class JoinError(ValueError):
    """The two batches cannot be one."""


class Joined(NamedTuple):
    """Two batches as one.

    Attributes:
        inputs: As the first batch is put together; its rows come first.
        size: Number of rows.
        cut: Number of rows of the first batch.
        lengths: Of both batches before one was padded; None where neither was.
    """

    inputs: Any
    size: int
    cut: int
    lengths: tuple[int, int] | None

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The first and the second batch's part of an output, without padding; None if it has no rows."""
        if not x.ndim or len(x) % self.size:
            return None
        cut = len(x) // self.size * self.cut
        parts: tuple[Tensor, ...] = torch.split(x, [cut, len(x) - cut])
        if self.lengths is not None and x.ndim > 2 and x.shape[1] == max(self.lengths):
            parts = tuple(part[:, :length] for part, length in zip(parts, self.lengths, strict=True))
        return parts[0], parts[1]


def join(task: Any, anchors: Inputs, fill: Mapping[str, float]) -> Joined:
    """Rows of the task batch, then those of the anchors.

    Where lengths differ, the shorter batch is padded at the end, if both have an `attention_mask` to say so.

    Args:
        task: A tensor, a tuple or a mapping of tensors; what else a mapping holds is kept.
        anchors: A batch of the same kind, on the same device.
        fill: Names of inputs that the anchors have not, or not for this purpose, and what their rows hold instead.

    Raises:
        JoinError: Inputs differ in name, dtype or shape.
        TypeError, ValueError: The task batch is none, see `structure.flatten`.
    """
    (structure, ours, cut), (_, theirs, count) = flatten(task), flatten(anchors)
    theirs = {name: x for name, x in theirs.items() if name not in fill}
    filled = [name for name in fill if name in ours]
    if set(theirs) | set(filled) != set(ours):
        raise JoinError(
            f"The task batch has the inputs {sorted(ours)}, the anchors have {sorted(theirs)}. Leave out what the "
            f"model does not read, build the anchors with what it does, or say in `fill` what the anchors' rows of "
            f"{sorted(set(ours) - set(theirs) - set(filled))} hold."
        )
    lengths = None
    if _MASK in theirs and ours[_MASK].ndim == theirs[_MASK].ndim == 2:
        found = ours[_MASK].shape[1], theirs[_MASK].shape[1]
        lengths = found if found[0] != found[1] else None
    both: dict[str, Tensor] = {}
    for name, x in ours.items():
        rest = fill[name] if name in filled else 0
        if lengths is not None and not x.is_floating_point() and x.ndim > 1 and x.shape[1] == lengths[0]:
            x = _lengthened(x, max(lengths), rest)
        y = x.new_full((count, *x.shape[1:]), rest) if name in filled else theirs[name]
        if lengths is not None and not y.is_floating_point() and y.ndim > 1 and y.shape[1] == lengths[1]:
            y = _lengthened(y, max(lengths), 0)
        if (x.dtype, x.shape[1:], x.device) != (y.dtype, y.shape[1:], y.device):
            raise JoinError(
                f"{name!r} is {x.dtype} {tuple(x.shape)} on {x.device} in the task batch and {y.dtype} "
                f"{tuple(y.shape)} on {y.device} in the anchors: only the first dimension may differ, or with an "
                f"{_MASK!r} in both also the length. Prepare both alike."
            )
        both[name] = torch.cat([x, y])
    inputs = {**task, **both} if structure.kind == "mapping" else structure.rebuild(both)
    return Joined(inputs, cut + count, cut, lengths)


def _lengthened(x: Tensor, length: int, value: float) -> Tensor:
    return torch.cat([x, x.new_full((len(x), length - x.shape[1], *x.shape[2:]), value)], dim=1)
