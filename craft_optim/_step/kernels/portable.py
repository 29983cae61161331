"""Portable: inner products and merge by torch operations, for any device, dtype and layout.

Large tensors take one dot per block and product. Small ones are first copied into flat buckets, as their calls would
cost more than the memory traffic.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ..decision import Weights
from .pairs import UNDERFLOW, Pair, to_device

__all__ = ["PortablePairs"]

# Elements per block: on a CPU both blocks stay in the cache while they are read three times; elsewhere a block bounds
# what is copied. The sum of a float32 block is precise enough before summation in float64.
_BLOCK = {"cpu": 1 << 17}
_BLOCK_ACCELERATOR = 1 << 24
# Tensors below this many elements go through buckets, and on accelerators through foreach functions.
_SMALL = {"cpu": 1 << 14}
_SMALL_ACCELERATOR = 1 << 20
# Devices whose scalars are read one by one; others have one read at the end, for which the host waits.
_READ_AT_ONCE = frozenset({"cpu"})


class PortablePairs:
    """Pairs of gradients of any kind."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def sums(self, n_segments: int, dtype: torch.dtype) -> tuple[NDArray[np.float64], dict[torch.device, Tensor]]:
        """<g_t, g_t>, <g_r, g_r> and <g_t, g_r> per segment, float64 `[3, n_segments]`.

        Args:
            n_segments: Number of segments.
            dtype: Dtype in which blocks are summed, unless theirs is wider.

        Returns:
            The sums on the host, and for every device the sums that are still there.
        """
        here = np.zeros((3, n_segments))
        there: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for segment, t, r in _blocks(self._pairs, dtype):
            for row, x, y in ((0, t, t), (1, r, r), (2, t, r)):
                if x is None or y is None:
                    continue
                product = torch.dot(x, y)
                may_underflow = row < 2 and x.dtype == torch.float32 and x.numel() > 0
                if x.device.type in _READ_AT_ONCE:
                    value = product.item()
                    here[row, segment] += UNDERFLOW if may_underflow and value == 0.0 and x.any() else value
                    continue
                product = product.double()
                if may_underflow:  # without reading the elements: that would cost as much as a dot per block
                    product = product.masked_fill(product == 0.0, UNDERFLOW)
                there.setdefault(x.device, []).append((row * n_segments + segment, product))
        return here, {device: _added_up(entries, n_segments) for device, entries in there.items()}

    def merge_(self, coefficients: Sequence[Weights]) -> Iterator[tuple[int, Tensor]]:
        """Merges a g_t + w g_r, into the retention gradients if both are present and dense.

        Yields:
            The number and the merged gradient of every pair that has a retention gradient and w != 0.
        """
        small: dict[tuple[torch.device, torch.dtype, Weights], tuple[list[Tensor], list[Tensor]]] = {}
        for number, segment, t, r in self._pairs:
            c = coefficients[segment]
            if r is None or c.retention == 0.0:
                continue
            if t is None:
                yield number, r.mul_(c.retention)
            elif t.is_sparse or r.is_sparse:
                yield number, _merge_sparse(t, r, c)
            elif r.device.type != "cpu" and r.numel() < _SMALL_ACCELERATOR:
                ts, rs = small.setdefault((r.device, r.dtype, c), ([], []))
                ts.append(t)
                rs.append(r)
                yield number, r
            elif c.task == 1.0:
                yield number, torch.add(t, r, alpha=c.retention, out=r)
            else:
                yield number, r.mul_(c.retention).add_(t, alpha=c.task)
        for (_, _, c), (ts, rs) in small.items():
            torch._foreach_mul_(rs, c.retention)
            torch._foreach_add_(rs, ts, alpha=c.task)


# Key of pairs that share a bucket: segment, device, and both dtypes.
_Kind = tuple[int, torch.device, torch.dtype | None, torch.dtype | None]


def _blocks(pairs: Sequence[Pair], dtype: torch.dtype) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
    """Matching pieces of both gradients as real vectors of at least `dtype`, with their segment."""
    small: dict[_Kind, list[tuple[Tensor | None, Tensor | None]]] = {}
    for _, segment, t, r in pairs:
        one = r if t is None else t
        assert one is not None
        if one.is_sparse or one.is_complex() or (r is not None and r.is_sparse):
            t, r = _plain(t, r)
            one = r if t is None else t
            assert one is not None
        device = one.device
        if one.numel() >= _SMALL.get(device.type, _SMALL_ACCELERATOR):
            yield from _cut(segment, t, r, _block(device), dtype)
        else:
            kind = segment, device, None if t is None else t.dtype, None if r is None else r.dtype
            small.setdefault(kind, []).append((t, r))
    for (segment, device, _, _), alike in small.items():
        block = _block(device)
        for bucket in _buckets(alike, block):
            # A little more than a block at most: not worth cutting.
            yield from _cut(segment, *_flattened(bucket), 2 * block, dtype)


def _block(device: torch.device) -> int:
    return _BLOCK.get(device.type, _BLOCK_ACCELERATOR)


def _buckets(
    pairs: list[tuple[Tensor | None, Tensor | None]], block: int
) -> Iterator[list[tuple[Tensor | None, Tensor | None]]]:
    """Groups the pairs into lists of about `block` elements."""
    sizes = [(r if t is None else t).numel() for t, r in pairs]  # type: ignore[union-attr]
    of_pair = np.cumsum(sizes) // block
    ends = [*(np.flatnonzero(np.diff(of_pair)) + 1).tolist(), len(pairs)]
    for start, end in pairwise([0, *ends]):
        yield pairs[start:end]


def _flattened(bucket: list[tuple[Tensor | None, Tensor | None]]) -> tuple[Tensor | None, Tensor | None]:
    """Both columns of a bucket as one vector each; a column has all or no entries None."""
    ts, rs = zip(*bucket, strict=True)
    t: Tensor | None = None if ts[0] is None else _flatten_dense_tensors(ts)  # type: ignore[no-untyped-call]
    r: Tensor | None = None if rs[0] is None else _flatten_dense_tensors(rs)  # type: ignore[no-untyped-call]
    return t, r


def _cut(
    segment: int, t: Tensor | None, r: Tensor | None, block: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
    flat = [None if g is None else g.reshape(-1) for g in (t, r)]
    n = max(v.numel() for v in flat if v is not None)
    wide = [None if v is None else v.dtype for v in flat]
    common = dtype
    for found in wide:
        common = common if found is None else torch.promote_types(common, found)
    for start in range(0, n, block):
        x, y = (None if v is None else v[start : start + block].to(common) for v in flat)
        yield segment, x, y


def _plain(t: Tensor | None, r: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A pair's stored elements as dense real numbers; if one is sparse, over the union of their entries."""
    if t is not None and r is not None and t.is_sparse and r.is_sparse:
        t, r = t.coalesce(), r.coalesce()
        # Adding zero times the other gives both the same indices, in the same order.
        t, r = (t + 0 * r).coalesce().values(), (r + 0 * t).coalesce().values()
    elif t is not None and r is not None:
        t, r = (g.to_dense() if g.is_sparse else g for g in (t, r))
    values = [g.coalesce().values() if g is not None and g.is_sparse else g for g in (t, r)]
    t, r = (torch.view_as_real(v.resolve_conj()) if v is not None and v.is_complex() else v for v in values)
    return t, r


def _merge_sparse(t: Tensor, r: Tensor, c: Weights) -> Tensor:
    """The merged gradient, sparse only if both are: a dense retention gradient reaches rows that the task did not."""
    if t.is_sparse and r.is_sparse:
        return (c.task * t + c.retention * r).coalesce()
    t, r = (g.to_dense() if g.is_sparse else g for g in (t, r))
    return torch.add(c.task * t, r, alpha=c.retention)


def _added_up(entries: list[tuple[int, Tensor]], n_segments: int) -> Tensor:
    """Sums of the values in each cell of `[3, n_segments]`; in a fixed order, unlike `index_add_`."""
    of_cell: list[list[int]] = [[] for _ in range(3 * n_segments)]
    for i, (cell, _) in enumerate(entries):
        of_cell[cell].append(i)
    table = np.full((3 * n_segments, max(map(len, of_cell))), len(entries))
    for row, found in zip(table, of_cell, strict=True):
        row[: len(found)] = found
    values = torch.stack([value for _, value in entries])
    padded = torch.cat([values, values.new_zeros(1)])
    there = to_device(torch.from_numpy(table), values.device)
    return padded[there].sum(dim=1).view(3, n_segments)
