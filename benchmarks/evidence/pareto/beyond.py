"""Ideas for a better trade-off than that of a penalty: variants of CraftOptimizer, one change each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call

from craft_optim import Constraint, CraftOptimizer, Retention
from craft_optim.anchors import LogitRetention
from craft_optim.anchors.sampling import AnchorSampler, mixed_seed
from craft_optim.dual import MultiplicativePI

from .methods import METHODS, Method, Run, Step, craft, stepping
from .prepared import cache_of
from .setting import divergence, teacher_logprobs
from .training import Job, Record, fine_tune

__all__ = ["VARIANTS", "vary"]

_ASIDE = 4  # one anchor of so many drives the multiplier only
_LOOSER = 2.0
_OLD = 0.8  # weight of what was, in an averaged gradient
_REPLACED = 0.05  # share of characters


class Drift(Retention):
    """KL from the pretrained network on the anchors that `LogitRetention` of the same seed takes.

    Args:
        run: With model, anchors and seed.
        change: Makes other anchors of them, anew in each pass; the pretrained network says what is right on these.
    """

    unit = "nats"

    def __init__(self, run: Run, change: Callable[[Tensor, torch.Generator], Tensor] | None = None) -> None:
        setting = run.prepared.setting
        self.run, self._change, self._before = run, change, run.prepared.model()
        self._sampler = AnchorSampler(len(setting.anchors), setting.anchor_batch, run.seed)

    def loss(self, number: int) -> Tensor:
        rows = self._sampler.indices(number)
        inputs, teacher = self.run.prepared.setting.anchors.inputs[rows], self.run.prepared.teacher[rows]
        if self._change is not None:
            inputs = self._change(inputs, torch.Generator().manual_seed(mixed_seed(self.run.seed, number)))
            teacher = teacher_logprobs(self._before, inputs)
        return divergence(self.logits(inputs), teacher)

    def logits(self, inputs: Tensor) -> Tensor:
        """Of the model in training."""
        found: Tensor = self.run.model(inputs)
        return found


def with_defaults(run: Run, retention: Retention, **settings: Any) -> CraftOptimizer:
    """`CraftOptimizer` as the method "craft" has it, on another closure or with other settings."""
    return CraftOptimizer(run.base, retention, epsilon=run.strength, **settings)


def held_out(run: Run) -> CraftOptimizer:
    """A quarter of the anchors is kept aside, and epsilon is the drift on these; the gradient is of the others."""
    inputs, size = run.prepared.setting.anchors.inputs, run.prepared.setting.anchor_batch
    aside = torch.arange(len(inputs)) % _ASIDE == 0
    caches = {name: cache_of(run.prepared, name, inputs[rows]) for name, rows in (("aside", aside), ("others", ~aside))}
    retention = LogitRetention(run.model, caches["others"], batch_size=size, seed=run.seed, workers=0)
    return with_defaults(run, retention, heldout=caches["aside"])


class Averaged(Retention):
    """Another closure's loss with a gradient that is averaged over passes.

        g_n = 0.8 g_(n-1) + 0.2 grad L_n        on pass n, g_0 = grad L_0

    One more copy of the gradients, for as long as training lasts, which is in no checkpoint.

    Args:
        inner: The closure.
        parameters: What the gradients are of.
    """

    unit = "nats"

    def __init__(self, inner: Retention, parameters: Sequence[nn.Parameter]) -> None:
        self._inner, self._parameters = inner, list(parameters)
        self._average: list[Tensor] | None = None

    def loss(self, number: int) -> Tensor:
        loss = self._inner.loss(number)
        if not torch.is_grad_enabled():  # the trust region looks at the same anchors again, and at others
            return loss
        new = torch.autograd.grad(loss, self._parameters)
        old = self._average or new
        self._average = [torch.lerp(b, a, _OLD) for a, b in zip(old, new, strict=True)]
        linear = torch.stack([(p * g).sum() for p, g in zip(self._parameters, self._average, strict=True)]).sum()
        return loss.detach() + linear - linear.detach()


def mixed(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Every other anchor becomes a mixture with the one before: pictures are blended, texts spliced.

    Blended as by mixup (Zhang et al. 2018, arXiv:1710.09412), with a uniform share.

    Args:
        inputs: Pictures, floating `[n, H, W]`, or characters, integer `[n, T]`.
        generator: For shares and places.
    """
    first, second = inputs[0::2][: len(inputs) // 2], inputs[1::2]
    share = torch.rand(len(second), *[1] * (inputs.dim() - 1), generator=generator)
    if inputs.is_floating_point():
        made = share * first + (1.0 - share) * second
    else:
        made = torch.where(torch.arange(inputs.shape[1]) < share * inputs.shape[1], first, second)
    changed = inputs.clone()
    changed[1::2] = made
    return changed


def augmented(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures move by up to a pixel each way; of texts one character in twenty becomes another of the batch.

    Args:
        inputs: As for `mixed`.
        generator: For what happens to each.
    """
    if inputs.is_floating_point():
        height, width = inputs.shape[1:]
        padded = nn.functional.pad(inputs, (1, 1, 1, 1))
        down, right = torch.randint(3, (2, len(inputs)), generator=generator).tolist()
        return torch.stack([x[d : d + height, r : r + width] for x, d, r in zip(padded, down, right, strict=True)])
    others = inputs.flatten()[torch.randperm(inputs.numel(), generator=generator)].view_as(inputs)
    return torch.where(torch.rand(inputs.shape, generator=generator) < _REPLACED, others, inputs)


def looser(run: Run) -> Step:
    """CraftOptimizer with twice the epsilon: `interpolate` brings the drift back."""
    return craft(replace(run, strength=_LOOSER * run.strength))


@torch.no_grad()
def interpolate(run: Run) -> None:
    """Goes back straight to the pretrained weights until drift on all anchors is epsilon, if it is above."""
    ends = {name: p.clone() for name, p in run.model.named_parameters()}
    inputs, teacher = run.prepared.setting.anchors.inputs, run.prepared.teacher

    def excess(share: float) -> float:
        for name, p in run.model.named_parameters():
            p.copy_(torch.lerp(run.prepared.weights[name], ends[name], share))
        return float(divergence(teacher_logprobs(run.model, inputs), teacher)) - run.strength

    if excess(1.0) > 0.0:
        excess(brentq(excess, 0.0, 1.0, xtol=1e-4))


def update_projection(run: Run) -> Step:
    """While drift is above epsilon, the *update* loses what works against the anchors, not the task gradient.

    AdamW's step on g_t + lambda g_r is made as it is; then theta loses the component of the step along g_r, if that
    would let the drift grow to first order.
    """
    optimizer = with_defaults(run, Drift(run), projection="never")
    merged: list[Tensor] = []

    def look(*_: Any) -> None:
        merged[:] = [p.grad for p in run.parameters if p.grad is not None]

    run.base.register_step_pre_hook(look)

    def step(task: Tensor) -> None:
        task.backward()  # type: ignore[no-untyped-call]
        before = run.snapshot()
        optimizer.step()
        found = optimizer.metrics
        if found["fresh"] and found["violation"] > 1.0 and found["lambda"] > 0.0:
            ours = [p.grad for p in run.parameters if p.grad is not None]  # `step` has put the task's back
            project_update(run.parameters, before, [g - t for g, t in zip(merged, ours, strict=True)])

    return step


@torch.no_grad()
def project_update(parameters: Sequence[Tensor], before: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
    """theta - <theta - theta_before, r> / |r|^2 r, where that inner product is positive; in place."""
    moved = sum(float(((p - q) * r).sum()) for p, q, r in zip(parameters, before, anchors, strict=True))
    if moved > 0.0:
        share = moved / sum(float(r.square().sum()) for r in anchors)
        for p, r in zip(parameters, anchors, strict=True):
            p.sub_(share * r)


class HalfDrift(Drift):
    """The drift that some of the parameters make alone: the others are as pretrained.

    Args:
        run: As for `Drift`.
        names: Of these parameters.
    """

    def __init__(self, run: Run, names: Sequence[str]) -> None:
        super().__init__(run)
        named = dict(run.model.named_parameters())
        self._weights = run.prepared.weights | {name: named[name] for name in names}

    def logits(self, inputs: Tensor) -> Tensor:
        found: Tensor = functional_call(self.run.model, self._weights, (inputs,))
        return found


def own_budgets(run: Run) -> CraftOptimizer:
    """Early and late layers may each make half of epsilon of drift, measured with the other half as pretrained."""
    names = [name for name, _ in run.model.named_parameters()]
    late = [name for name in names if name.startswith(run.prepared.setting.head)]
    halves = {"early": [name for name in names if name not in late], "late": late}
    return CraftOptimizer(
        run.base, {half: Constraint(HalfDrift(run, own), run.strength / 2.0) for half, own in halves.items()}
    )


def _variant(title: str, start: Callable[[Run], Step], finish: Callable[[Run], None] = lambda run: None) -> Method:
    return Method(title, start, "epsilon", METHODS["craft"].grid, finish)


def _stepping(make: Callable[[Run], CraftOptimizer]) -> Callable[[Run], Step]:
    return lambda run: stepping(run, make(run))


VARIANTS = {
    "held_out": _variant("epsilon of held-out anchors", _stepping(held_out)),
    "averaged": _variant(
        "averaged gradient", _stepping(lambda run: with_defaults(run, Averaged(Drift(run), run.parameters)))
    ),
    "mixed": _variant("mixed anchors", _stepping(lambda run: with_defaults(run, Drift(run, mixed)))),
    "augmented": _variant("augmented anchors", _stepping(lambda run: with_defaults(run, Drift(run, augmented)))),
    "interpolated": _variant("twice epsilon, then interpolation", looser, interpolate),
    "update_projection": _variant("projection of the update", update_projection),
    "own_budgets": _variant("own budgets of early and late layers", _stepping(own_budgets)),
    "least_share_10": _variant(
        "at least a tenth for retention",
        _stepping(lambda run: with_defaults(run, Drift(run), dual=MultiplicativePI(least_share=0.1))),
    ),
    "least_share_30": _variant(
        "at least three tenths",
        _stepping(lambda run: with_defaults(run, Drift(run), dual=MultiplicativePI(least_share=0.3))),
    ),
}


def vary(job: Job, folder: Path) -> Record:
    """Fine-tunes by a variant; see `fine_tune`."""
    return fine_tune(job, folder, VARIANTS)
