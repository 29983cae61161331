"""The methods that are compared: CraftOptimizer through its public interface, the others as their papers write them.

All see the same anchors: part of the old training data. Those that need labels get them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peers import flattened_pcgrad, torchjd_aggregator
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorCache, HiddenRetention, LogitRetention
from craft_optim.schedules import Linear

from .prepared import Prepared
from .setting import Examples, divergence, orders, task_loss

__all__ = ["METHODS", "Method", "Run", "Step"]

Step = Callable[[Tensor], None]
Merge = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Run:
    """The state that a method works with.

    Attributes:
        model: In training; pretrained when the method starts.
        base: The optimizer of the run; its gradients are cleared before each step.
        prepared: Setting, anchors and what the pretrained network says about them.
        strength: How much the method shall keep, in its own unit.
        seed: Of the order of the anchors.
    """

    model: nn.Module
    base: torch.optim.Optimizer
    prepared: Prepared
    strength: float
    seed: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the model."""
        return list(self.model.parameters())

    def anchor_rows(self) -> Iterator[Tensor]:
        """Which anchors come next."""
        setting = self.prepared.setting
        return orders(len(setting.anchors), setting.anchor_batch, self.seed)

    def anchors(self) -> Iterator[Examples]:
        """The same, with labels."""
        return (self.prepared.setting.anchors[rows] for rows in self.anchor_rows())

    def snapshot(self) -> list[Tensor]:
        """The weights now."""
        return [p.detach().clone() for p in self.parameters]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: For people.
        start: Called once before training; what it returns is called with each task loss, and steps.
        unit: What its strength is; empty for methods without one.
        grid: That many strengths, over a range that is the same in all settings; always one for methods without.
        finish: Called once after training.
    """

    title: str
    start: Callable[[Run], Step]
    unit: str = ""
    grid: Callable[[int], list[float]] = lambda count: [0.0]
    finish: Callable[[Run], None] = lambda run: None


def geometric(low: float, high: float) -> Callable[[int], list[float]]:
    """Strengths from low to high, each the same multiple of the one before; two digits."""
    return lambda count: [float(f"{x:.2g}") for x in np.geomspace(low, high, count)]


def linear(low: float, high: float) -> Callable[[int], list[float]]:
    """Strengths from low to high in equal steps; two digits."""
    return lambda count: [float(f"{x:.2g}") for x in np.linspace(low, high, count)]


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _penalised(run: Run, penalty: Callable[[], Tensor]) -> Step:
    """Minimises task loss + strength x penalty."""

    def step(task: Tensor) -> None:
        _backward(task + run.strength * penalty())
        run.base.step()

    return step


def plain(run: Run) -> Step:
    """The base optimizer on the task loss, and nothing else."""

    def step(task: Tensor) -> None:
        _backward(task)
        run.base.step()

    return step


def replay(run: Run) -> Step:
    """Task loss + strength x loss on labelled anchors: experience replay (Rolnick et al. 2019, arXiv:1811.11682)."""
    anchors = run.anchors()
    return _penalised(run, lambda: task_loss(run.model, next(anchors)))


def fixed_lambda(run: Run) -> Step:
    """Task loss + lambda KL(pretrained || model) on anchors (Li & Hoiem 2016, arXiv:1606.09282, on old inputs)."""
    inputs, teacher, rows = run.prepared.setting.anchors.inputs, run.prepared.teacher, run.anchor_rows()

    def penalty() -> Tensor:
        batch = next(rows)
        return divergence(run.model(inputs[batch]), teacher[batch])

    return _penalised(run, penalty)


def l2_sp(run: Run) -> Step:
    """Task loss + strength / 2 |theta - theta_0|^2 (Li et al. 2018, arXiv:1802.01483; one strength for all layers)."""
    start = run.snapshot()

    def penalty() -> Tensor:
        return 0.5 * torch.stack([(p - q).square().sum() for p, q in zip(run.parameters, start, strict=True)]).sum()

    return _penalised(run, penalty)


def ewc(run: Run) -> Step:
    """Task loss + strength / 2 sum_i F_i (theta_i - theta_0i)^2 (Kirkpatrick et al. 2017, arXiv:1612.00796)."""
    start, fisher = run.snapshot(), fisher_diagonal(run)

    def penalty() -> Tensor:
        terms = zip(run.parameters, start, fisher, strict=True)
        return 0.5 * torch.stack([(f * (p - q).square()).sum() for p, q, f in terms]).sum()

    return _penalised(run, penalty)


def fisher_diagonal(run: Run) -> list[Tensor]:
    """Mean square of the gradients of the log-likelihood over anchors, with answers drawn from the model's own."""
    generator = torch.Generator().manual_seed(run.seed)
    inputs, teacher = run.prepared.setting.anchors.inputs, run.prepared.teacher
    drawn = torch.multinomial(teacher.exp().flatten(0, -2), 1, generator=generator).view(teacher.shape[:-1])
    sums = [torch.zeros_like(p) for p in run.parameters]
    for one in range(len(inputs)):
        loss = task_loss(run.model, Examples(inputs[one : one + 1], drawn[one : one + 1]))
        for total, gradient in zip(sums, torch.autograd.grad(loss, run.parameters), strict=True):
            total += gradient.square()
    return [total / len(inputs) for total in sums]


def surgery(merge: Merge) -> Callable[[Run], Step]:
    """Steps on what a function makes of the task's gradients and those of the loss on labelled anchors."""

    def start(run: Run) -> Step:
        anchors = run.anchors()

        def step(task: Tensor) -> None:
            ours = torch.autograd.grad(task, run.parameters)
            theirs = torch.autograd.grad(task_loss(run.model, next(anchors)), run.parameters)
            for p, gradient in zip(run.parameters, merge(ours, theirs), strict=True):
                p.grad = gradient
            run.base.step()

        return step

    return start


def a_gem(task: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
    """g - min(0, <g, r>) / |r|^2 r (Chaudhry et al. 2019, arXiv:1812.00420)."""
    dot = sum(float((g * r).sum()) for g, r in zip(task, anchors, strict=True))
    if dot >= 0.0:
        return list(task)
    share = dot / sum(float(r.square().sum()) for r in anchors)
    return [g - share * r for g, r in zip(task, anchors, strict=True)]


def wise_ft(run: Run) -> None:
    """theta_0 + strength (theta - theta_0) after plain fine-tuning (Wortsman et al. 2022, arXiv:2109.01903)."""
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            p.copy_(torch.lerp(run.prepared.weights[name], p, run.strength))


def stepping(run: Run, optimizer: CraftOptimizer) -> Step:
    """Steps with a wrapper around the run's base: the task loss's backward, and the wrapper's step."""

    def step(task: Tensor) -> None:
        _backward(task)
        optimizer.step()

    return step


def craft(run: Run) -> Step:
    """`CraftOptimizer` with its defaults on `LogitRetention`; the strength is epsilon."""
    cache, batch = AnchorCache.open(run.prepared.cache), run.prepared.setting.anchor_batch
    retention = LogitRetention(run.model, cache, batch_size=batch, seed=run.seed, workers=0)
    return stepping(run, CraftOptimizer(run.base, retention, epsilon=run.strength))


def published(run: Run) -> Step:
    """`CraftOptimizer.published` on hidden states before the last layer; epsilon falls from ten times the strength."""
    setting = run.prepared.setting
    cache = AnchorCache.open(run.prepared.cache)
    retention = HiddenRetention(run.model, cache, batch_size=setting.anchor_batch, seed=run.seed, workers=0)
    steps = setting.finetune.steps
    schedule = Linear(10.0 * run.strength, run.strength, steps)
    return stepping(run, CraftOptimizer.published(run.base, retention, total_steps=steps, epsilon=schedule))


METHODS = {
    "plain": Method("plain", plain),
    "craft": Method("CraftOptimizer", craft, "epsilon", geometric(5e-4, 5e0)),
    "fixed": Method("KL, fixed lambda", fixed_lambda, "lambda", geometric(1e-2, 1e2)),
    "published": Method("published preset", published, "last epsilon", geometric(5e-4, 5e0)),
    "replay": Method("replay", replay, "weight", geometric(1e-2, 1e2)),
    "ewc": Method("EWC", ewc, "weight", geometric(1e0, 1e6)),
    "l2_sp": Method("L2-SP", l2_sp, "weight", geometric(1e-3, 1e1)),
    "wise_ft": Method("WiSE-FT", plain, "share of the way", linear(0.1, 0.9), wise_ft),
    "a_gem": Method("A-GEM", surgery(a_gem)),
    "pcgrad": Method("PCGrad", surgery(flattened_pcgrad)),
    "upgrad": Method("UPGrad", lambda run: surgery(torchjd_aggregator("UPGrad"))(run)),
}
