"""Averaging: the mean over processes of retention gradients that no framework averages.

The set of gradients present on any process determines the collectives of all. Agreeing on it first would wait for the
device on each pass. So all processes use the last agreed set, and report with the inner products, which are read
anyway, whether it was right. If not, the rest is averaged after that read.

So the order of sending is known before a backward. Complete gradients are sent during it, at any time on each process.
A part that comes after its gradient was sent is a rest like any other.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .arrivals import Arrivals
from .gradients import Gradients

__all__ = ["Averaging", "Means"]

# Bytes copied into one buffer and averaged by one collective, and number of collectives in flight.
_BUCKET, _AT_ONCE = 1 << 25, 8

# Group -> another group of the same processes, shared by all that average over the first
_APART: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()

_Mean = Callable[[], list[Tensor]]

# Kinds of gradients; between these two, sparse ones by their number of sparse dimensions.
_ABSENT, _DENSE = 0, 99


class Means(NamedTuple):
    """Result of `Averaging`.

    Attributes:
        gradients: The means, None where no process has ever had a gradient. They are right if no process has more to
            add.
        wanted: For each gradient, True if any process wants it.
        rest: Gradients of this process that are not in the means.
        more: True if this process has more to add: a rest, or other wishes than it reported.
        begun: True if gradients of this process were sent in the backward.
    """

    gradients: Gradients
    wanted: list[bool]
    rest: Sequence[Tensor | None]
    more: bool
    begun: bool


class Averaging:
    """Averages the same parameters' gradients, pass after pass.

    A gradient that is None here but not elsewhere, or None everywhere but not on an earlier pass, counts as zero. One
    collective per 32 MiB of gradients, copied into one buffer, and one per sparse gradient; none waits for another. The
    first pass has one more, which is read, to agree on the gradients present.

    Args:
        group: Group of the processes.
        parameters: Places of the parameters among all parameters of the optimizer.
        bucket: Bytes of gradients per collective; a larger gradient has its own. One of more than eight times as much
            waits for the end of the backward, in which sending needs a copy.
    """

    def __init__(self, group: ProcessGroup, parameters: Sequence[int] = (), bucket: int = _BUCKET) -> None:
        self.parameters = parameters
        self._group, self._over, self._bucket = group, group, bucket
        self._kinds: list[int] | None = None
        self._wanted: list[bool] = []  # on any process
        self._told: list[bool] = []  # as this process reported
        self._arrivals = Arrivals()
        self._places: list[int] = []  # agreed places in the backward
        self._begun: list[tuple[list[int], _Mean]] = []  # the first buckets

    @contextmanager
    def during_backward(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Sends complete gradients during the backward before `means`, and takes them out of `.grad`. Collective.

        Args:
            parameters: The parameters, as for `means`.
        """
        self._begun = []
        buckets = [] if self._kinds is None else self._buckets(self._kinds, parameters)
        if self._kinds is not None and (len(buckets) < 2 or dist.get_backend(self._group) == "mpi"):
            yield  # no gain, or no group for it
            return
        if buckets:
            self._over = _apart(self._group, parameters[0].device)

        def send(bucket: list[int]) -> None:
            tensors = [_dense(parameters[i].grad, parameters[i]) for i in bucket]
            self._begun.append((bucket, _averaged(tensors, self._over, in_place=False)))
            for i in bucket:
                parameters[i].grad = None  # later parts are a rest

        small = [bucket for bucket in buckets if not self._large(parameters[bucket[0]])]
        try:
            with self._arrivals.watched(parameters, small, send):
                yield
        except BaseException:  # others may have sent more or less: this group must not be used again
            _APART.pop(self._group, None)
            raise

    @torch.no_grad()
    def means(self, gradients: Gradients, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> Means:
        """The means of gradients, by the last agreement. Collective.

        Args:
            gradients: Dense or sparse gradients of any floating or complex dtype; dense ones are overwritten.
            parameters: The parameters, plain tensors of the same shapes.
            wanted: For each gradient, True if this process needs it.
        """
        wanted = list(wanted)
        here = _kinds(gradients)
        if self._kinds is None:
            self._kinds = self._agreed(here, wanted, parameters)
        begun, self._begun = self._begun, []
        sent = {i for bucket, _ in begun for i in bucket}
        rest: Gradients = []
        if sent or here != self._kinds:
            both = enumerate(zip(here, self._kinds, strict=True))
            fits = [i not in sent and _fits(mine, agreed) for i, (mine, agreed) in both]
            rest = [None if fit else g for g, fit in zip(gradients, fits, strict=True)]
            gradients = [g if fit else None for g, fit in zip(gradients, fits, strict=True)]
        found = self._reduced(gradients, parameters, self._kinds, begun)
        more = wanted != self._told or any(g is not None for g in rest)
        return Means(found, list(self._wanted), rest, more, bool(sent))

    @torch.no_grad()
    def added(
        self, rest: Sequence[Tensor | None], parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Gradients, list[bool]]:
        """The means of the rests, and the gradients that any process wants: the new agreement. Collective.

        Args:
            rest: Rest as in `Means`; may be empty.
            parameters: The parameters, as for `means`.
            wanted: Flags as for `means`.
        """
        rest = list(rest) or [None] * len(parameters)
        kinds = self._agreed(_kinds(rest), wanted, parameters)
        self._kinds = list(map(max, kinds, self._kinds or kinds))
        return self._reduced(rest, parameters, kinds), list(self._wanted)

    def _agreed(self, kinds: Sequence[int], wanted: Sequence[bool], parameters: Sequence[Tensor]) -> list[int]:
        """Kinds present on any process; also exchanges the wishes and the order of arrival. Reads the device."""
        self._told = self._wanted = list(wanted)
        if not kinds:
            return []
        mine = [kinds, self._told, self._arrivals.places or [0] * len(kinds)]
        told = torch.tensor(mine, dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        anywhere, flags, places = told.tolist()
        self._wanted = [bool(flag) for flag in flags]
        self._places = [known or place for known, place in zip(self._places or places, places, strict=True)]
        return list(anywhere)

    def _buckets(self, kinds: Sequence[int], parameters: Sequence[Tensor]) -> list[list[int]]:
        """Places of dense gradients sent together, in order of arrival; uncopied ones last."""
        known = [place or len(kinds) + 1 for place in self._places]
        order = [(self._large(p), known[i], -i, p) for i, p in enumerate(parameters) if kinds[i] == _DENSE]
        buckets: list[list[int]] = []
        alike, held = None, 0
        for _, _, i, p in sorted(order):
            if alike != (p.dtype, p.device) or held + p.nbytes > self._bucket:
                buckets.append([])
                alike, held = (p.dtype, p.device), 0
            buckets[-1].append(-i)
            held += p.nbytes
        return buckets

    def _large(self, p: Tensor) -> bool:
        return p.nbytes > self._bucket * _AT_ONCE

    def _reduced(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        kinds: Sequence[int],
        begun: Sequence[tuple[list[int], _Mean]] = (),
    ) -> Gradients:
        """The means of gradients of these kinds, or None; the first buckets may have been begun."""
        result: Gradients = [None] * len(gradients)
        under_way = deque(begun)

        def finish() -> None:
            bucket, mean = under_way.popleft()
            for i, g in zip(bucket, mean(), strict=True):
                result[i] = g

        for bucket in self._buckets(kinds, parameters)[len(begun) :]:
            while len(under_way) >= _AT_ONCE:  # their buffers take memory
                finish()
            under_way.append((bucket, _averaged([_dense(gradients[i], parameters[i]) for i in bucket], self._over)))
        for i, kind in enumerate(kinds):
            if _ABSENT < kind < _DENSE:
                result[i] = _sparse_mean(gradients[i], parameters[i], kind, self._over)
        while under_way:
            finish()
        return result


def _kinds(gradients: Sequence[Tensor | None]) -> list[int]:
    return [_ABSENT if g is None else g.sparse_dim() if g.is_sparse else _DENSE for g in gradients]


def _fits(here: int, agreed: int) -> bool:
    """True if a gradient fits the agreed kind."""
    return here in (agreed, _ABSENT) or agreed == _DENSE


def _dense(g: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g


def _apart(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Another group of the same processes, for sending in a backward. Collective the first time.

    A model may have its own collectives there, as SyncBatchNorm does, and each process sends when it can: on one group
    they would be mixed up. A model without any cannot be recognised: the graph does not show hooks, or operations that
    a checkpoint repeats.
    """
    if group not in _APART:
        _APART[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=getattr(getattr(group._get_backend(device), "options", None), "_timeout", None),
            backend=dist.get_backend_config(group),
            use_local_synchronization=True,
        )
        # NCCL connects on first use, and the host waits for it: not in a backward
        dist.all_reduce(torch.zeros(1, device=device), group=_APART[group])
    return _APART[group]


def _averaged(tensors: list[Tensor], group: ProcessGroup, in_place: bool = True) -> _Mean:
    """Starts to average dense tensors of one dtype; calling the result ends it. The host waits for no accelerator.

    Not in place within a backward: autograd gives a leaf views, without a copy, of tensors that may still be needed.
    """
    size, alone = group.size(), len(tensors) == 1 and tensors[0].is_contiguous()
    if alone:
        flat = tensors[0].div_(size) if in_place else tensors[0] / size
    else:
        flat = torch.cat([_real(g).reshape(-1) for g in tensors]).div_(size)
    work = dist.all_reduce(flat, group=group, async_op=True)
    # Releases their memory unless it is written in place
    like = tensors if in_place else [torch.empty_like(g, device="meta") for g in tensors]

    def means() -> list[Tensor]:
        if work is not None:  # this process is in the group
            work.wait()
        if alone:
            return [flat]
        into = like if in_place else [torch.empty_like(g, device=flat.device) for g in like]
        real = [_real(g) for g in into]
        pieces = torch.split_with_sizes(flat, [g.numel() for g in real])
        torch._foreach_copy_(real, [x.view_as(g) for x, g in zip(pieces, real, strict=True)])
        return into

    return means


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _sparse_mean(g: Tensor | None, p: Tensor, dimensions: int, group: ProcessGroup) -> Tensor:
    if g is None:
        places = torch.zeros(dimensions, 0, dtype=torch.int64, device=p.device)
        g = torch.sparse_coo_tensor(places, p.new_zeros(0, *p.shape[dimensions:]), p.shape, check_invariants=False)
    g = (g / group.size()).coalesce()
    dist.all_reduce(g, group=group)
    return g
