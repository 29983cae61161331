"""Gradient surgery on lists of gradients: inner products, then the merge a g_t + sum_j w_j g_j.

Cost for N elements and m retention gradients: a pass of 2N reads for each of the m (m + 1) / 2 pairs of gradients, m
merges of 2N reads and N writes each, which write into the retention gradients, and one read of the device. That is 5N
for m = 1, 12N for m = 2, 21N for m = 3. `craft_optim.decision` tells how the coefficients follow from the products,
`craft_optim._kernels` holds what does the work:

| gradients | |
|---|---|
| float32, float64, bfloat16 in main memory | one pass of C++ for each, if there is a compiler |
| float32, float64, bfloat16, float16 on a CUDA device | fused Triton kernels, if there is Triton |
| all others: sparse, complex, of other dtypes, layouts or devices | torch operations |

`craft_optim._reference` holds the slow version in float64 which the tests compare with all three.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craft_optim._kernels import compiled
from craft_optim._kernels.pairs import Pair
from craft_optim._kernels.portable import PortablePairs
from craft_optim.decision import Products, Weights
from craft_optim.gradients import Gradients
from craft_optim.several import ProductsOfSeveral, pairs_of

if TYPE_CHECKING:
    from craft_optim._kernels.fused import FusedPairs

__all__ = ["GradientPairs", "GradientSets"]

# Sums of squares outside this range may have over- or underflowed in float32 and are formed again in float64.
_TRUSTED = (1e-30, 1e37)
# Devices that Triton's kernels run on.
_FUSED = frozenset({"cuda"})


class GradientPairs:
    """Task and retention gradients of the same parameters, sorted by what can work on them.

    Args:
        task: Task gradients; entries may be None (zero), sparse, complex, of any floating dtype and on any device.
            Never written to.
        retention: Retention gradients, of the same length and shapes.
        labels: Of each pair, the decision it belongs to: 0, 1, ...; None for one decision for all.
        shares: Of each pair, the weight of its products, for several processes that hold parts or copies; None for 1.

    Raises:
        ValueError: If the lists differ in length, or a pair in its number of elements.
    """

    def __init__(
        self,
        task: Gradients,
        retention: Gradients,
        labels: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        if len(task) != len(retention):
            raise ValueError(
                f"`task` and `retention` must have the same length. Found {len(task)} and {len(retention)}."
            )
        self.task, self.retention = task, retention
        n_labels = 1 if labels is None else max(labels, default=0) + 1
        labels = [0] * len(task) if labels is None else labels
        # Products are added up in segments. Usually these are the labels; else each label and share has one.
        self._segments, self._label_of = labels, list(range(n_labels))
        # [n_segments, n_labels], from the sums of the one to those of the other.
        self._fold: NDArray[np.float64] | None = None
        if shares is not None:
            keys = list(zip(labels, shares, strict=True))
            segment_of = {key: segment for segment, key in enumerate(dict.fromkeys(keys))}
            self._segments, self._label_of = [segment_of[key] for key in keys], [label for label, _ in segment_of]
            self._fold = np.zeros((len(segment_of), n_labels))
            for (label, share), segment in segment_of.items():
                self._fold[segment, label] = share
        n_segments = len(self._label_of)
        self._compiled: compiled.CompiledPairs | None = None
        self._fused: list[FusedPairs] = []
        library = compiled.library()
        self._portable = PortablePairs([])
        if library is not None:
            of_t, of_r = compiled.Vectors.of_plain(task), compiled.Vectors.of_plain(retention)
            if of_t is not None and of_r is not None:
                segments = None if n_segments == 1 else self._segments
                self._compiled = compiled.CompiledPairs(library, of_t, of_r, segments)
                return

        pairs = [
            Pair(i, segment, t, r)
            for i, (segment, t, r) in enumerate(zip(self._segments, task, retention, strict=True))
            if t is not None or r is not None
        ]
        ways = [_way(pair, library is not None) for pair in pairs]
        here = [pair for pair, way in zip(pairs, ways, strict=True) if way == "compiled"]
        if library is not None and here:
            _, of_pairs, ts, rs = zip(*here, strict=True)
            self._compiled = compiled.CompiledPairs(library, compiled.Vectors(ts), compiled.Vectors(rs), of_pairs)
        there = [pair for pair, way in zip(pairs, ways, strict=True) if way == "fused"]
        for device in dict.fromkeys(pair.device for pair in there):
            on_device = [pair for pair in there if pair.device == device]
            self._fused.append(_fused().FusedPairs(on_device, n_segments))
        self._portable = PortablePairs([pair for pair, way in zip(pairs, ways, strict=True) if way == "portable"])

    @torch.no_grad()
    def inner_products(
        self, *scalars: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Products, list[float]]:
        """<g_t, g_t>, <g_r, g_r> and <g_t, g_r> of every label.

        Formed in float64, or over blocks in float32 that are added up in float64, whatever the gradients' dtype; a
        total that float32 cannot hold is formed again in float64.

        Args:
            scalars: Further tensors of one element to fetch in the same read of the device.
            reduce: Gets rows tt, rr, tr and scalars, float64 `[4, max(n_labels, n_scalars)]` on the device of the first
                gradient, before they are read, and returns as many; for sums over several processes.

        Returns:
            The products and the values of `scalars` as floats.
        """
        (products,), values = _inner_products([self], scalars, reduce)
        return products, values

    @property
    def portable(self) -> bool:
        """Whether torch operations work on any of the pairs."""
        return bool(self._portable)

    @property
    def in_float32(self) -> bool:
        """Whether any product is formed in float32 at first."""
        return self.portable or bool(self._fused)

    @property
    def n_segments(self) -> int:
        return len(self._label_of)

    def sums(self, dtype: torch.dtype) -> tuple[NDArray[np.float64], dict[torch.device, Tensor]]:
        """Products per segment, `[3, n_segments]`: those that are on the host, and for every device those there."""
        host, on_devices = self._portable.sums(self.n_segments, dtype)
        if self._compiled is not None:
            host = host + self._compiled.sums(self.n_segments)
        for pairs in self._fused:
            sums = pairs.sums(dtype)
            on_devices[pairs.device] = on_devices[pairs.device] + sums if pairs.device in on_devices else sums
        return host, on_devices

    def folded(self, sums: Any) -> Any:
        """Sums per segment, `[3, n * n_segments]`, arrays or tensors alike, as sums per label."""
        if self._fold is None:
            return sums
        fold: Any = self._fold
        if isinstance(sums, Tensor):
            fold = torch.from_numpy(fold).to(sums.device, non_blocking=True)
        if sums.shape[1] == self.n_segments:
            return sums @ fold
        return (sums.reshape(3, -1, self.n_segments) @ fold).reshape(3, -1)

    @torch.no_grad()
    def merge_(self, coefficients: Sequence[Weights]) -> Gradients:
        """a g_t + w g_r, written into the retention gradients.

        Args:
            coefficients: One `Weights` per label.

        Returns:
            The merged gradients. An entry is the task gradient itself where nothing is to be added and a = 1, a new
            tensor where there is a task gradient only and a != 1, and None where both gradients are.
        """
        coefficients = [coefficients[label] for label in self._label_of]
        if self._compiled is not None:
            self._compiled.merge_(coefficients)
        for pairs in self._fused:
            pairs.merge_(coefficients)
        merged = list(self.retention)
        for i, g in self._portable.merge_(coefficients):
            merged[i] = g
        if type(None) in set(map(type, merged)) or any(c.retention == 0.0 for c in coefficients):
            for i, (segment, t, r) in enumerate(zip(self._segments, self.task, self.retention, strict=True)):
                c = coefficients[segment]
                if r is None or c.retention == 0.0:
                    merged[i] = t if t is None or c.task == 1.0 else t * c.task
        return merged


class GradientSets:
    """Task gradients, and the retention gradients of one or several constraints.

    Args:
        task: As for `GradientPairs`; never written to.
        retention: Of each constraint its gradients.
        labels: As for `GradientPairs`.
        shares: As for `GradientPairs`.

    Raises:
        ValueError: As `GradientPairs`.
    """

    def __init__(
        self,
        task: Gradients,
        retention: Sequence[Gradients],
        labels: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.retention = retention
        self._labels, self._shares = labels, shares
        self._with_task = [GradientPairs(task, gradients, labels, shares) for gradients in retention]
        self._between = {
            (i, j): GradientPairs(retention[i], retention[j], labels, shares) for i, j in pairs_of(len(retention))
        }

    @torch.no_grad()
    def inner_products(
        self, *scalars: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[ProductsOfSeveral, list[float]]:
        """Those of every two lists, with the same one read of the device; see `GradientPairs.inner_products`."""
        found, values = _inner_products([*self._with_task, *self._between.values()], scalars, reduce)
        m = len(self._with_task)
        between = {key: products.tr for key, products in zip(self._between, found[m:], strict=True)}
        return ProductsOfSeveral(found[:m], between), values

    @torch.no_grad()
    def merge_(self, coefficients: Sequence[Sequence[Weights]]) -> Gradients:
        """a g_t + w_1 g_1, written into g_1, then that + w_2 g_2, written into g_2, and so on.

        Args:
            coefficients: For each of these merges, one `Weights` per label.

        Returns:
            As `GradientPairs.merge_`.
        """
        merged = self._with_task[0].merge_(coefficients[0])
        for gradients, of_labels in zip(self.retention[1:], coefficients[1:], strict=True):
            merged = GradientPairs(merged, gradients, self._labels, self._shares).merge_(of_labels)
        return merged


def _inner_products(
    pairs: Sequence[GradientPairs], scalars: Sequence[Tensor], reduce: Callable[[Tensor], Tensor] | None
) -> tuple[list[Products], list[float]]:
    """Of one or several pairs of lists, with the same labels and shares; see `GradientPairs.inner_products`."""
    products, values = _measured(pairs, scalars, torch.float32, reduce)
    low, high = _TRUSTED
    totals = [found.gram() for found in products]
    if any(one.in_float32 for one in pairs) and any(
        not low < square < high for total in totals for square in (total.tt, total.rr)
    ):
        products, _ = _measured(pairs, (), torch.float64, reduce)
    return products, values


def _measured(
    pairs: Sequence[GradientPairs],
    scalars: Sequence[Tensor],
    dtype: torch.dtype,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[list[Products], list[float]]:
    host, on_devices = _side_by_side(pairs, dtype)
    fold = pairs[0].folded
    given = [x.detach().double().reshape(1) for x in scalars]
    if reduce is not None:
        gradients = (g for one in pairs for g in (*one.task, *one.retention) if g is not None)
        home = next((g.device for g in gradients), torch.device("cpu"))
        total = torch.from_numpy(host).to(home, non_blocking=True)  # the one wait of the host is the read below
        for sums in on_devices.values():
            total = total + sums.to(home)
        total = fold(total)
        n = total.shape[1]
        rows = total.new_zeros(4, max(n, len(given)))
        rows[:3, :n] = total
        for j, x in enumerate(given):
            rows[3, j] = x.to(home)
        read = reduce(rows).cpu().numpy()
        return _apart(read[:3, :n], len(pairs)), read[3, : len(given)].tolist()

    # What is on one device is read together: while it is read the host waits, and the device's queue runs empty.
    read_at: dict[torch.device, list[Tensor]] = {device: [sums.view(-1)] for device, sums in on_devices.items()}
    for x in given:
        read_at.setdefault(x.device, []).append(x)
    values: dict[torch.device, list[float]] = {device: torch.cat(x).tolist() for device, x in read_at.items()}
    for device in on_devices:
        host = host + np.array(values[device][: host.size]).reshape(host.shape)
        del values[device][: host.size]
    return _apart(fold(host), len(pairs)), [values[x.device].pop(0) for x in given]


def _side_by_side(
    pairs: Sequence[GradientPairs], dtype: torch.dtype
) -> tuple[NDArray[np.float64], dict[torch.device, Tensor]]:
    """`GradientPairs.sums` of all of them, `[3, n_pairs * n_segments]`."""
    if len(pairs) == 1:
        return pairs[0].sums(dtype)
    hosts, of_devices = zip(*(one.sums(dtype) for one in pairs), strict=True)
    devices = dict.fromkeys(device for one in of_devices for device in one)
    nothing = {device: torch.zeros(3, pairs[0].n_segments, dtype=torch.float64, device=device) for device in devices}
    together = {device: torch.cat([one.get(device, nothing[device]) for one in of_devices], 1) for device in devices}
    return np.concatenate(hosts, axis=1), together


def _apart(sums: NDArray[np.float64], n_pairs: int) -> list[Products]:
    """The inverse of `_side_by_side`."""
    n = sums.shape[1] // n_pairs
    return [Products(*sums[:, i * n : (i + 1) * n]) for i in range(n_pairs)]


def _way(pair: Pair, has_library: bool) -> str:
    """Who works on a pair."""
    device = pair.device
    if device.type == "cpu" and has_library:
        way, kinds = "compiled", compiled.KINDS.keys()
    elif device.type in _FUSED and _fused() is not None:
        way, kinds = "fused", _fused().DTYPES.keys()
    else:
        return "portable"
    fits = all(type(g) in compiled.PLAIN and g.device == device and g.dtype in kinds for g in pair.given)
    fits = fits and pair.in_same_order()
    return way if fits else "portable"


@cache
def _fused() -> Any:
    """The Triton kernels, or None without Triton."""
    try:
        from craft_optim._kernels import fused
    except ImportError:
        return None
    return fused
