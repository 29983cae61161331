"""Plans against real steps: what `craft_optim.plan` says that a step holds, over what torch allocates in it.

python benchmarks/planned_peaks.py   # measures, prints, and writes the table in docs/performance.md
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from markdown_table import markdown_table
from peak_memory import peak_bytes
from performance_table import PAGE, with_table
from torch import Tensor, nn

from craft_optim import CraftOptimizer, Plan, anchors, plan
from craft_optim.anchors import AnchorCache
from craft_optim.planning.make import adamw
from craft_optim.planning.passes import task_loss
from craft_optim.planning.result import Held

__all__ = ["CASES", "HELD", "Case", "planned", "real_peak"]

BEGIN = "<!-- planned peaks: written by `python benchmarks/planned_peaks.py` -->\n"
END = "<!-- end of planned peaks -->"

HELD: tuple[Held, ...] = ("base", "copy", "bfloat16")
STEPS = 2  # the first makes the optimizer's state
CLASSES = 4000


def fused(parameters: Any) -> torch.optim.Optimizer:
    """AdamW that works with nothing beside its state."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


@dataclass(frozen=True)
class Case:
    """A training whose peaks are planned and measured.

    Attributes:
        make: Makes the model, with the same weights each time.
        batch: Makes the batch of the task.
        anchor_batch: Makes that of the anchors, on which all passes are. None: the task's without labels.
        base: Makes the base optimizer.
        loss: Of the task.
        build: Of `anchors.build`, and of `plan`.
        valid: Share of positions that count.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    anchor_batch: Callable[[], Any] | None = None
    base: Callable[[Any], torch.optim.Optimizer] = fused
    loss: Callable[[nn.Module, Any], Tensor] = task_loss
    build: Mapping[str, Any] = field(default_factory=dict)
    valid: float = 1.0

    def anchors(self) -> Any:
        """The batch of anchors."""
        if self.anchor_batch is not None:
            return self.anchor_batch()
        return {name: x for name, x in self.batch().items() if name != "labels"}


def planned(case: Case, model: nn.Module | None = None) -> Plan:
    """The plan, of the case's model or of another like it."""
    settings = {"base": case.base, "loss": case.loss, "valid": case.valid, **case.build}
    return plan(case.make() if model is None else model, case.batch(), case.anchors(), **settings)


def real_peak(case: Case, folder: str | Path, held: Held) -> int:
    """Bytes at the highest point of a few steps, weights included.

    Args:
        case: The training.
        folder: For the cache; made if it is not there.
        held: A `gradient_memory`, or "base" for the base optimizer alone.
    """
    inputs = case.anchors()
    size = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    if held != "base" and not (Path(folder) / "cache.json").exists():
        anchors.build(case.make().eval(), [inputs], folder, **case.build)

    def run() -> None:
        model, batch = case.make().train(), case.batch()
        optimizer: Any = case.base(model.parameters())
        if held != "base":
            cache = AnchorCache.open(folder, case.build.get("reading"))
            retention = cache.retention(model, batch_size=size, workers=0)
            optimizer = CraftOptimizer(optimizer, retention, retention_every=1, gradient_memory=held)
        for _ in range(STEPS):
            optimizer.zero_grad()
            case.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return peak_bytes(run)


# -- the trainings -----------------------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


def llama(layers: int = 4, *, checkpointing: bool = False) -> Any:
    """A small language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=CLASSES, num_key_value_heads=2, num_hidden_layers=layers, **_SIZES)
    model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def tokens(size: int = 8, length: int = 64) -> dict[str, Tensor]:
    """A batch of a language model."""
    torch.manual_seed(1)
    ids = torch.randint(0, CLASSES, (size, length))
    return {"input_ids": ids, "labels": ids}


def vit() -> Any:
    """A small classifier of pictures."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(image_size=64, patch_size=8, num_labels=10, num_hidden_layers=4, **_SIZES)
    return ViTForImageClassification(config)


def pictures() -> dict[str, Tensor]:
    """A batch of it."""
    torch.manual_seed(1)
    return {"pixel_values": torch.rand(16, 3, 64, 64), "labels": torch.randint(0, 10, (16,))}


def convolutions() -> nn.Module:
    """A network of no library."""
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(4)))
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), body, nn.Flatten(), nn.Linear(32 * 16 * 16, 64))


def examples() -> dict[str, Tensor]:
    """A batch of it, and what it shall say."""
    torch.manual_seed(1)
    return {"x": torch.rand(4, 3, 16, 16), "y": torch.rand(4, 64)}


def _squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = (model(batch["x"]) - batch["y"]).square().mean()
    return loss


def small_pi0_fast() -> Case:
    """The demo's policy on frames of its own; needs lerobot and examples/ on the path."""
    from metaworld_pi0_fast import ASSETS, OLD_TASK
    from metaworld_pi0_fast.batches import PreparedFrames
    from metaworld_pi0_fast.demonstrations import load_frames
    from metaworld_pi0_fast.policy import load_policy, make_processors

    from craft_optim.lerobot import adapter_for
    from craft_optim.lerobot.pi0_fast import action_mask

    policy = load_policy(ASSETS / "pretrained")
    frames = load_frames(ASSETS / "demonstrations" / OLD_TASK, policy.config.chunk_size, episodes=[0, 1])
    prepared = PreparedFrames(frames, make_processors(policy, path=ASSETS / "pretrained")[0], heldout_episodes=1)
    adapter, batch = adapter_for(policy), prepared.train_batch(torch.arange(8))
    return Case(
        make=lambda: load_policy(ASSETS / "pretrained"),
        batch=lambda: batch,
        anchor_batch=lambda: adapter.inputs(batch),
        loss=lambda model, given: model(given)[0],
        build={"reading": adapter.reading, "output": "classes"},
        valid=float(action_mask(batch).float().mean()),
    )


CASES: dict[str, Callable[[], Case]] = {
    "Llama, 4,000 classes": lambda: Case(llama, tokens),
    "Llama, checkpointed, top-32": lambda: Case(lambda: llama(8, checkpointing=True), tokens, build={"top_k": 32}),
    "Llama, hidden states of two layers": lambda: Case(llama, tokens, build={"layers": (2, 4), "output": None}),
    "Llama, two sentences of 8 tokens, AdamW over lists": lambda: Case(llama, lambda: tokens(2, 8), base=adamw),
    "ViT": lambda: Case(vit, pictures),
    "convolutions, 4 examples and 32 anchors": lambda: Case(
        convolutions, examples, lambda: torch.rand(32, 3, 16, 16), loss=_squares, build={"class_dim": -1}
    ),
    "small pi0_fast": small_pi0_fast,
}


def main() -> None:
    """Measures all, and writes the table."""
    rows = []
    for name, made in CASES.items():
        case = made()
        found = planned(case)
        with tempfile.TemporaryDirectory() as folder:
            shares = [(found.peak(held) or 0) / real_peak(case, f"{folder}/cache", held) for held in HELD]
        rows.append([name, *(f"{share:.3f}" for share in shares)])
        print(*rows[-1], flush=True)
    table = markdown_table(["planned over measured, on a CPU", "AdamW alone", '"copy"', '"bfloat16"'], rows)
    PAGE.write_text(with_table(PAGE.read_text("utf-8"), table, BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    main()
