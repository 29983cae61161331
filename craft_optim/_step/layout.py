"""Layout: the processes that decide together, and how parameters are spread over them; also for one process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .gradients import Gradients

__all__ = ["ONE_PROCESS", "Layout", "layout_of"]


class Averaged(NamedTuple):
    """Retention gradients, averaged over processes.

    Attributes:
        gradients: Gradients of all parameters.
        wanted: For each parameter, True if any process that averages it has a task gradient. Frameworks that reduce
            gradients themselves have one on all of their processes, or on none.
        here: The same for this process alone.
        rest: Parts that are not in `gradients` yet; see `averaging`.
        told: Two flags to send to the others: True if this process has a rest or a wish beyond the agreed ones, and
            True if it has any gradient. Empty if no other takes part.
    """

    gradients: Gradients
    wanted: list[bool]
    here: Sequence[bool] = ()
    rest: Sequence[Tensor | None] = ()
    told: tuple[float, ...] = ()


class Layout:
    """One process with plain tensors; `processes.Processes` is the layout of several.

    Attributes:
        rank: Place of this process among those that see different data.
        world_size: Number of these processes. Smaller than `size` under tensor parallelism.
        size: Number of processes that decide together.
        first: True if this process reports for all of them.
        several: True if there are several processes, or sharded tensors.
        shares: For each parameter, the weight of this process' sum over its elements; None for 1.
        reduce: Function that adds up the sums of `surgery` over the processes; None if there is nothing to add.
    """

    rank: int = 0
    world_size: int = 1
    several: bool = False
    shares: Sequence[float] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None

    @property
    def size(self) -> int:
        return 1

    @property
    def first(self) -> bool:
        return True

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        return tensor

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag, True if it is set on any process."""
        return list(flags)

    def elements(self, parameters: Sequence[Tensor]) -> list[int]:
        """Number of elements of each parameter, over all processes."""
        return [p.numel() for p in parameters]

    def own_reduction(self) -> AbstractContextManager[object]:
        """Stops frameworks within the block from reducing gradients that `averaged` reduces."""
        return nullcontext()

    def without_backward(self) -> AbstractContextManager[object]:
        """Context of forwards without a backward, on parameters that then change."""
        return nullcontext()

    def during_backward(self, parameters: Sequence[Tensor], name: str | None = None) -> AbstractContextManager[object]:
        """Context of the backward before `averaged`, which may start in it and take gradients. Collective."""
        return nullcontext()

    def averaged(
        self, gradients: Gradients, parameters: Sequence[Tensor], wanted: list[bool], name: str | None = None
    ) -> Averaged:
        """Averages, in place, the gradients that no hook has reduced.

        Args:
            gradients: Gradients of a retention pass.
            parameters: All parameters of the optimizer.
            wanted: For each parameter, True if this process has a task gradient.
            name: Name of the constraint.
        """
        return Averaged(gradients, wanted)

    def added(self, averaged: Averaged, parameters: Sequence[Tensor], name: str | None = None) -> Averaged:
        """Averages gradients beyond the agreed ones. Collective, if any process has reported some: see `Averaged`."""
        return averaged

    def local(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        """The gradients' parts on this process, as plain tensors, sharded as the parameters are."""
        return gradients

    def wrapped(self, local: Gradients, parameters: Sequence[Tensor], *whole: Gradients) -> Gradients:
        """The inverse of `local`: gradients of the parameters' own kind, from `whole` where they are the same."""
        return local


ONE_PROCESS = Layout()


def layout_of(parameters: Sequence[Tensor], process_group: "dist.ProcessGroup | Literal[False] | None") -> Layout:
    """The layout of an optimizer's parameters, as they are when training begins. See `processes.find_layout`."""
    if not (dist.is_available() and dist.is_initialized()):
        return ONE_PROCESS
    from .processes import find_layout  # torch's distributed packages import slower than all of this one

    return find_layout(parameters, process_group)
