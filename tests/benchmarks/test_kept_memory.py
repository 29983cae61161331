import pytest
import torch
from kept_memory import kept_memory

resource = pytest.importorskip("resource")

PAGES_PER_MB = (1 << 20) // resource.getpagesize()


def faults(megabytes):
    """Page faults of writing so much, after as much was allocated, written and freed."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_within_it_only():
    with kept_memory() as kept:
        if not kept:
            pytest.skip("needs glibc")
        within = min(faults(64) for _ in range(8))  # the first ones find no piece that fits
    assert within < 0.05 * 64 * PAGES_PER_MB
    # More than may lie there in pieces
    assert faults(512) > 0.9 * 512 * PAGES_PER_MB
