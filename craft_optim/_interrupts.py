"""Ctrl-C waits for the end of a step: a step cut in two would leave modes, gradients or weights half changed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts_wait"]


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Delays the first SIGINT to the end of the block, if Python handles it, but not a second one.

    So a step that hangs can be stopped. Cost: ten microseconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []

    def wait(number: int, frame: Any) -> None:
        if waiting:
            waiting.clear()
            handler(number, frame)
        else:
            waiting.append(frame)

    handler: Any = signal.getsignal(signal.SIGINT)
    if callable(handler):
        signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        # Unless what ran in the block has set another
        if callable(handler) and signal.getsignal(signal.SIGINT) is wait:
            signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(signal.SIGINT, waiting.pop())
