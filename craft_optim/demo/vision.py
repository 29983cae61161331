"""A classifier that knows the handwritten digits 0 to 4 learns 5 to 9: what does it still know? Seconds on a CPU."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from craft_optim import CraftOptimizer, anchors
from craft_optim.metrics import JSONLWriter

__all__ = ["Outcome", "main"]

OLD, NEW = range(5), range(5, 10)
TEST = 600  # of 1,797 pictures, drawn at random
ANCHORS = 256
BATCH = 32


@dataclass
class Outcome:
    """One line of the table.

    Attributes:
        old, new: Shares of test pictures that are classified right, for the digits 0 to 4 and 5 to 9.
        drift: Drift on the anchors, nats.
        held_out: Drift on test pictures of the old digits, which are no anchors.
    """

    name: str
    old: float
    new: float
    drift: float
    held_out: float


def main(out: Path, epsilon: float = 0.05, steps: int = 300) -> list[Outcome]:
    """Trains, fine-tunes twice, prints a table and returns it.

    Args:
        out: Folder of the anchors and of the constrained run's log, for `craft-optim report`; what is there of an
            earlier run is replaced.
        epsilon: Drift to allow, nats.
        steps: Number of steps of fine-tuning.
    """
    torch.manual_seed(0)
    pictures, labels = digits()
    old, new = (torch.isin(labels, torch.tensor(list(some))) for some in (OLD, NEW))
    train = torch.randperm(len(labels)) >= TEST

    base = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)
    )
    print("The classifier learns the digits 0 to 4 ...")
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    for step in range(400):
        fit(base, optimizer, pictures[train & old], labels[train & old], step)

    # What it says now about examples of what it must keep; others, to see whether that carries over
    known = pictures[train & old][:ANCHORS]
    cache = anchors.build(base, torch.split(known, 64), out / "anchors", class_dim=-1, overwrite=True)
    held_out = anchors.build(
        base, torch.split(pictures[~train & old], 64), out / "held-out", class_dim=-1, overwrite=True
    )

    outcomes = list[Outcome]()

    def measure(name: str, model: nn.Module) -> None:
        with torch.no_grad():
            right = (model(pictures).argmax(-1) == labels).float()
        kept, learned = (float(right[~train & some].mean()) for some in (old, new))
        retention = anchors.LogitRetention(model, cache, batch_size=BATCH)
        outcomes.append(Outcome(name, kept, learned, retention.drift(), retention.drift(held_out)))

    measure("before", base)
    for name in ("AdamW", "CraftOptimizer(AdamW)"):
        print(f"It learns 5 to 9, by {name} ...")
        torch.manual_seed(0)
        model = copy.deepcopy(base)
        wrapped: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if name.startswith("Craft"):
            retention = anchors.LogitRetention(model, cache, batch_size=BATCH)
            log = out / "metrics.jsonl"
            log.unlink(missing_ok=True)
            wrapped = CraftOptimizer(wrapped, retention, epsilon=epsilon, on_metrics=JSONLWriter(log))
        for step in range(steps):
            fit(model, wrapped, pictures[train & new], labels[train & new], step)
        measure(name, model)

    print(f"\n{'':24}{'digits 0-4':>12}{'digits 5-9':>12}{f'drift (epsilon {epsilon:g})':>24}{'held out':>12}")
    for o in outcomes:
        print(f"{o.name:24}{o.old:12.1%}{o.new:12.1%}{max(o.drift, 0.0):24.3f}{max(o.held_out, 0.0):12.3f}")
    return outcomes


def digits() -> tuple[Tensor, Tensor]:
    """Pictures `[n, 1, 8, 8]` in [0, 1], and labels `[n]`; digits.txt has their source."""
    with np.load(Path(__file__).with_name("digits.npz")) as held:
        return torch.from_numpy(held["images"]).float()[:, None] / 16.0, torch.from_numpy(held["labels"]).long()


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor, labels: Tensor, step: int) -> None:
    """One step on the batch of its number."""
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))[:BATCH]
    cross_entropy(model(pictures[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
