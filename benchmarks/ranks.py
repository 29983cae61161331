"""Several gloo processes on this machine that do training steps when they are told to, together or one alone."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from craft_optim import CraftOptimizer

__all__ = ["Ranks"]

WIDTH, DEPTH, BATCH = 1024, 4, 256


class Ranks:
    """A context in which `step(name, together)` does one training step on data of its own per process.

    A step is forward, backward and optimizer on 4 million parameters. Together the processes train one model under
    DDP; alone the first one trains the same model without, and the others wait.

    Args:
        count: How many processes, of one thread each.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> "Ranks":
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._processes, self._pipes = [], []
        for rank in range(self._count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._count, store, there), daemon=True)
            process.start()
            there.close()  # so that a process that dies ends `recv`
            self._processes.append(process)
            self._pipes.append(here)
        return self

    def step(self, name: str, together: bool) -> None:
        """Returns when all processes that take part have done it.

        Args:
            name: "AdamW" or "CRaFT".
            together: All processes, or the first alone.

        Raises:
            EOFError: A process died; its traceback is on stderr.
        """
        pipes = self._pipes if together else self._pipes[:1]
        for pipe in pipes:
            pipe.send((name, together))
        for pipe in pipes:
            pipe.recv()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, count),  # type: ignore[attr-defined]
        rank=rank,
        world_size=count,
    )
    steps: dict[tuple[str, bool], Callable[[], Any]] = {}
    try:
        while True:
            what = pipe.recv()
            if what not in steps:
                steps[what] = _training(*what)
            steps[what]()
            pipe.send(None)
    except EOFError:  # we are no longer needed
        pass
    finally:
        dist.destroy_process_group()


def _training(name: str, together: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    inputs, anchors = torch.randn(2, BATCH, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.no_grad():
        answers = model(anchors)
    if together:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if name == "CRaFT":

        def drift() -> Tensor:
            return nn.functional.mse_loss(model(anchors), answers)

        optimizer = CraftOptimizer(optimizer, drift, epsilon=1e-3, process_group=None if together else False)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    step()  # at the start there is no drift, and the retention gradient is zero
    return step
