"""The most memory that a function holds at a time, to the byte."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that torch has allocated for tensors at the highest point of `run()`, over those at its beginning.

    On a CPU the profiler tells of every allocation of this thread, also of those inside an operation. It does not know
    the size of what was there before: free nothing old in `run`, build there what it works on.

    Args:
        run: Called once.
        device: "cpu" or a CUDA device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return _highest(size for _, size in sorted(sizes, key=lambda pair: pair[0]))


def _highest(changes: Iterable[int]) -> int:
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak
