"""Gradient surgery on lists of gradients: inner products, then the merge a g_t + sum_j w_j g_j.

The caller turns gradients' own graphs off.

Cost for N elements and m retention gradients: a pass of 2N reads for each of the m (m + 1) / 2 pairs of gradients, m
merges of 2N reads and N writes each, which write into the retention gradients, and one read of the device. That is 5N
for m = 1, 12N for m = 2, 21N for m = 3. `decision` derives the coefficients from the products, `kernels` does the work:

| gradients | |
|---|---|
| float32, float64, bfloat16 in host memory | one pass of C++ for each, if there is a compiler |
| float32, float64, bfloat16, float16 on a CUDA device | fused Triton kernels, if there is Triton |
| all others: sparse, complex, of other dtypes, layouts or devices | torch operations |

`reference` is the slow version in float64 that the tests compare with all three.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decision import Products, Weights
from .gradients import Gradients
from .kernels import compiled
from .kernels.pairs import PLAIN, Pair, Vectors, to_device
from .kernels.portable import PortablePairs

if TYPE_CHECKING:
    from .kernels.fused import FusedPairs

__all__ = ["GradientPairs", "GradientSets"]

# Sums of squares outside of this range may have over- or underflowed in float32 and are repeated in float64.
_TRUSTED = (1e-30, 1e37)
# Devices that Triton's kernels run on.
_FUSED = frozenset({"cuda"})

Reduce = Callable[[Tensor], Tensor]


class GradientPairs:
    """Two lists of gradients of the same parameters, sorted by the kernels that can process them.

    Args:
        task: Task gradients, never written to; entries may be None (zero), sparse, complex, of any floating dtype and
            on any device.
        retention: Retention gradients, which a merge writes into, of the same length and shapes.
        shares: Weight of each pair's products, for several processes that hold parts or copies; None for 1.

    Attributes:
        share_memory: True if both gradients of any pair lie in the same place.

    Raises:
        ValueError: The lists differ in length, or a pair in its number of elements.
    """

    def __init__(self, task: Gradients, retention: Gradients, shares: Sequence[float] | None = None) -> None:
        if len(task) != len(retention):
            raise ValueError(
                f"`task` and `retention` must have the same length. Found {len(task)} and {len(retention)}."
            )
        self.task, self.retention = task, retention
        # Products are summed in segments, one for each share.
        segment_of = {share: segment for segment, share in enumerate(dict.fromkeys(shares or (1.0,)))}
        self.n_segments, self._shares = len(segment_of), [*segment_of]
        segments = None if len(segment_of) == 1 or shares is None else [segment_of[share] for share in shares]
        self._compiled: compiled.CompiledPairs | None = None
        self._fused: list[FusedPairs] = []
        self._portable: PortablePairs | None = None
        self.share_memory = False
        device = next((g.device for g in chain(task, retention) if g is not None), None)
        if device is not None and self._are_alike(device, segments):
            return
        self._sort(segments or [0] * len(task))

    def _are_alike(self, device: torch.device, segments: Sequence[int] | None) -> bool:
        """True if one way takes all pairs, as usual: then no Python code runs per pair."""
        library = compiled.library() if device.type == "cpu" else None
        if library is not None:
            dtypes: Collection[torch.dtype] = compiled.DTYPES
        elif device.type in _FUSED and _fused() is not None:
            dtypes = _fused().DTYPES
        else:
            return False
        plain = Vectors.of_plain([self.task, self.retention], device, dtypes)
        if not plain:
            return False
        of_t, of_r = plain
        if library is not None:
            self._compiled = compiled.CompiledPairs(library, of_t, of_r, segments)
            self.share_memory = self._compiled.share_memory
        else:
            self._fused = [_fused().FusedPairs(device, of_t, of_r, segments, self.n_segments)]
            self.share_memory = self._fused[0].share_memory
        return True

    def _sort(self, segments: Sequence[int]) -> None:
        """Assigns each pair to kernels that can process it."""
        task, retention = self.task, self.retention
        library = compiled.library() if any(g is not None and g.is_cpu for g in chain(task, retention)) else None
        pairs = [
            Pair(i, segment, t, r)
            for i, (segment, t, r) in enumerate(zip(segments, task, retention, strict=True))
            if t is not None or r is not None
        ]
        self.share_memory = any(pair.shares_memory() for pair in pairs)
        ways = [_way(pair, library is not None) for pair in pairs]
        here = [pair for pair, way in zip(pairs, ways, strict=True) if way == "compiled"]
        if library is not None and here:
            _, of_pairs, ts, rs = zip(*here, strict=True)
            self._compiled = compiled.CompiledPairs(library, Vectors(ts), Vectors(rs), of_pairs)
        there = [pair for pair, way in zip(pairs, ways, strict=True) if way == "fused"]
        for device in dict.fromkeys(pair.device for pair in there):
            _, of_pairs, ts, rs = zip(*(pair for pair in there if pair.device == device), strict=True)
            self._fused.append(_fused().FusedPairs(device, Vectors(ts), Vectors(rs), of_pairs, self.n_segments))
        others = [pair for pair, way in zip(pairs, ways, strict=True) if way == "portable"]
        self._portable = PortablePairs(others) if others else None

    @property
    def ways(self) -> set[str]:
        """Names of the modules in `kernels` that process any of the pairs."""
        given = {"compiled": self._compiled, "fused": self._fused, "portable": self._portable}
        return {way for way, pairs in given.items() if pairs}

    @property
    def in_float32(self) -> bool:
        """True if squares of any pair may be summed in float32."""
        return bool(self._fused) or self._portable is not None

    def sums(self, dtype: torch.dtype) -> tuple[NDArray[np.float64], dict[torch.device, Tensor]]:
        """Products per segment, `[3, n_segments]`: those on the host, and those on each device."""
        host: NDArray[np.float64] = np.zeros((3, self.n_segments))
        on_devices: dict[torch.device, Tensor] = {}
        if self._portable is not None:
            host, on_devices = self._portable.sums(self.n_segments, dtype)
        if self._compiled is not None:
            host = host + self._compiled.sums(self.n_segments)
        for pairs in self._fused:
            sums = pairs.sums(dtype)
            on_devices[pairs.device] = on_devices[pairs.device] + sums if pairs.device in on_devices else sums
        return host, on_devices

    def folded(self, sums: Any) -> Any:
        """Weighted totals `[3, n]` of sums per segment, `[3, n * n_segments]`, as arrays or tensors."""
        if self.n_segments == 1:
            return sums if self._shares == [1.0] else sums * self._shares[0]
        shares: Any = np.array(self._shares)[:, None]
        if isinstance(sums, Tensor):
            shares = to_device(torch.from_numpy(shares), sums.device)
        return (sums.reshape(3, -1, self.n_segments) @ shares).reshape(3, -1)

    def merge_(self, weights: Weights) -> Gradients:
        """Writes a g_t + w g_r into the retention gradients.

        Returns:
            The merged gradients. An entry is the task gradient itself if nothing is added and a = 1, a new tensor if
            there is only a task gradient and a != 1, and None if both gradients are.
        """
        coefficients = [weights] * self.n_segments
        if self._compiled is not None:
            self._compiled.merge_(coefficients)
        for pairs in self._fused:
            pairs.merge_(coefficients)
        merged = list(self.retention)
        for i, g in () if self._portable is None else self._portable.merge_(coefficients):
            merged[i] = g
        if type(None) in set(map(type, merged)) or weights.retention == 0.0:
            for i, (t, r) in enumerate(zip(self.task, self.retention, strict=True)):
                if r is None or weights.retention == 0.0:
                    merged[i] = t if t is None or weights.task == 1.0 else t * weights.task
        return merged


class GradientSets:
    """Task gradients, and the retention gradients of one or several constraints.

    Args:
        task: Task gradients, as for `GradientPairs`; never written to.
        retention: Retention gradients of each constraint.
        shares: Weights, as for `GradientPairs`.

    Attributes:
        share_memory: True if any two gradients lie in the same place.

    Raises:
        ValueError: As for `GradientPairs`.
    """

    def __init__(self, task: Gradients, retention: Sequence[Gradients], shares: Sequence[float] | None = None) -> None:
        self.retention = retention
        self._shares = shares
        lists = [task, *retention]
        self._pairs = {(i, j): GradientPairs(lists[i], lists[j], shares) for i, j in combinations(range(len(lists)), 2)}
        self.share_memory = any(pairs.share_memory for pairs in self._pairs.values())

    def inner_products(self, *scalars: Tensor, reduce: Reduce | None = None) -> tuple[Products, list[float]]:
        """Inner products <g_i, g_j> of all lists.

        Computed in float64, or over blocks in float32 that are summed in float64, whatever the gradients' dtype; a
        total that float32 cannot hold is repeated in float64.

        Args:
            scalars: Further tensors of one element to fetch in the same read of the device.
            reduce: Function for sums over several processes. Before the read it gets rows <i, i>, <j, j>, <i, j> of all
                pairs i < j and scalars, float64 `[4, max(n_pairs, n_scalars)]` on the device of the first gradient, and
                returns as many.

        Returns:
            The products and the values of `scalars` as floats.
        """
        sums, values = self._measured(scalars, torch.float32, reduce)
        low, high = _TRUSTED
        in_float32 = any(pairs.in_float32 for pairs in self._pairs.values())
        squares = sums[:2]
        # Exactly zero means a gradient of zeros only: see `UNDERFLOW`
        if in_float32 and not ((squares == 0.0) | (low < squares) & (squares < high)).all():
            sums, _ = self._measured((), torch.float64, reduce)
        matrix = np.empty((len(self.retention) + 1,) * 2)
        for (i, j), (ii, jj, ij) in zip(self._pairs, sums.T.tolist(), strict=True):
            if i == 0:
                matrix[0, 0], matrix[j, j] = ii, jj
            matrix[i, j] = matrix[j, i] = ij
        return Products(matrix), values

    def merge_(self, merges: Sequence[Weights]) -> Gradients:
        """Writes a g_t + w_1 g_1 into g_1, then that + w_2 g_2 into g_2, and so on.

        Args:
            merges: Coefficients of each merge.

        Returns:
            The merged gradients, as `GradientPairs.merge_`.
        """
        merged = self._pairs[0, 1].merge_(merges[0])
        for gradients, weights in zip(self.retention[1:], merges[1:], strict=True):
            merged = GradientPairs(merged, gradients, self._shares).merge_(weights)
        return merged

    def _measured(
        self, scalars: Sequence[Tensor], dtype: torch.dtype, reduce: Reduce | None
    ) -> tuple[NDArray[np.float64], list[float]]:
        """The sums of all pairs, `[3, n_pairs]`, and the scalars."""
        pairs = [*self._pairs.values()]
        host, on_devices = _side_by_side(pairs, dtype)
        fold = pairs[0].folded
        if reduce is not None:
            given = [x.detach().double() for x in scalars]
            gradients = (g for one in pairs for g in (*one.task, *one.retention) if g is not None)
            home = next((g.device for g in gradients), torch.device("cpu"))
            # The host's only wait is the read below
            nothing = torch.zeros(host.shape, dtype=torch.float64, device=home)
            total = to_device(torch.from_numpy(host), home) if home.type == "cpu" or host.any() else nothing
            for sums in on_devices.values():
                total = total + sums.to(home)
            total = fold(total)
            n = total.shape[1]
            rows = total.new_zeros(4, max(n, len(given)))
            rows[:3, :n] = total
            for j, x in enumerate(given):
                rows[3, j] = x.reshape(()).to(home)
            read = reduce(rows).cpu().numpy()
            return read[:3, :n], read[3, : len(given)].tolist()

        # One read per device: during a read the host waits, and the device's queue runs empty.
        read_at: dict[torch.device, list[Tensor]] = {device: [sums.view(-1)] for device, sums in on_devices.items()}
        for x in scalars:
            if not x.is_cpu:
                read_at.setdefault(x.device, []).append(x.detach().double().reshape(1))
        values: dict[torch.device, list[float]] = {device: torch.cat(x).tolist() for device, x in read_at.items()}
        for device in on_devices:
            host = host + np.array(values[device][: host.size]).reshape(host.shape)
            del values[device][: host.size]
        return fold(host), [float(x) if x.is_cpu else values[x.device].pop(0) for x in scalars]


def _side_by_side(
    pairs: Sequence[GradientPairs], dtype: torch.dtype
) -> tuple[NDArray[np.float64], dict[torch.device, Tensor]]:
    """`GradientPairs.sums` of several pairs of lists side by side, `[3, n_pairs * n_segments]`."""
    if len(pairs) == 1:
        return pairs[0].sums(dtype)
    hosts, of_devices = zip(*(one.sums(dtype) for one in pairs), strict=True)
    devices = dict.fromkeys(device for one in of_devices for device in one)
    nothing = {device: torch.zeros(3, pairs[0].n_segments, dtype=torch.float64, device=device) for device in devices}
    together = {device: torch.cat([one.get(device, nothing[device]) for one in of_devices], 1) for device in devices}
    return np.concatenate(hosts, axis=1), together


def _way(pair: Pair, has_library: bool) -> str:
    """The module in `kernels` that processes a pair."""
    device = pair.device
    if device.type == "cpu" and has_library:
        way, dtypes = "compiled", compiled.DTYPES
    elif device.type in _FUSED and _fused() is not None:
        way, dtypes = "fused", _fused().DTYPES
    else:
        return "portable"
    fits = all(type(g) in PLAIN and g.device == device and g.dtype in dtypes for g in pair.given)
    fits = fits and pair.in_same_order()
    return way if fits else "portable"


@cache
def _fused() -> Any:
    """The Triton kernels, or None without Triton."""
    try:
        from .kernels import fused
    except ImportError:
        return None
    return fused
