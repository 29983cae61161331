"""Averaging: the mean over processes of the retention gradients that nobody else averages.

Which gradients there are on any process says which collectives all of them must make. To ask that first would be a wait
for the device on each pass. So everyone goes by what was agreed on last, and tells along with the inner products, which
are read anyway, whether that was right here. Where it was not, what has been left over is averaged after that read.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .gradients import Gradients

__all__ = ["Averaging", "Means"]

# Bytes that are copied into one buffer and averaged by one collective, and how many of these are on their way at once.
_BUCKET, _AT_ONCE = 1 << 25, 8

# Kinds of gradients; between these two, sparse ones by their number of sparse dimensions.
_ABSENT, _DENSE = 0, 99


class Means(NamedTuple):
    """What `Averaging` returns.

    Attributes:
        gradients: The means, None where no process has ever had a gradient. They are right if nobody has more to add.
        wanted: For each, whether any process wants it.
        rest: The gradients of this process that are not in the means.
        more: True if this process has more to add: a rest, or other wishes than it told.
    """

    gradients: Gradients
    wanted: list[bool]
    rest: Sequence[Tensor | None]
    more: bool


class Averaging:
    """The averaging of the same parameters' gradients, pass after pass.

    A gradient that is None here but not elsewhere counts as zero; and so does one that is None everywhere, if it was
    not on an earlier pass. One collective per 32 MiB of gradients, which are copied into one buffer, and one per sparse
    gradient; none waits for another. The first time one more, which is read, for all to agree on what there is.

    Args:
        group: The processes.
        parameters: Places of the parameters among all of the optimizer's.
    """

    def __init__(self, group: ProcessGroup, parameters: Sequence[int] = ()) -> None:
        self.parameters = parameters
        self._group = group
        self._kinds: list[int] | None = None
        self._wanted: list[bool] = []  # on any process
        self._told: list[bool] = []  # of which this one told

    @torch.no_grad()
    def means(self, gradients: Gradients, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> Means:
        """The means of gradients, by what was agreed on last. Collective.

        Args:
            gradients: Dense or sparse, of any floating or complex dtype; dense ones are overwritten.
            parameters: Plain tensors of the same shapes.
            wanted: For each gradient, whether this process has a use for it.
        """
        wanted = list(wanted)
        here = _kinds(gradients)
        if self._kinds is None:
            self._kinds = self._agreed(here, wanted, parameters)
        rest: Gradients = []
        if here != self._kinds:
            fits = [_fits(mine, agreed) for mine, agreed in zip(here, self._kinds, strict=True)]
            rest = [None if fit else g for g, fit in zip(gradients, fits, strict=True)]
            gradients = [g if fit else None for g, fit in zip(gradients, fits, strict=True)]
        found = self._reduced(gradients, parameters, self._kinds)
        more = wanted != self._told or any(g is not None for g in rest)
        return Means(found, list(self._wanted), rest, more)

    @torch.no_grad()
    def added(
        self, rest: Sequence[Tensor | None], parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[Gradients, list[bool]]:
        """The means of what was left over, and what any process wants, which is agreed on from now on. Collective.

        Args:
            rest: See `Means`; may be empty.
            parameters: As for `means`.
            wanted: As for `means`.
        """
        rest = list(rest) or [None] * len(parameters)
        kinds = self._agreed(_kinds(rest), wanted, parameters)
        self._kinds = list(map(max, kinds, self._kinds or kinds))
        return self._reduced(rest, parameters, kinds), list(self._wanted)

    def _agreed(self, kinds: Sequence[int], wanted: Sequence[bool], parameters: Sequence[Tensor]) -> list[int]:
        """The kinds that there are on any process, and all hear of what is wanted. Reads the device."""
        self._told = self._wanted = list(wanted)
        if not kinds:
            return []
        told = torch.tensor([kinds, self._told], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        anywhere, flags = told.tolist()
        self._wanted = [bool(flag) for flag in flags]
        return list(anywhere)

    def _reduced(
        self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], kinds: Sequence[int]
    ) -> Gradients:
        """The means of gradients of these kinds, or None."""
        size = self._group.size()
        result: Gradients = []
        bucket: list[Tensor] = []
        held = 0
        under_way: deque[Callable[[], None]] = deque()

        def send() -> None:
            if len(under_way) == _AT_ONCE:  # their buffers are memory, too
                under_way.popleft()()
            if bucket:
                under_way.append(_averaged(bucket[:], size, self._group))
            bucket.clear()

        for g, p, kind in zip(gradients, parameters, kinds, strict=True):
            if kind == _ABSENT:
                result.append(None)
            elif kind < _DENSE:
                result.append(_sparse_mean(g, p, kind, size, self._group))
            else:
                g = torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
                if bucket and ((bucket[0].dtype, bucket[0].device) != (g.dtype, g.device) or held + g.nbytes > _BUCKET):
                    send()
                    held = 0
                bucket.append(g)
                held += g.nbytes
                result.append(g)
        send()
        for finish in under_way:
            finish()
        return result


def _kinds(gradients: Sequence[Tensor | None]) -> list[int]:
    return [_ABSENT if g is None else g.sparse_dim() if g.is_sparse else _DENSE for g in gradients]


def _fits(here: int, agreed: int) -> bool:
    """True if a gradient can go by what was agreed on."""
    return here in (agreed, _ABSENT) or agreed == _DENSE


def _averaged(tensors: list[Tensor], size: int, group: ProcessGroup) -> Callable[[], None]:
    """Begins to average dense tensors of one dtype, in place; the function that is returned ends it.

    On an accelerator the host waits in neither.
    """
    if len(tensors) == 1 and tensors[0].is_contiguous():
        work = dist.all_reduce(tensors[0].div_(size), group=group, async_op=True)
        return lambda: _wait(work)
    real = [torch.view_as_real(g) if g.is_complex() else g for g in tensors]
    flat = torch.cat([g.reshape(-1) for g in real]).div_(size)
    work = dist.all_reduce(flat, group=group, async_op=True)

    def finish() -> None:
        _wait(work)
        pieces = torch.split_with_sizes(flat, [g.numel() for g in real])
        torch._foreach_copy_(real, [x.view_as(g) for x, g in zip(pieces, real, strict=True)])

    return finish


def _wait(work: "dist.Work | None") -> None:
    if work is not None:  # this process is in the group
        work.wait()


def _sparse_mean(g: Tensor | None, p: Tensor, dimensions: int, size: int, group: ProcessGroup) -> Tensor:
    if g is None:
        places = torch.zeros(dimensions, 0, dtype=torch.int64, device=p.device)
        g = torch.sparse_coo_tensor(places, p.new_zeros(0, *p.shape[dimensions:]), p.shape, check_invariants=False)
    g = (g / size).coalesce()
    dist.all_reduce(g, group=group)
    return g
