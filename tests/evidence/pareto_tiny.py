"""A setting of a few tiny pictures, for tests of what is done with settings."""

from dataclasses import replace

import torch
from pareto.setting import Examples, Recipe, Setting
from torch import nn

COUNT, SIDE, CLASSES = 8, 3, 2


def _examples(generator, count=COUNT):
    inputs = torch.randn(count, SIDE, SIDE, generator=generator)
    return Examples(inputs, (inputs[:, 0, 0] > 0).long())


def tiny(seed, **changes):
    generator = torch.Generator().manual_seed(seed)
    old = _examples(generator, 64)
    new = _examples(generator, 64)
    new = Examples(new.inputs, 1 - new.targets)
    setting = Setting(
        name="tiny",
        title="a few tiny pictures",
        make_model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 4), nn.ReLU(), nn.Linear(4, CLASSES)),
        hidden="2",
        head=("3.",),
        pretraining=old,
        anchors=old[:COUNT],
        old_test=old[32:],
        task=new[:32],
        task_test=new[32:],
        metric="accuracy",
        pretrain=Recipe(steps=100, batch_size=16, lr=3e-2),
        finetune=Recipe(steps=80, batch_size=16, lr=1e-2),
        anchor_batch=COUNT,  # all of them: which come next does not matter
    )
    return replace(setting, **changes)


def with_more_anchors(seed, **changes):
    """Of which a batch is a quarter, so that a quarter can be kept aside."""
    return tiny(seed, anchors=tiny(seed).pretraining[: 4 * COUNT], **changes)
