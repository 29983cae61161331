"""Pretrained networks and their anchors: made once per setting and seed, then read."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craft_optim import anchors

from .characters import language
from .digits import classes, rotation
from .setting import Recipe, Setting, chance, score, task_loss, teacher_logprobs

__all__ = ["SETTINGS", "Prepared", "base_optimizer", "cache_of", "prepare"]

SETTINGS: dict[str, Callable[[int], Setting]] = {"classes": classes, "rotation": rotation, "language": language}
_WEIGHTS = "pretrained.safetensors"


@dataclass(frozen=True)
class Prepared:
    """A setting with what every run of a seed begins with.

    Attributes:
        setting: The setting.
        weights: Of the pretrained network.
        teacher: What it says about the anchors: log-probabilities `[anchors, ..., classes]`.
        heldout: The same of the old test set.
        cache: The anchors and what it says about them, as `craft_optim.anchors.build` writes them.
        new: Its score on the new test set.
        old: On the old one.
        chance: What is left of `old` where nothing is remembered.
    """

    setting: Setting
    weights: dict[str, Tensor]
    teacher: Tensor
    heldout: Tensor
    cache: Path
    new: float
    old: float
    chance: float

    def model(self) -> nn.Module:
        """A fresh copy of the pretrained network."""
        model = self.setting.make_model()
        model.load_state_dict(self.weights)
        return model


def base_optimizer(
    model: nn.Module, recipe: Recipe, lr: float = 1.0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its schedule.

    Args:
        model: What is trained.
        recipe: How.
        lr: Factor on the recipe's learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr * recipe.lr)

    def rate(step: int) -> float:
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * step / recipe.steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


@lru_cache(maxsize=2)
def prepare(name: str, seed: int, folder: Path) -> Prepared:
    """Pretrains and asks about the anchors, unless the folder has both.

    Args:
        name: Of `SETTINGS`.
        seed: Of the split, the first weights and the order of the batches.
        folder: Where weights and anchors are kept; has a folder of its own for each setting and seed.
    """
    setting = SETTINGS[name](seed)
    place = folder / f"{name}-seed{seed}"
    torch.manual_seed(seed)
    model = setting.make_model()
    if not (place / _WEIGHTS).is_file():
        _pretrain(model, setting, seed)
        place.mkdir(parents=True, exist_ok=True)
        anchors.build(
            model,
            torch.split(setting.anchors.inputs, setting.anchor_batch),
            place / "anchors",
            layers=[setting.hidden],
            overwrite=True,
            progress=False,
            class_dim=-1,
        )
        half = place / f"{_WEIGHTS}.{os.getpid()}"
        save_file(model.state_dict(), half)
        shutil.move(half, place / _WEIGHTS)  # last: where there are weights there are anchors
    weights = load_file(place / _WEIGHTS)
    model.load_state_dict(weights)
    return Prepared(
        setting,
        weights,
        teacher=teacher_logprobs(model, setting.anchors.inputs),
        heldout=teacher_logprobs(model, setting.old_test.inputs),
        cache=place / "anchors",
        new=score(model, setting.task_test, setting.metric),
        old=score(model, setting.old_test, setting.metric),
        chance=chance(setting.old_test, setting.metric),
    )


def cache_of(prepared: Prepared, name: str, inputs: Tensor) -> anchors.AnchorCache:
    """Other anchors of the pretrained network, such as a part of them; written once, beside its own.

    Args:
        prepared: Of a setting and seed.
        name: Of the folder: the same name must have the same inputs.
        inputs: `[n, ...]`.
    """
    folder = prepared.cache.with_name(name)
    if not folder.is_dir():
        own = folder.with_name(f"{name}.{os.getpid()}")
        batches = torch.split(inputs, prepared.setting.anchor_batch)
        anchors.build(prepared.model(), batches, own, overwrite=True, progress=False, class_dim=-1)
        try:
            own.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(own)
    return anchors.AnchorCache.open(folder)


def _pretrain(model: nn.Module, setting: Setting, seed: int) -> None:
    recipe = setting.pretrain
    optimizer, schedule = base_optimizer(model, recipe)
    batches = setting.pretraining.batches(recipe.batch_size, seed)
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        task_loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
