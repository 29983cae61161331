"""Variance of each channel over data that comes in parts, and the scale of squared differences."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ChannelVariance", "scales_of"]

_ROUNDING = 4.0  # units in the last place by which a constant number varies when computed
_CONSTANT = 1e-13  # share of the mean variance: float32's rounding of a channel that is the difference of such numbers


class ChannelVariance:
    """Variance over rows, for each column, in float64; 0 if it is no more than the rounding of the mean.

    Means and squared deviations of parts combine exactly (Chan et al. 1979).
    """

    def __init__(self) -> None:
        self._count, self._rounding = 0, 0.0
        self._mean = self._deviation = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Adds rows `[n, V]`, on the CPU."""
        if not len(rows):
            return
        self._rounding = max(self._rounding, _ROUNDING * torch.finfo(rows.dtype).eps)
        rows = rows.double()
        n, mean, count = len(rows), rows.mean(0), self._count
        between = (mean - self._mean).square() * (count * n / (count + n))
        self._deviation = self._deviation + (rows - mean).square().sum(0) + between
        self._mean = self._mean + (mean - self._mean) * (n / (count + n))
        self._count += n

    def result(self) -> list[float]:
        """The variance of each column over all rows so far."""
        variance = self._deviation / self._count
        variance = torch.where(variance <= (self._rounding * self._mean).square(), 0.0, variance)
        return [float(f"{x:.9g}") for x in variance.tolist()]  # the last digits depend on the number of threads


def scales_of(variances: Sequence[float]) -> Tensor:
    """Divisors of each channel's squared differences: its variance, or the mean variance for a constant channel."""
    scales = torch.tensor(variances, dtype=torch.float64)
    mean = scales.mean()
    return torch.where(scales > _CONSTANT * mean, scales, mean)
