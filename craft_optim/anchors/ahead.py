"""Reading ahead: the next batches of anchors are read from disk and copied to the device while the task step runs."""

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Ahead", "to_device_ahead", "wait_for"]

T = TypeVar("T")


class Ahead(Generic[T]):
    """Values of a function of a number, computed before they are requested.

    Each of `workers` threads computes, or has computed, one of the next numbers. After a jump, or with two callers at
    different numbers, values read ahead are discarded; the value is always that of the number. An exception is raised
    when its number is requested, and a number that failed is tried again.

    Args:
        function: Function number -> value; called from other threads.
        workers: Number of threads, >= 1.
    """

    def __init__(self, function: Callable[[int], T], workers: int) -> None:
        self._function, self.workers = function, workers
        self._threads: ThreadPoolExecutor | None = None
        self._pending: dict[int, Future[T]] = {}
        self._process = os.getpid()

    def get(self, number: int) -> T:
        """The value of a number; starts the next ones."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._threads, self._pending, self._process = None, {}, os.getpid()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.workers, "craft_optim-anchors")
            weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)
        wanted = range(number, number + self.workers + 1)
        for old in [p for p in self._pending if p not in wanted]:
            self._pending.pop(old).cancel()
        for p in wanted:
            if p not in self._pending:
                self._pending[p] = self._threads.submit(self._function, p)
        return self._pending.pop(number).result()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None, "_pending": {}}  # threads are neither pickled nor copied


def to_device_ahead(tensors: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Copies on their own stream where the device has streams, and the event to `wait_for`, else None."""
    if device.type != "cuda":
        return {key: x.to(device, non_blocking=True) for key, x in tensors.items()}, None
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            copies = {key: x.to(device, non_blocking=True) for key, x in tensors.items()}
            event = stream.record_event()
    return copies, event


def wait_for(tensors: dict[str, Tensor], event: Any) -> None:
    """Makes the current stream, not the host, wait for the copies."""
    for x in tensors.values():
        if x.is_cuda:
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(event)
            x.record_stream(stream)
