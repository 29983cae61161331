"""Layout: the processes that decide together, and how the parameters are spread over them. One process is one, too."""

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
        gradients: Those of all parameters.
        wanted: For each parameter, whether any process that averages it has a task gradient. Frameworks that reduce
            gradients themselves have one on all of their processes, or on none.
        here: The same of this process alone.
        rest: What is not in `gradients` yet; see `averaging`.
        told: Two flags of which the others must hear: whether this process has a rest, or another wish than all go by;
            whether it has any gradient. Empty where no other has a part in it.
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
        world_size: Their number. Smaller than `size` under tensor parallelism.
        size: Number of processes that decide together.
        first: True if this process speaks for all of them.
        several: True if there is more than this process, or a sharded tensor, to see to.
        shares: For each parameter, the weight of this process' sum over its elements; None for 1.
        reduce: Adds the sums of `surgery` up over the processes; None where there is nothing to add.
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
        """Within the block no framework reduces gradients that `averaged` sees to."""
        return nullcontext()

    def without_backward(self) -> AbstractContextManager[object]:
        """Around forwards that no backward follows, on parameters that then change."""
        return nullcontext()

    def during_backward(self, parameters: Sequence[Tensor], name: str | None = None) -> AbstractContextManager[object]:
        """Around the backward of what `averaged` gets next. Collective: it may begin there, and take gradients away."""
        return nullcontext()

    def averaged(
        self, gradients: Gradients, parameters: Sequence[Tensor], wanted: list[bool], name: str | None = None
    ) -> Averaged:
        """Averages, in place, the gradients that no hook has reduced.

        Args:
            gradients: Of a retention pass.
            parameters: All of the optimizer's.
            wanted: For each parameter, whether this process has a task gradient.
            name: The constraint's.
        """
        return Averaged(gradients, wanted)

    def added(self, averaged: Averaged, parameters: Sequence[Tensor], name: str | None = None) -> Averaged:
        """Averages what some process had more than all go by. Collective, where any has told so: see `Averaged`."""
        return averaged

    def local(self, gradients: Gradients, parameters: Sequence[Tensor]) -> Gradients:
        """The parts of the gradients on this process, as plain tensors, sharded as the parameters are."""
        return gradients

    def wrapped(self, local: Gradients, parameters: Sequence[Tensor], *whole: Gradients) -> Gradients:
        """The inverse of `local`: gradients of the parameters' own kind, those of `whole` where they are the same."""
        return local


ONE_PROCESS = Layout()


def layout_of(parameters: Sequence[Tensor], process_group: "dist.ProcessGroup | Literal[False] | None") -> Layout:
    """The layout of an optimizer's parameters, as they are when training begins. See `processes.find_layout`."""
    if not (dist.is_available() and dist.is_initialized()):
        return ONE_PROCESS
    from .processes import find_layout  # torch's distributed packages take longer to import than all of this one

    return find_layout(parameters, process_group)
