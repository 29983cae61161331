"""Gradient surgery on two lists of gradients: inner products, then the merge a g_t + w g_r.

Cost for N elements: 2N reads for the inner products, 2N reads and N writes for the merge, which writes into the
retention gradients, and one read of the device. `craft_optim.decision` tells how the coefficients follow from the
products, `craft_optim._kernels` holds what does the work:

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

if TYPE_CHECKING:
    from craft_optim._kernels.fused import FusedPairs

__all__ = ["GradientPairs"]

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
        products, values = self._measured(scalars, torch.float32, reduce)
        total = products.gram()
        low, high = _TRUSTED
        in_float32 = self.portable or self._fused
        if in_float32 and any(not low < square < high for square in (total.tt, total.rr)):
            products, _ = self._measured((), torch.float64, reduce)
        return products, values

    @property
    def portable(self) -> bool:
        """Whether torch operations work on any of the pairs."""
        return bool(self._portable)

    def _measured(
        self, scalars: Sequence[Tensor], dtype: torch.dtype, reduce: Callable[[Tensor], Tensor] | None
    ) -> tuple[Products, list[float]]:
        n = len(self._label_of)
        host, on_devices = self._portable.sums(n, dtype)
        if self._compiled is not None:
            host = host + self._compiled.sums(n)
        for pairs in self._fused:
            sums = pairs.sums(dtype)
            on_devices[pairs.device] = on_devices[pairs.device] + sums if pairs.device in on_devices else sums

        given = [x.detach().double().reshape(1) for x in scalars]
        if reduce is not None:
            home = next((g.device for g in (*self.task, *self.retention) if g is not None), torch.device("cpu"))
            total = torch.from_numpy(host).to(home, non_blocking=True)  # the one wait of the host is the read below
            for sums in on_devices.values():
                total = total + sums.to(home)
            if self._fold is not None:
                total = total @ torch.from_numpy(self._fold).to(home, non_blocking=True)
            n = total.shape[1]
            rows = total.new_zeros(4, max(n, len(given)))
            rows[:3, :n] = total
            for j, x in enumerate(given):
                rows[3, j] = x.to(home)
            read = reduce(rows).cpu().numpy()
            return Products(*read[:3, :n]), read[3, : len(given)].tolist()

        # What is on one device is read together: while it is read the host waits, and the device's queue runs empty.
        read_at: dict[torch.device, list[Tensor]] = {device: [sums.view(-1)] for device, sums in on_devices.items()}
        for x in given:
            read_at.setdefault(x.device, []).append(x)
        values: dict[torch.device, list[float]] = {device: torch.cat(x).tolist() for device, x in read_at.items()}
        for device in on_devices:
            host = host + np.array(values[device][: 3 * n]).reshape(3, n)
            del values[device][: 3 * n]
        if self._fold is not None:
            host = host @ self._fold
        return Products(*host), [values[x.device].pop(0) for x in given]

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
