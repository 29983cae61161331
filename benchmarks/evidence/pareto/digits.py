"""Handwritten digits, 8 x 8 pixels, that ship with scikit-learn: other classes, or the same ones turned."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .setting import Examples, Recipe, Setting

__all__ = ["classes", "rotation"]

_WIDTH = 128
_ANCHORS = 128


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Pictures `[n, 8, 8]` in [0, 1] and what they show `[n]`."""
    found = load_digits()
    return torch.tensor(found.images / 16.0, dtype=torch.float32), torch.tensor(found.target)


def _make_model() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 10)
    )


def _split(rows: Tensor, share: float, seed: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in two parts, the second with this share of them; of each digit alike."""
    first, second = train_test_split(rows.numpy(), test_size=share, random_state=seed, stratify=labels[rows].numpy())
    return torch.from_numpy(first), torch.from_numpy(second)


def _setting(name: str, title: str, **examples: Examples) -> Setting:
    return Setting(
        name=name,
        title=title,
        make_model=_make_model,
        hidden="2",
        head=("3.", "5."),
        anchors=examples["pretraining"][:_ANCHORS],  # a random part: splitting has shuffled them
        metric="accuracy",
        pretrain=Recipe(steps=600, batch_size=64, lr=3e-3),
        finetune=Recipe(steps=600, batch_size=32, lr=2e-3),
        anchor_batch=32,
        **examples,
    )


def classes(seed: int) -> Setting:
    """Digits 0 to 4 first, then 5 to 9, with one output for each of the ten."""
    pictures, labels = _digits()
    old, new = torch.nonzero(labels < 5).flatten(), torch.nonzero(labels >= 5).flatten()
    (old, old_test), (new, new_test) = (_split(rows, 0.3, seed, labels) for rows in (old, new))
    rows = {"pretraining": old, "old_test": old_test, "task": new, "task_test": new_test}
    examples = {key: Examples(pictures[r], labels[r]) for key, r in rows.items()}
    return _setting("classes", "digits 0-4, then 5-9", **examples)


def rotation(seed: int) -> Setting:
    """All digits upright first, then turned by a quarter; other pictures of each."""
    pictures, labels = _digits()
    rows, test = _split(torch.arange(len(labels)), 0.3, seed, labels)
    old, new = _split(rows, 0.5, seed, labels)
    turned = torch.rot90(pictures, dims=(1, 2))
    return _setting(
        "rotation",
        "upright digits, then turned ones",
        pretraining=Examples(pictures[old], labels[old]),
        old_test=Examples(pictures[test], labels[test]),
        task=Examples(turned[new], labels[new]),
        task_test=Examples(turned[test], labels[test]),
    )
