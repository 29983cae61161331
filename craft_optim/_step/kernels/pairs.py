"""The gradients of one parameter, and how their memory is cut into pieces."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Pair", "cut"]


class Pair(NamedTuple):
    """Gradients of one parameter, not both None, on one device.

    Attributes:
        number: Its place in the lists.
        segment: Number of the sums it counts towards.
        task: Task gradient; None for zero.
        retention: Retention gradient; None for zero.
    """

    number: int
    segment: int
    task: Tensor | None
    retention: Tensor | None

    @property
    def given(self) -> list[Tensor]:
        """The gradients of both that are not None."""
        return [g for g in (self.task, self.retention) if g is not None]

    @property
    def device(self) -> torch.device:
        return self.given[0].device

    def in_same_order(self) -> bool:
        """True if the memory of both holds the same elements in the same order, without gaps.

        Gradients have their parameter's strides: those of a transposed or channels-last one may be dense, too.
        """
        given = self.given
        if any(g.layout != torch.strided or g.is_complex() or g.is_neg() for g in given):
            return False
        if all(g.is_contiguous() for g in given):
            return True
        same = given[0].stride() == given[-1].stride()
        return same and bool(torch.ops.aten.is_non_overlapping_and_dense(given[0]))


def cut(length: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces of at most `size` elements, one vector's after another's.

    Args:
        length: Number of elements of each vector.
        size: Number of elements of a piece.

    Returns:
        The number of each piece's vector, and the first of its elements.
    """
    pieces = -(-length // size)
    owner = np.repeat(np.arange(len(length)), pieces)
    return owner, (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * size
