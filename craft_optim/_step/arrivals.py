"""Arrivals: order of the parameters' gradients in a backward."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from threading import Lock

import torch
from torch import Tensor

__all__ = ["Arrivals"]


class Arrivals:
    """Order and counts of the gradients of the same parameters in a backward, pass after pass.

    Attributes:
        places: Place of each parameter in the last pass, 1 for the first; 0 if none came. Empty before the first pass.
    """

    def __init__(self) -> None:
        self.places: list[int] = []
        self._times: list[int] = []

    @contextmanager
    def watched(
        self, parameters: Sequence[Tensor], buckets: Sequence[list[int]], send: Callable[[list[int]], None]
    ) -> Iterator[None]:
        """Sends buckets one after another within a backward, each as soon as all of its gradients are complete.

        A parameter that reentrant checkpoints share gets its gradient in parts: it is complete after as many parts as
        ever came. Later parts are in `.grad`, and the sender must handle them.

        Args:
            parameters: The parameters, plain tensors.
            buckets: Places of parameters, in sending order.
            send: Function called within the backward.
        """
        times = self._times or [0] * len(parameters)
        came, places, number = [0] * len(parameters), [0] * len(parameters), count(1)
        waiting, there = deque(buckets), set[int]()
        streams, lock = {_stream(p) for p in parameters}, Lock()  # each device has its own thread in a backward

        def arrived(i: int, p: Tensor) -> None:
            with lock:
                came[i] += 1
                places[i] = next(number)
                if came[i] == times[i]:
                    there.add(i)
                if len(streams | {_stream(p)}) > 1:  # a bucket is sent from one, and would not wait for others
                    waiting.clear()
                while waiting and there.issuperset(waiting[0]):
                    send(waiting.popleft())

        with ExitStack() as hooks:
            for i, p in enumerate(parameters):
                if p.requires_grad:
                    handle = p.register_post_accumulate_grad_hook(partial(arrived, i))  # type: ignore[no-untyped-call]
                    hooks.callback(handle.remove)
            yield
        self.places, self._times = places, list(map(max, came, times))


def _stream(tensor: Tensor) -> object:
    """Current stream of the tensor's device; None for a CPU, which has none."""
    return None if tensor.is_cpu else torch.accelerator.current_stream(tensor.device)
