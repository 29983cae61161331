"""Pairs: gradients of one parameter, addresses of many, and pieces of their memory."""

from collections.abc import Collection, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["KINDS", "PLAIN", "UNDERFLOW", "Pair", "Vectors", "common_length", "cut", "share_memory", "to_device"]

# Codes of the kinds of elements in tables; compiled.cpp knows the first three.
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Other tensors have their elements elsewhere than at `data_ptr`. These may have another sign, too, as the imaginary
# part of a conjugate does: `is_neg`.
PLAIN = {Tensor, torch.nn.Parameter}

UNDERFLOW = 2.0**-200
"""Stands for a float32 sum of squares that underflowed to zero: no real sum is as small"""

_DTYPE, _DEVICE, _IS_CPU = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")


class Pair(NamedTuple):
    """Gradients of one parameter, not both None, on one device.

    Attributes:
        number: Place in the lists.
        segment: Number of the segment that it counts towards.
        task: Task gradient; None for zero.
        retention: Retention gradient; None for zero.
    """

    number: int
    segment: int
    task: Tensor | None
    retention: Tensor | None

    @property
    def given(self) -> list[Tensor]:
        """The gradients of the pair that are not None."""
        return [g for g in (self.task, self.retention) if g is not None]

    @property
    def device(self) -> torch.device:
        return self.given[0].device

    def in_same_order(self) -> bool:
        """True if the memory of both holds the same elements in the same order, without gaps.

        Gradients have their parameter's strides: transposed or channels-last ones may be dense, too.
        """
        given = self.given
        if any(g.layout != torch.strided or g.is_complex() or g.is_neg() for g in given):
            return False
        if all(g.is_contiguous() for g in given):
            return True
        same = given[0].stride() == given[-1].stride()
        return same and bool(torch.ops.aten.is_non_overlapping_and_dense(given[0]))

    def shares_memory(self) -> bool:
        """True if both gradients lie in the same place."""
        t, r = self.task, self.retention
        if t is None or r is None or t.is_sparse or r.is_sparse or t.numel() == 0:
            return False
        return t.data_ptr() == r.data_ptr()


class Vectors:
    """Addresses (0 for None), lengths and kinds of tensors.

    Found without Python code per tensor: there may be thousands of small ones.

    Args:
        tensors: Tensors of the dtypes in `KINDS`, without gaps; entries may be None.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        given = [x for x in tensors if x is not None]
        self.address, self.length, self.kind = _columns(tensors, given, set(map(_DTYPE, given)))

    @classmethod
    def of_plain(
        cls, lists: Sequence[Sequence[Tensor | None]], device: torch.device, dtypes: Collection[torch.dtype]
    ) -> "list[Vectors]":
        """Addresses for lists of equal length, if these hold only contiguous tensors on a device, of these dtypes.

        Empty otherwise. Checking all lists together needs fewer calls.
        """
        tensors = [*chain.from_iterable(lists)]
        given = [x for x in tensors if x is not None]
        found = set(map(_DTYPE, given))
        try:
            if not (
                set(map(type, given)) <= PLAIN
                and (all(map(_IS_CPU, given)) if device.type == "cpu" else set(map(_DEVICE, given)) <= {device})
                and found <= set(dtypes)
                and all(map(Tensor.is_contiguous, given))  # sparse ones raise
                and not any(map(Tensor.is_neg, given))
            ):
                return []
        except RuntimeError:  # of another layout
            return []
        rows = [column.reshape(len(lists), -1) for column in _columns(tensors, given, found)]
        made = [cls.__new__(cls) for _ in lists]
        for vectors, address, length, kind in zip(made, *rows, strict=True):
            vectors.address, vectors.length, vectors.kind = address, length, kind
        return made

    def at(self, owner: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
        """Addresses of the elements `start` of the tensors `owner`."""
        size = np.array([dtype.itemsize for dtype in KINDS], np.int64)[self.kind]
        address = self.address[owner]
        return np.where(address == 0, 0, address + start * size[owner])


def _columns(
    tensors: Sequence[Tensor | None], given: Sequence[Tensor], dtypes: Collection[torch.dtype]
) -> list[NDArray[Any]]:
    """Addresses, lengths and kinds of tensors, zeros for None, from the given ones and their dtypes."""
    n = len(given)
    columns: list[NDArray[Any]] = [
        np.fromiter(map(Tensor.data_ptr, given), np.int64, n),
        np.fromiter(map(Tensor.numel, given), np.int64, n),
        np.full(n, KINDS[next(iter(dtypes))], np.int32)
        if len(dtypes) == 1
        else np.fromiter(map(KINDS.__getitem__, map(_DTYPE, given)), np.int32, n),
    ]
    if n < len(tensors):
        here = np.array([x is not None for x in tensors])
        for i, column in enumerate(columns):
            columns[i] = np.zeros(len(tensors), column.dtype)
            columns[i][here] = column
    return columns


def common_length(of_t: Vectors, of_r: Vectors) -> NDArray[np.int64]:
    """Number of elements of each pair.

    Raises:
        ValueError: If partners differ in their number of elements.
    """
    length: NDArray[np.int64] = of_t.length
    if not np.count_nonzero(length != of_r.length):
        return length
    length = np.maximum(length, of_r.length)
    if ((of_t.length != length) & (of_t.address != 0) | (of_r.length != length) & (of_r.address != 0)).any():
        raise ValueError("`task` and `retention` must have the same shapes.")
    return length


def share_memory(of_t: Vectors, of_r: Vectors) -> bool:
    """True if the gradients of any pair lie in the same place."""
    same = of_t.address == of_r.address
    return np.count_nonzero(same) > 0 and np.count_nonzero(same & (of_t.length > 0)) > 0


def cut(length: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts vectors, one after another, into pieces of at most `size` elements.

    Args:
        length: Number of elements of each vector.
        size: Number of elements of a piece.

    Returns:
        For each piece, the number of its vector and its first element.
    """
    pieces = -(-length // size)
    owner = np.repeat(np.arange(len(length)), pieces)
    return owner, (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * size


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from host memory to the device; the host does not wait, as it would for pageable memory."""
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
