"""Gradient surgery: inner products of two gradient lists, the 2x2 decision, and the merge.

For task gradients g_t and retention gradients g_r (lists of equal length; a missing entry counts as zero):

    s_tt = <g_t, g_t>,  s_rr = <g_r, g_r>,  s_tr = <g_t, g_r>,  cos = s_tr / sqrt(s_tt s_rr)
    p    = s_tr / s_rr where the projection is active and cos < conflict_threshold, else 0
    g    = a g_t + w g_r

    merge            a      w
    weighted         1      lambda - p
    equal            0.5    0.5 (1 - p)
    task_priority    1      min(lambda, 1) - p

Cost for N elements: about 2N reads for the inner products and 2N reads and N writes for the merge, which writes into
the retention buffers. One read of the device per call of `inner_products`.

`craft_optim._reference` holds the slow version in float64 which the tests compare with this one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craft_optim.gradients import Gradients

__all__ = [
    "Decision",
    "Gram",
    "Granularity",
    "Merge",
    "Products",
    "Weights",
    "blocks_of",
    "decide",
    "inner_products",
    "merge_",
    "weights",
]

Merge = Literal["weighted", "equal", "task_priority"]
Granularity = Literal["global", "group", "tensor"]

# Elements per block of the inner products: both blocks stay in the cache while they are read three times, and the
# sum of a float32 block loses nothing that matters before it is added up in float64.
_BLOCK = {"cpu": 1 << 16}
_BLOCK_ACCELERATOR = 1 << 26
# Below this many elements a Python call per tensor costs more than the second pass of two foreach calls.
_FOREACH_BELOW = {"cpu": 1 << 14}
_FOREACH_BELOW_ACCELERATOR = 1 << 20
# Devices whose scalars are read one by one; those of others in one read at the end, for which the host has to wait.
_READ_AT_ONCE = frozenset({"cpu"})
# Sums of squares outside this range may have over- or underflowed in float32 and are formed again in float64.
_TRUSTED = (1e-30, 1e37)


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of the task gradient (t) and the retention gradient (r).

    Attributes:
        tt: |g_t|^2.
        rr: |g_r|^2.
        tr: <g_t, g_r>.
    """

    tt: float
    rr: float
    tr: float

    @property
    def cos(self) -> float:
        """Cosine between the two gradients; 0 where either of them is zero."""
        scale = math.sqrt(self.tt) * math.sqrt(self.rr)
        return self.tr / scale if scale > 0.0 else 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.tt) and math.isfinite(self.rr) and math.isfinite(self.tr)


class Products(NamedTuple):
    """Inner products per tensor: float64 arrays of shape `[n_tensors]`."""

    tt: NDArray[np.float64]
    rr: NDArray[np.float64]
    tr: NDArray[np.float64]

    def gram(self, block: Sequence[int] | None = None) -> Gram:
        """The sum over all tensors, or over those of one block."""
        chosen: slice | list[int] = slice(None) if block is None else list(block)
        return Gram(*(float(column[chosen].sum()) for column in self))


class Weights(NamedTuple):
    """Coefficients of the merge g = task * g_t + retention * g_r."""

    task: float
    retention: float
    projected: bool


def weights(gram: Gram, *, lam: float, project: bool, conflict_threshold: float, merge: str) -> Weights:
    """The coefficients of one block, by the table above.

    Args:
        gram: Inner products of the block.
        lam: The multiplier, >= 0.
        project: Whether the projection may act at all.
        conflict_threshold: It acts where the cosine is below this.
        merge: "weighted", "equal" or "task_priority".

    Raises:
        ValueError: If `merge` is unknown.
    """
    projected = project and gram.rr > 0.0 and gram.tt > 0.0 and gram.cos < conflict_threshold
    p = gram.tr / gram.rr if projected else 0.0
    if merge == "weighted":
        return Weights(1.0, lam - p, projected)
    if merge == "equal":
        return Weights(0.5, 0.5 * (1.0 - p), projected)
    if merge == "task_priority":
        return Weights(1.0, min(lam, 1.0) - p, projected)
    raise ValueError(f"`merge` must be one of {', '.join(map(repr, get_args(Merge)))}. Found merge={merge!r}.")


class Decision(NamedTuple):
    """What one step does with all its blocks.

    Attributes:
        coefficients: One entry for all tensors, or one per tensor.
        norm: Norm of the gradient that the coefficients give.
        conflict: Share of blocks whose cosine is below the threshold.
        projected: Share of blocks in which the projection acts.
        clipped: Whether `max_norm` scaled the coefficients.
    """

    coefficients: list[Weights]
    norm: float
    conflict: float
    projected: float
    clipped: bool


def decide(
    products: Products,
    blocks: Sequence[Sequence[int]],
    *,
    lam: float,
    project: bool,
    conflict_threshold: float,
    merge: str,
    max_norm: float | None = None,
) -> Decision:
    """The coefficients of every block, scaled so that the merged gradient's norm is at most `max_norm`.

    The norm needs no look at a gradient: |a g_t + w g_r|^2 = a^2 s_tt + 2 a w s_tr + w^2 s_rr, summed over the blocks.

    Args:
        products: Inner products per tensor.
        blocks: Indices of the tensors that share a decision, from `blocks_of`.
        lam: The multiplier.
        project: Whether the projection may act.
        conflict_threshold: See `weights`.
        merge: See `weights`.
        max_norm: Cap on the norm; None for no cap.
    """
    grams = [products.gram(block) for block in blocks]
    chosen = [
        weights(gram, lam=lam, project=project, conflict_threshold=conflict_threshold, merge=merge) for gram in grams
    ]
    square = sum(
        c.task**2 * gram.tt + 2.0 * c.task * c.retention * gram.tr + c.retention**2 * gram.rr
        for gram, c in zip(grams, chosen, strict=True)
    )
    norm = math.sqrt(max(square, 0.0))  # cancellation may leave a small negative number
    clipped = max_norm is not None and norm > max_norm
    if max_norm is not None and clipped:
        scale = max_norm / norm
        chosen = [Weights(c.task * scale, c.retention * scale, c.projected) for c in chosen]
        norm = max_norm
    if len(blocks) == 1:
        coefficients = chosen
    else:
        of_tensor = {i: c for block, c in zip(blocks, chosen, strict=True) for i in block}
        coefficients = [of_tensor[i] for i in range(len(of_tensor))]
    n = max(len(blocks), 1)
    conflict = sum(gram.cos < conflict_threshold for gram in grams) / n
    return Decision(coefficients, norm, conflict, sum(c.projected for c in chosen) / n, clipped)


def blocks_of(granularity: str, group_sizes: Sequence[int]) -> list[list[int]]:
    """Indices of the tensors that share one decision.

    Args:
        granularity: "global" (one block), "group" (one per parameter group) or "tensor".
        group_sizes: Number of parameters of each group, in order.

    Raises:
        ValueError: If `granularity` is unknown.
    """
    n = sum(group_sizes)
    if granularity == "global":
        return [list(range(n))]
    if granularity == "tensor":
        return [[i] for i in range(n)]
    if granularity == "group":
        ends = np.cumsum([0, *group_sizes])
        return [list(range(ends[i], ends[i + 1])) for i in range(len(group_sizes))]
    allowed = ", ".join(map(repr, get_args(Granularity)))
    raise ValueError(f"`granularity` must be one of {allowed}. Found granularity={granularity!r}.")


@torch.no_grad()
def inner_products(
    task: Gradients,
    retention: Gradients,
    *scalars: Tensor,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Products, list[float]]:
    """<g_t, g_t>, <g_r, g_r> and <g_t, g_r> of every pair of tensors.

    Sums are formed in float32 over blocks and added up in float64, whatever the gradients' dtype; a total that float32
    cannot hold is formed again in float64.

    Args:
        task: Task gradients; entries may be None, sparse, complex, of any floating dtype and on any device.
        retention: Retention gradients, of the same length and shapes.
        scalars: Further tensors of one element to fetch in the same read of the device.
        reduce: Gets rows tt, rr, tr and scalars, float64 `[4, max(n_tensors, n_scalars)]` on the device of the first
            gradient, before they are read, and returns as many; for sums over several processes.

    Returns:
        The products and the values of `scalars` as floats.

    Raises:
        ValueError: If the lists differ in length.
    """
    if len(task) != len(retention):
        raise ValueError(f"`task` and `retention` must have the same length. Found {len(task)} and {len(retention)}.")
    products, values = _products(task, retention, scalars, torch.float32, reduce)
    total = products.gram()
    low, high = _TRUSTED
    if any(not low < square < high for square in (total.tt, total.rr)):
        products, _ = _products(task, retention, (), torch.float64, reduce)
    return products, values


def _products(
    task: Gradients,
    retention: Gradients,
    scalars: Sequence[Tensor],
    dtype: torch.dtype,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[Products, list[float]]:
    sums = np.zeros((4, max(len(task), len(scalars))))
    on_device: dict[torch.device, list[tuple[int, int, Tensor]]] = {}

    def add(row: int, i: int, value: Tensor) -> None:
        if value.device.type in _READ_AT_ONCE:
            sums[row, i] += value.item()
        else:
            on_device.setdefault(value.device, []).append((row, i, value.double()))

    for j, scalar in enumerate(scalars):
        add(3, j, scalar.detach().reshape(()))
    for i, (t, r) in enumerate(zip(task, retention, strict=True)):
        for x, y in _flat_blocks(t, r, dtype):
            if x is not None:
                add(0, i, torch.dot(x, x))
            if y is not None:
                add(1, i, torch.dot(y, y))
            if x is not None and y is not None:
                add(2, i, torch.dot(x, y))

    home = next((g.device for g in (*task, *retention) if g is not None), torch.device("cpu"))
    if reduce is not None and on_device.keys() == {home}:  # the sums of all processes, before the one read
        entries = on_device.pop(home)
        places = torch.tensor([row * sums.shape[1] + i for row, i, _ in entries], device=home)
        total = torch.from_numpy(sums).to(home).view(-1).index_add_(0, places, torch.stack([x for _, _, x in entries]))
        sums = reduce(total.view(sums.shape)).cpu().numpy()
        reduce = None
    for entries in on_device.values():
        read = torch.stack([value for _, _, value in entries]).tolist()
        for (row, i, _), value in zip(entries, read, strict=True):
            sums[row, i] += value
    if reduce is not None:
        sums = reduce(torch.from_numpy(sums).to(home)).cpu().numpy()
    n = len(task)
    return Products(sums[0, :n], sums[1, :n], sums[2, :n]), sums[3, : len(scalars)].tolist()


def _flat_blocks(
    t: Tensor | None, r: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Matching pieces of both gradients as real vectors of at least `dtype`."""
    if t is not None and r is not None and (t.is_sparse or r.is_sparse):
        t, r = _on_common_entries(t, r)
    flat = [None if g is None else _flat(g) for g in (t, r)]
    given = [x for x in flat if x is not None]
    if not given:
        return
    n, device = given[0].numel(), given[0].device
    block = _BLOCK.get(device.type, _BLOCK_ACCELERATOR)
    wide = torch.promote_types(given[0].dtype, dtype)
    for start in range(0, n, block):
        x, y = (None if v is None else v[start : start + block].to(wide) for v in flat)
        yield x, y


def _flat(g: Tensor) -> Tensor:
    """A gradient's stored values as a real vector; a view where the memory layout allows it."""
    values = g.coalesce().values() if g.is_sparse else g
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values.reshape(-1)


def _on_common_entries(t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """A pair with at least one sparse gradient as two dense values over the union of their entries."""
    if t.is_sparse and r.is_sparse:
        t, r = t.coalesce(), r.coalesce()
        # Adding zero times the other gives both the same index set, in the same order.
        return (t + 0 * r).coalesce().values(), (r + 0 * t).coalesce().values()
    return (t.to_dense() if t.is_sparse else t), (r.to_dense() if r.is_sparse else r)


@torch.no_grad()
def merge_(task: Gradients, retention: Gradients, coefficients: Sequence[Weights]) -> Gradients:
    """a g_t + w g_r, written into the retention gradients.

    Args:
        task: Task gradients; never written to.
        retention: Retention gradients, overwritten where both are present.
        coefficients: One `Weights` for all tensors, or one per tensor.

    Returns:
        The merged gradients. An entry is the task gradient itself where nothing is to be added and a = 1, a new tensor
        where there is a task gradient only and a != 1, and None where both gradients are.
    """
    per_tensor = list(coefficients) * (len(task) if len(coefficients) == 1 else 1)
    merged: Gradients = []
    small: dict[tuple[torch.device, torch.dtype, Weights], tuple[list[Tensor], list[Tensor]]] = {}
    for t, r, c in zip(task, retention, per_tensor, strict=True):
        if r is None or c.retention == 0.0:
            merged.append(t if t is None or c.task == 1.0 else t * c.task)
        elif t is None:
            merged.append(r.mul_(c.retention))
        elif t.is_sparse or r.is_sparse:
            merged.append(_merge_sparse(t, r, c))
        elif r.numel() < _FOREACH_BELOW.get(r.device.type, _FOREACH_BELOW_ACCELERATOR):
            ts, rs = small.setdefault((r.device, r.dtype, c), ([], []))
            ts.append(t)
            rs.append(r)
            merged.append(r)
        elif c.task == 1.0:
            merged.append(torch.add(t, r, alpha=c.retention, out=r))
        else:
            merged.append(r.mul_(c.retention).add_(t, alpha=c.task))
    for (_, _, c), (ts, rs) in small.items():
        torch._foreach_mul_(rs, c.retention)
        torch._foreach_add_(rs, ts, alpha=c.task)
    return merged


def _merge_sparse(t: Tensor, r: Tensor, c: Weights) -> Tensor:
    """Sparse only where both are: a dense gradient of the retention loss reaches rows that the task did not."""
    if t.is_sparse and r.is_sparse:
        return (c.task * t + c.retention * r).coalesce()
    t, r = (g.to_dense() if g.is_sparse else g for g in (t, r))
    return torch.add(c.task * t, r, alpha=c.retention)
