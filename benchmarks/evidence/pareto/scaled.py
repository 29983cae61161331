"""One strength under other scales of the task loss and other learning rates: which runs that takes."""

from collections.abc import Sequence
from itertools import product

from .training import Job

__all__ = ["RATES", "SCALES", "UNTUNED", "references", "scaled"]

SCALES, RATES = (0.1, 1.0, 10.0), (0.3, 1.0, 3.0)
# CraftOptimizer's default epsilon and the plain sum: the middle of both sweeps.
UNTUNED = (("craft", 0.05), ("fixed", 1.0))


def scaled(setting: str, method: str, strength: float, seeds: Sequence[int]) -> list[Job]:
    """One strength under all scales and learning rates."""
    return [Job(setting, method, strength, *rest) for rest in product(seeds, SCALES, RATES)]


def references(setting: str, seeds: Sequence[int]) -> list[Job]:
    """Plain fine-tuning at all learning rates: what the others are rated against."""
    return [Job(setting, "plain", 0.0, seed, lr=rate) for seed, rate in product(seeds, RATES)]
