"""Evaluations: settings of bases' groups, and bases that evaluate a closure after moving the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .step import RetentionStep

__all__ = [
    "Evaluations",
    "ascended",
    "check_base",
    "may_move",
    "stands_still",
    "values_back_after_errors",
    "without_gradients",
]


def check_base(base: torch.optim.Optimizer) -> None:
    """Raises ValueError if a group needs more than the values of its gradients."""
    for number, group in enumerate(base.param_groups):
        if group.get("differentiable"):
            raise ValueError(
                "`base_optimizer` must have differentiable=False: merged gradients have no graph. Found "
                f"differentiable=True in group {number}: leave it out, or `retention_closure`."
            )


def ascended(base: torch.optim.Optimizer) -> list[bool]:
    """For each parameter, True if the base steps along its gradient, not against it."""
    everywhere = getattr(base, "maximize", False)  # optimizers other than torch's keep it there
    found: list[bool] = []
    for group in base.param_groups:
        found += [bool(group.get("maximize", everywhere))] * len(group["params"])
    return found


def may_move(base: torch.optim.Optimizer) -> bool:
    """True unless the base is known to evaluate its closure first."""
    kind = type(base)
    return isinstance(base, torch.optim.LBFGS) or not kind.__module__.startswith("torch.optim.")


def stands_still(base: torch.optim.Optimizer) -> bool:
    """True if every learning rate is zero."""
    for group in base.param_groups:
        rate = group.get("lr")
        # One on an accelerator is not read, which would wait on every step
        if (isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0:
            return False
    return True


def without_gradients(parameters: Iterable[Tensor]) -> bool:
    """True if there is nothing to step on. Usually the first parameter shows it: most steps must cost nothing."""
    some = False
    for p in parameters:
        # FSDP1 may leave a process nothing but parameters without elements: it follows the others' step.
        if p.numel() > 0:
            if p.grad is not None:
                return False
            some = True
    return some


class Evaluations:
    """A closure with retention merged after each of its calls, for a base to evaluate.

    Its values are those of the merged objective, a L_task + sum_j w_j L_j, whose gradient the base has: a line search
    compares them.

    Args:
        closure: The user's closure. Its result is unchanged unless it is one number.
        parameters: All parameters of the optimizer.
        retention: The retention step.

    Attributes:
        moved: True if the base has moved a parameter before an evaluation.
    """

    def __init__(self, closure: Callable[[], Any], parameters: Sequence[Tensor], retention: RetentionStep) -> None:
        self.moved = False
        self._closure, self._parameters, self._retention = closure, parameters, retention
        self._versions = [p._version for p in parameters]
        self._seen: list[tuple[Any, Any]] = []

    def __call__(self) -> Any:
        self.moved = self.moved or self._versions != [p._version for p in self._parameters]
        with torch.enable_grad():
            loss = self._closure()
        value = loss
        if not without_gradients(self._parameters):
            task, retention = self._retention.merge()
            if isinstance(loss, Tensor) and loss.numel() == 1:
                value = loss.detach() * task + retention
            elif isinstance(loss, Real) and not isinstance(loss, bool):
                value = float(loss) * task + retention
        self._seen.append((value, loss))
        self._versions = [p._version for p in self._parameters]
        return value

    def loss(self, result: Any) -> Any:
        """The base's result, or the task's loss if the result is the value of an evaluation."""
        for value, loss in self._seen:
            if value is result:
                return loss
            if (
                isinstance(result, float)
                and isinstance(value, Tensor)
                and value.numel() == 1
                and float(value) == result
            ):
                return float(loss)  # some bases return `float(closure())`
        return result


@contextmanager
def values_back_after_errors(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Restores the parameters' values after an exception in the block. Costs one copy of them."""
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)
        raise
