"""What a training step holds at its peak, over the step of the base alone, in copies of the gradients.

make bench GROUP=memory
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_copies import Stepper, copies_over_base
from peers import published_step

from craft_optim import CraftOptimizer

Note = Callable[..., None]

# Keywords of CraftOptimizer, by the name in the report
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"gradient_memory": "bfloat16"},
    "host": {"gradient_memory": "host"},
}


def with_craft(**settings: Any) -> Stepper:
    return lambda base, retention: CraftOptimizer(base, retention, epsilon=1e-3, **settings).step


@pytest.mark.benchmark(group="memory")
@pytest.mark.parametrize("mode", MODES)
def test_craft(benchmark: Any, note: Note, device: torch.device, mode: str) -> None:
    if mode == "host" and device.type == "cpu":
        pytest.skip("needs memory beside the host's: a GPU")
    stepper = with_craft(**MODES[mode])
    note(f"memory, {mode}", benchmark.pedantic(copies_over_base, args=(stepper, device)), "copies")


@pytest.mark.benchmark(group="memory")
def test_published_loop(benchmark: Any, note: Note, device: torch.device) -> None:
    copies = benchmark.pedantic(
        copies_over_base, args=(lambda base, retention: lambda: published_step(base, retention), device)
    )
    note("memory, published loop", copies, "copies")
