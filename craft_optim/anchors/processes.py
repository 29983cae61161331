"""Team: the processes that build a cache together, and their messages."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from .names import class_names

__all__ = ["Team", "find_team"]

_PATIENCE = 20.0  # seconds before a process logs what it is waiting for
_log = logging.getLogger("craft_optim")


class Team:
    """Processes that build one cache.

    Attributes:
        rank: Place of this process among those that see different batches.
        world_size: Number of these processes.
        writes: True if this process writes. One of the processes that hold parts of the same layers (tensor
            parallelism) does.
        sharded: True if a forward needs all processes, as under FSDP: each must run as many.
    """

    def __init__(
        self, group: Any, rank: int = 0, world_size: int = 1, *, writes: bool = True, sharded: bool = False
    ) -> None:
        self.rank, self.world_size, self.writes, self.sharded = rank, world_size, writes, sharded
        self._group = group

    @property
    def several(self) -> bool:
        """True if there are other processes."""
        return self._group is not None

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank in the group. Logs a line if the others do not come."""
        if self._group is None:
            return [value]
        with _said_if_late():
            values: list[Any] = [None] * self._group.size()
            dist.all_gather_object(values, value, group=self._group)
        return values

    def anyone(self, flag: bool) -> bool:
        """True if the flag is set on any process. Each process must ask as often as the others."""
        return any(self.gather(flag))


@contextmanager
def _said_if_late() -> Iterator[None]:
    timer = threading.Timer(
        _PATIENCE,
        lambda: _log.warning(
            "build has been waiting for %d s for the other processes of torch.distributed to call it too. If only this "
            "one is to build the anchors, pass process_group=False.",
            _PATIENCE,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def find_team(model: nn.Module, process_group: dist.ProcessGroup | Literal[False] | None) -> Team:
    """The processes that call `build` now.

    Args:
        model: The teacher, as it is spread over the processes.
        process_group: Group of the processes. None: all of torch.distributed, if it is initialised. False: this one
            alone.
    """
    if process_group is False or not (dist.is_available() and dist.is_initialized()):
        return Team(None)
    group: Any = process_group or dist.group.WORLD
    if group.size() == 1:
        return Team(None)
    from craft_optim._step.processes import find_layout

    spread = [p for p in model.parameters() if hasattr(p, "device_mesh")]
    fsdp1 = "FullyShardedDataParallel" in class_names(model)
    if not spread and not fsdp1:
        return Team(group, group.rank(), group.size())
    layout = find_layout(list(model.parameters()) if fsdp1 else spread, None)
    ranks = Team(group).gather(layout.rank)
    writes = ranks.index(layout.rank) == group.rank()
    return Team(group, layout.rank, layout.world_size, writes=writes, sharded=True)
