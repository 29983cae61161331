"""Fused: Triton kernels over all gradients of one CUDA device at once.

Every program works on a chunk of one pair of gradients; tables of addresses select it. So the number of launches
depends only on the number of pairs of dtypes: one each for the products, one to sum them, one each for the merge.
Products are summed in a fixed order: equal gradients give equal bits.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..decision import Weights
from .pairs import KINDS, UNDERFLOW, Vectors, common_length, cut, share_memory, to_device

__all__ = ["DTYPES", "FusedPairs"]

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Elements per program, and per round of its loop. A chunk is small enough to keep the last wave of programs short, and
# large enough to keep tables and partial sums negligible.
_CHUNK = 1 << 16
_BLOCK = 1 << 12
_WARPS = 8
# Bytes that a thread reads at once where the addresses allow it.
_VECTOR = 16

_HAS_TASK, _HAS_RETENTION = 1, 2
_UNDERFLOW = tl.constexpr(UNDERFLOW)


@triton.jit  # type: ignore[untyped-decorator]
def _chunk(  # type: ignore[no-untyped-def]
    tensors,  # int64 [5, tensors_stride]: addresses of both gradients, length, segment, flags of those given
    programs,  # int64 [3, programs_stride]: tensor, first element, place of the result
    tensors_stride,
    programs_stride,
    T: tl.constexpr,
    R: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """This program's tensor, the chunk's start in both gradients, and its length."""
    program = tl.program_id(0)
    tensor = tl.load(programs + program)
    start = tl.load(programs + programs_stride + program)
    t = tl.load(tensors + tensor).to(tl.pointer_type(T)) + start
    r = tl.load(tensors + tensors_stride + tensor).to(tl.pointer_type(R)) + start
    if ALIGNED:
        t = tl.multiple_of(t, 16)
        r = tl.multiple_of(r, 16)
    n = tl.minimum(tl.load(tensors + 2 * tensors_stride + tensor) - start, CHUNK).to(tl.int32)
    return tensor, t, r, n


@triton.jit  # type: ignore[untyped-decorator]
def _added(squares, of, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of squares. A sum of zero has the elements read again, in case it underflowed."""
    total = tl.sum(squares).to(tl.float64)
    if WIDE != tl.float64:  # noqa: SIM102, SIM300 - known when it is compiled, unlike what follows
        if total == 0.0:
            offsets = tl.arange(0, BLOCK)
            some = tl.zeros([BLOCK], tl.int32)
            for at in range(0, n, BLOCK):
                x = tl.load(of + (at + offsets), mask=at + offsets < n, other=0.0).to(WIDE)
                some = some | (x != 0.0).to(tl.int32)
            total = tl.where(tl.max(some) != 0, _UNDERFLOW, total)
    return total


@triton.jit(do_not_specialize=["tensors_stride", "programs_stride", "partial_stride"])  # type: ignore[untyped-decorator]
def _dots(  # type: ignore[no-untyped-def]
    tensors,
    programs,
    partial,  # float64 [3, partial_stride]
    tensors_stride,
    programs_stride,
    partial_stride,
    T: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, t, r, n = _chunk(tensors, programs, tensors_stride, programs_stride, T, R, ALIGNED, CHUNK)
    whole = n // BLOCK * BLOCK  # a mask would prevent vector loads here
    offsets = tl.arange(0, BLOCK)
    tt = tl.zeros([BLOCK], WIDE)
    rr = tl.zeros([BLOCK], WIDE)
    tr = tl.zeros([BLOCK], WIDE)
    for at in range(0, whole, BLOCK):
        x = tl.load(t + (at + offsets)).to(WIDE)
        y = tl.load(r + (at + offsets)).to(WIDE)
        tt += x * x
        rr += y * y
        tr += x * y
    if whole < n:
        inside = offsets < n - whole
        x = tl.load(t + (whole + offsets), mask=inside, other=0.0).to(WIDE)
        y = tl.load(r + (whole + offsets), mask=inside, other=0.0).to(WIDE)
        tt += x * x
        rr += y * y
        tr += x * y
    given = tl.load(tensors + 4 * tensors_stride + tensor)
    result = partial + tl.load(programs + 2 * programs_stride + tl.program_id(0))
    zero = tl.zeros([], tl.float64)
    tl.store(result, tl.where(given & 1 != 0, _added(tt, t, n, WIDE, BLOCK), zero))
    tl.store(result + partial_stride, tl.where(given & 2 != 0, _added(rr, r, n, WIDE, BLOCK), zero))
    tl.store(result + 2 * partial_stride, tl.where(given == 3, tl.sum(tr).to(tl.float64), zero))


@triton.jit(do_not_specialize=["partial_stride", "n_segments"])  # type: ignore[untyped-decorator]
def _add_up(partial, first, sums, partial_stride, n_segments, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    segment = tl.program_id(0)
    row = tl.program_id(1)
    end = tl.load(first + segment + 1)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(tl.load(first + segment), end, BLOCK):
        total += tl.load(partial + row * partial_stride + at + offsets, mask=at + offsets < end, other=0.0)
    tl.store(sums + row * n_segments + segment, tl.sum(total))


@triton.jit(do_not_specialize=["tensors_stride", "programs_stride", "n_segments"])  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    tensors,
    programs,
    coefficients,  # float64 [2, n_segments]: of the task, of retention
    tensors_stride,
    programs_stride,
    n_segments,
    T: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, t, r, n = _chunk(tensors, programs, tensors_stride, programs_stride, T, R, ALIGNED, CHUNK)
    given = tl.load(tensors + 4 * tensors_stride + tensor)
    segment = tl.load(tensors + 3 * tensors_stride + tensor)
    task = tl.load(coefficients + segment)
    retention = tl.load(coefficients + n_segments + segment)
    if (given & 2 != 0) & (retention != 0.0):
        a = tl.where(given & 1 != 0, task, 0.0).to(WIDE)  # without a task gradient, `t` is `r`
        w = retention.to(WIDE)
        whole = n // BLOCK * BLOCK
        offsets = tl.arange(0, BLOCK)
        for at in range(0, whole, BLOCK):
            x = tl.load(t + (at + offsets)).to(WIDE)
            y = tl.load(r + (at + offsets)).to(WIDE)
            tl.store(r + (at + offsets), (a * x + w * y).to(R))
        if whole < n:
            inside = offsets < n - whole
            x = tl.load(t + (whole + offsets), mask=inside).to(WIDE)
            y = tl.load(r + (whole + offsets), mask=inside).to(WIDE)
            tl.store(r + (whole + offsets), (a * x + w * y).to(R), mask=inside)


class _Group(NamedTuple):
    """Pairs of one launch."""

    t: torch.dtype
    r: torch.dtype
    aligned: bool

    def constants(self, wide: torch.dtype) -> dict[str, Any]:
        for dtype in (self.t, self.r):
            wide = torch.promote_types(wide, dtype)
        return {
            "T": DTYPES[self.t],
            "R": DTYPES[self.r],
            "WIDE": DTYPES[wide],
            "ALIGNED": self.aligned,
            "CHUNK": _CHUNK,
            "BLOCK": _BLOCK,
            "num_warps": _WARPS,
        }


class _Launch(NamedTuple):
    group: _Group
    tensors: Tensor
    programs: Tensor
    n_programs: int


class FusedPairs:
    """Pairs of gradients on one CUDA device.

    Args:
        device: Device of the gradients.
        of_t: Task gradients, of the dtypes in `DTYPES`. The caller keeps the tensors alive.
        of_r: Retention gradients, in the same order in memory.
        segments: Number of each pair's sums; None if there is one.
        n_segments: Number of segments.

    Attributes:
        device: Device of the gradients, as given.
        share_memory: True if the gradients of any pair lie in the same place.

    Raises:
        ValueError: If partners differ in their number of elements.
    """

    def __init__(
        self, device: torch.device, of_t: Vectors, of_r: Vectors, segments: Sequence[int] | None, n_segments: int
    ) -> None:
        self.device, self.share_memory = device, share_memory(of_t, of_r)
        self._n_segments = n_segments
        length = common_length(of_t, of_r)
        of_pair = np.zeros(len(length), np.int64) if segments is None else np.asarray(segments, np.int64)
        has_t, has_r = of_t.address != 0, of_r.address != 0
        at_t, kind_t = np.where(has_t, of_t.address, of_r.address), np.where(has_t, of_t.kind, of_r.kind)
        at_r, kind_r = np.where(has_r, of_r.address, of_t.address), np.where(has_r, of_r.kind, of_t.kind)
        aligned = (at_t | at_r) % _VECTOR == 0
        table = np.stack([at_t, at_r, length, of_pair, has_t * _HAS_TASK | has_r * _HAS_RETENTION])
        of_group = (kind_t * len(KINDS) + kind_r) * 2 + aligned
        dtypes = list(KINDS)

        groups, tables, segments_of = [], [], []
        for number in dict.fromkeys(of_group.tolist()):
            tensors = table[:, of_group == number]
            owner, start = cut(tensors[2], _CHUNK)
            kinds, on_bounds = divmod(number, 2)
            groups.append(_Group(dtypes[kinds // len(KINDS)], dtypes[kinds % len(KINDS)], bool(on_bounds)))
            tables += [tensors, np.stack([owner, start, start])]
            segments_of.append(tensors[3][owner])
        # Results are ordered by segment: each segment's sum runs from one slot to another.
        of_program = np.concatenate(segments_of)
        order = np.argsort(of_program, kind="stable")
        slots = np.empty(len(order), np.int64)
        slots[order] = np.arange(len(order))
        of_groups = np.split(slots, np.cumsum([programs.shape[1] for programs in tables[1::2]])[:-1])
        for programs, group_slots in zip(tables[1::2], of_groups, strict=True):
            programs[2] = group_slots
        first = np.searchsorted(of_program[order], np.arange(n_segments + 1))
        self._n_slots = len(order)

        *there, self._first = self._moved([*tables, first[None]])
        self._launches = [
            _Launch(group, tensors, programs, table.shape[1])
            for group, tensors, programs, table in zip(groups, there[::2], there[1::2], tables[1::2], strict=True)
        ]

    def sums(self, dtype: torch.dtype) -> Tensor:
        """<g_t, g_t>, <g_r, g_r> and <g_t, g_r> per segment, float64 `[3, n_segments]`, on the device.

        Args:
            dtype: Dtype in which chunks are summed, unless the gradients' is wider.
        """
        partial = torch.empty(3, self._n_slots, dtype=torch.float64, device=self.device)
        sums = torch.empty(3, self._n_segments, dtype=torch.float64, device=self.device)
        with self._on_device():
            for group, tensors, programs, n in self._launches:
                if n:
                    _dots[(n,)](
                        tensors, programs, partial, tensors.stride(0), programs.stride(0), self._n_slots,
                        **group.constants(dtype),
                    )  # fmt: skip
            _add_up[(self._n_segments, 3)](partial, self._first, sums, self._n_slots, self._n_segments, BLOCK=1024)
        return sums

    def merge_(self, coefficients: Sequence[Weights]) -> None:
        """Writes a g_t + w g_r into every retention gradient with w != 0, with the coefficients of its segment."""
        there = to_device(torch.from_numpy(np.ascontiguousarray(np.array(coefficients).T)), self.device)
        with self._on_device():
            for group, tensors, programs, n in self._launches:
                if n:
                    _merge[(n,)](
                        tensors, programs, there, tensors.stride(0), programs.stride(0), self._n_segments,
                        **group.constants(torch.float32),
                    )  # fmt: skip

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _moved(self, tables: Sequence[NDArray[np.int64]]) -> list[Tensor]:
        """The tables on the device, by one copy. Rows begin at multiples of 16 bytes: no kernel compiles twice."""
        padded = [np.pad(table, ((0, 0), (0, table.shape[1] % 2))) for table in tables]
        flat = to_device(torch.from_numpy(np.concatenate([table.reshape(-1) for table in padded])), self.device)
        pieces = torch.split(flat, [table.size for table in padded])
        return [piece.view(table.shape) for piece, table in zip(pieces, padded, strict=True)]
