"""One run, in a process of its own: the model is trained by a method, measured, and what was found written as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from tqdm import tqdm

from craft_optim.anchors import AnchorCache
from craft_optim.chat import batch_of
from craft_optim.demo.small_chat import answers

from .asked import SAMPLES, follows, words_right
from .methods import Method, Training, adapted, mean_loss
from .setup import Manual, caches_of, model_in

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What the results depend on.

    Attributes:
        steps, rows, lr: Of training: steps, chats in each, learning rate of the full model.
        limit: At most so many anchors, words and instructions, for a quick look. None: all.
    """

    steps: int
    rows: int
    lr: float
    limit: int | None = None


def run(method: Method, seed: int, settings: Settings, work: Path, source: str | None, file: Path) -> dict[str, Any]:
    """Trains and measures, and writes what was found to `file`.

    Args:
        method: How.
        seed: Of the order of chats and anchors, and of the adapters.
        settings: See `Settings`.
        work: Where model and caches are.
        source: Where the model is from, see `model_in`.
        file: A JSON.
    """
    model, tokenizer = model_in(work, source)
    caches = caches_of(work, model, tokenizer, settings.limit)
    task = Manual(tokenizer)
    found: dict[str, Any] = {"method": method.name, "seed": seed, "settings": vars(settings)}
    model = adapted(model, method, seed)
    if method.kind != "before":
        training = Training(model, method, caches, settings.lr, settings.steps, seed)
        found |= _train(training, task, settings, seed, method.name)
    found |= _measure(model, tokenizer, task, caches, settings.limit)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _train(training: Training, task: Manual, settings: Settings, seed: int, name: str) -> dict[str, Any]:
    """Losses, what the constraint was on each step, CPU seconds of a step and the most memory beyond the weights."""
    batches = task.batches(settings.rows, seed)
    losses, constraint, seconds = [], [], []
    before = _memory("VmRSS")
    for _ in tqdm(range(settings.steps), desc=f"{name} (seed {seed})", mininterval=10):
        batch = batch_of(next(batches))
        began = time.process_time()
        losses.append(training.step(batch))
        seconds.append(time.process_time() - began)
        constraint.append(training.found())
    # The first step makes the optimizer's state
    found: dict[str, Any] = {
        "losses": losses,
        "seconds": fmean(seconds[1:]),
        "gib": (_memory("VmHWM") - before) / 2**20,
    }
    return found | ({"constraint": constraint} if constraint[0] else {})


def _memory(name: str) -> int:
    """KiB of this process that are in memory, or were at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def _measure(
    model: nn.Module, tokenizer: Any, task: Manual, caches: dict[str, AnchorCache], limit: int | None
) -> dict[str, Any]:
    """Cross-entropy of the new task, drift on each cache, and what the model is asked."""
    model.eval()
    held_out = task.held_out[:limit]
    found: dict[str, Any] = {"new_ce": mean_loss(model, (held_out[at : at + 8] for at in range(0, len(held_out), 8)))}
    for name, cache in caches.items():
        found[f"drift_{name}"] = cache.retention(model, "logits", 4).drift()
    # How much less likely the model finds the answers that it gave before
    found["own_answers"] = caches["heldout"].retention(model, "tokens", 4).drift()
    found["words"] = words_right(model, tokenizer, limit)
    found["formats"] = follows(model, tokenizer, limit)
    found["samples"] = dict(zip(SAMPLES, answers(model, tokenizer, SAMPLES, 32), strict=True))
    return found
