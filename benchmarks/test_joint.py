"""A step with anchors and task batch in one pass, over the same step with two; and the operations that are launched.

make bench GROUP=joint
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from craft_optim import CraftOptimizer
from craft_optim.anchors import JointPass, LogitRetention, build

Compare = Callable[..., None]
Note = Callable[..., None]

VOCABULARY, LENGTH, TASK = 512, 32, 8


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that compute or copy: about the kernels that a GPU would be given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def llama(width: int) -> nn.Module:
    """Four layers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=VOCABULARY,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def batch(rows: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stepping(width: int, anchors: int, path: Path, device: torch.device, *, joint: bool) -> Callable[[], None]:
    """A training step, with a model of its own."""
    model = llama(width).to(device)
    anchored = {name: x.cpu() for name, x in batch(4 * anchors, 1, device).items()}
    cache = build(
        model, [{name: x[i : i + anchors] for name, x in anchored.items()} for i in range(0, 4 * anchors, anchors)],
        path / f"{width}-{anchors}-{joint}", progress=False,
    )  # fmt: skip
    base = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    optimizer = CraftOptimizer(base, LogitRetention(model, cache, anchors))
    forward: Callable[[dict[str, Tensor]], Any] = JointPass(optimizer).run if joint else lambda x: model(**x)
    task = batch(TASK, 0, device)
    task["labels"] = task["input_ids"]

    def step() -> None:
        optimizer.zero_grad()
        forward(task).loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    return step


@pytest.mark.benchmark(group="joint")
@pytest.mark.parametrize("anchors", [TASK, TASK // 4])
@pytest.mark.parametrize("width", [32, 128])
def test_joint_step(
    compare: Compare, note: Note, tmp_path: Path, device: torch.device, width: int, anchors: int
) -> None:
    ours, theirs = (stepping(width, anchors, tmp_path, device, joint=joint) for joint in (True, False))
    name = f"joint step, Llama of width {width}, {TASK} + {anchors} rows"
    compare(f"{name} / two passes", ours, theirs, rounds=41)
    counts = []
    for step in (ours, theirs):
        with Launches() as launches:
            step()
        counts.append(launches.count)
    note(f"{name}, operations / two passes", counts[0] / counts[1], "x")
