"""A setting: data to pretrain on, data to fine-tune on, and how both are scored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Examples",
    "Metric",
    "Recipe",
    "Setting",
    "chance",
    "divergence",
    "orders",
    "score",
    "task_loss",
    "teacher_logprobs",
]

Metric = Literal["accuracy", "cross_entropy"]
_AT_ONCE = 256  # examples of a forward that only measures


@dataclass(frozen=True)
class Examples:
    """Inputs `[n, ...]` and the classes to predict: `[n]`, or `[n, T]` where there is one at each position."""

    inputs: Tensor
    targets: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "Examples":
        return Examples(self.inputs[rows], self.targets[rows])

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, seed: int) -> Iterator["Examples"]:
        """The examples in the order of `orders`."""
        return (self[rows] for rows in orders(len(self), size, seed))


def orders(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after the other: whole batches, endless, each epoch in a new order.

    Args:
        count: Rows there are.
        size: Rows per batch, at most as many.
        seed: Of the orders.
    """
    if not 1 <= size <= count:
        raise ValueError(f"`size` must be in [1, {count}], the number of examples. Found size={size}.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % size], size)


@dataclass(frozen=True)
class Recipe:
    """AdamW; the learning rate falls to a tenth along half a cosine, as in lerobot's presets."""

    steps: int
    batch_size: int
    lr: float


@dataclass(frozen=True)
class Setting:
    """One pretraining and one fine-tuning.

    Attributes:
        name: In file names and flags.
        title: For people.
        make_model: An untrained network, inputs -> logits `[..., classes]`; draws from torch's global generator.
        hidden: The module whose output is the last but one: what the published preset holds.
        head: Modules of the late half, by the beginning of their names; the others are the early half.
        pretraining: What the network learns first.
        anchors: The part of it that methods may use while fine-tuning.
        old_test: Of the same kind, never trained on: what retention is scored on, and held-out drift.
        task: What it is fine-tuned on.
        task_test: What plasticity is scored on.
        metric: How both are scored.
        pretrain: How it learns first.
        finetune: How it learns next.
        anchor_batch: Anchors per step.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    hidden: str
    head: tuple[str, ...]
    pretraining: Examples
    anchors: Examples
    old_test: Examples
    task: Examples
    task_test: Examples
    metric: Metric
    pretrain: Recipe
    finetune: Recipe
    anchor_batch: int


def task_loss(model: nn.Module, examples: Examples) -> Tensor:
    """Mean cross-entropy of the targets, in nats."""
    return functional.cross_entropy(model(examples.inputs).flatten(0, -2), examples.targets.flatten())


@torch.no_grad()
def score(model: nn.Module, examples: Examples, metric: Metric) -> float:
    """Larger is better: the share of targets that are the likeliest class, or minus the cross-entropy in nats."""
    total = 0.0
    for start in range(0, len(examples), _AT_ONCE):
        part = examples[start : start + _AT_ONCE]
        if metric == "accuracy":
            total += float((model(part.inputs).argmax(-1) == part.targets).double().mean()) * len(part)
        else:
            total -= float(task_loss(model, part)) * len(part)
    return total / len(examples)


def chance(examples: Examples, metric: Metric) -> float:
    """The score of the best answer that does not look at the input: the most frequent class, or the frequencies."""
    shares = torch.bincount(examples.targets.flatten()).double() / examples.targets.numel()
    if metric == "accuracy":
        return float(shares.max())
    return float(torch.special.xlogy(shares, shares).sum())


@torch.no_grad()
def teacher_logprobs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Log-probabilities `[n, ..., classes]` of all inputs."""
    return torch.cat([model(part).log_softmax(-1) for part in torch.split(inputs, _AT_ONCE)])


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || model) in nats, mean over examples and positions; `teacher` are log-probabilities."""
    terms = functional.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none")
    return terms.sum(-1).mean()
