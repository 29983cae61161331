"""Freed memory stays with the process: what a function allocates anew on every call costs no page faults."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["kept_memory"]

# Of glibc's malloc.h, and what they are, or have become, in a process that has once freed a tensor of 32 MB
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65_536}


@contextmanager
def kept_memory() -> Iterator[bool]:
    """Within it glibc hands out again what was freed, like the caching allocator of a GPU.

    By default every large tensor on a CPU is new memory, whose first touch costs more than the arithmetic, and
    differently on every machine.

    Yields:
        Whether that is so: not with another libc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield False
        return
    try:
        yield bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(_MMAP_MAX, 0))
    finally:
        for option, value in _USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
