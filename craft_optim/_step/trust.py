"""Trust region of a step: no farther than where drift would be a multiple of epsilon.

Retention has no gradient at the snapshot, and an optimizer like Adam steps as far as its rate allows, whatever the
gradient: no weight of the retention gradient holds the first steps of a run. A bound on the step does. Let L(a) be
L_ret of the next pass's anchors at theta + a (theta' - theta), theta' the base's result, and d the average of L_ret, or
L(0) if that is larger:

    v = sqrt(L(1)) - sqrt(L(0))                      drift's root is a distance of outputs, about linear along a step
    a = 1 - (sqrt(d) + v - sqrt(trust epsilon)) / v  within [1/64, 1], where v > 0 and that is below 1

as in the line search of a trust region on KL (Schulman et al. 2015, arXiv:1502.05477), by two forwards.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LEAST", "KeptValues", "share_of_step"]

LEAST = 1.0 / 64.0
"""Smallest share of a step to keep, so that a base without momentum does not stand still."""


def share_of_step(before: float, after: float, drift: float, bound: float, measured: float = 0.0) -> float:
    """Computes a, the share of the step to keep.

    Args:
        before: L_ret before the step, L(0), on anchors without a gradient in this step.
        after: The same after the step, L(1).
        drift: The average of L_ret.
        bound: Largest allowed L_ret.
        measured: L_ret after the step, if known better than from d and the growth.
    """
    if not (math.isfinite(after) and math.isfinite(measured)):
        return LEAST
    growth = root(after) - root(before)
    beyond = max(root(drift) + growth, root(measured)) - root(bound)
    if growth <= 0.0 or beyond <= 0.0:
        return 1.0
    return min(max(1.0 - beyond / growth, LEAST), 1.0)


def root(loss: float) -> float:
    """sqrt(max(loss, 0)): an estimate of a divergence may be below 0."""
    return math.sqrt(max(loss, 0.0))


class KeptValues:
    """One copy of the parameters' values before a step.

    Args:
        tensors: Local parts of the parameters that the base will move, plain tensors.
        host: True to copy them to host memory.
    """

    def __init__(self, tensors: Sequence[Tensor], *, host: bool = False) -> None:
        self._tensors = list(tensors)
        # On a GPU one kernel for all, or copies without a wait of the host
        self._values = [
            torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) if host else torch.empty_like(x) for x in tensors
        ]
        if self._tensors:
            torch._foreach_copy_(self._values, self._tensors, non_blocking=True)

    @torch.no_grad()
    def go_back(self, share: float) -> None:
        """Keeps that share of the step, in place: running out of memory half-way would leave a part moved."""
        for now, before in zip(self._tensors, self._values, strict=True):
            now.lerp_(before.to(now.device, non_blocking=True), 1.0 - share)
