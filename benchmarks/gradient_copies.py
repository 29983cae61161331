"""A short training that beyond weights and optimizer state holds copies of the gradients, and how many those are."""

from collections.abc import Callable
from typing import Any

import torch
from peak_memory import peak_bytes
from shapes import elements
from torch import Tensor, nn

__all__ = ["Stepper", "base_alone", "copies_over_base"]

WIDTH, DEPTH, BATCH = 1024, 8, 4
STEPS = 3

# Gets the base optimizer and a retention closure; returns what does a step on the task gradients in `.grad`.
Stepper = Callable[[torch.optim.Optimizer, Callable[[], Tensor]], Callable[[], Any]]


def copies_over_base(stepper: Stepper, device: torch.device | str = "cpu") -> float:
    """What a training holds at its peak beyond the base's, in copies of the gradients.

    Activations are next to nothing, and the base is fused: no copies of its own hide those of the step. Retention
    gradients conflict with the task's.

    Args:
        stepper: Makes the step.
        device: Where.
    """
    gradients = 4 * elements(list(_model("meta").parameters()))
    return (_peak(stepper, device) - _peak(base_alone, device)) / gradients


def base_alone(base: torch.optim.Optimizer, retention: Callable[[], Tensor]) -> Callable[[], Any]:
    """The step of the base, without retention."""
    del retention
    return base.step


def _model(device: torch.device | str) -> nn.Sequential:
    """8.4 million parameters: a copy of the gradients is 34 MB, a batch of activations a thousandth of that a layer."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(DEPTH)))


def _peak(stepper: Stepper, device: torch.device | str) -> int:
    def run() -> None:
        model = _model(device)
        inputs = torch.randn(BATCH, WIDTH, device=device)
        base = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def retention() -> Tensor:
            loss: Tensor = (1.0 - model(inputs)).square().sum()
            return loss

        step = stepper(base, retention)
        for _ in range(STEPS):
            base.zero_grad()
            (1.0 + model(inputs)).square().sum().backward()
            step()

    run()  # makes what is made once: compiled code, workspaces
    return peak_bytes(run, device)
