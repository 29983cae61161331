"""Ideas for a better trade-off than that of a penalty: variants of CraftOptimizer, one change each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call

from craft_optim import CraftOptimizer
from craft_optim.dual import Controller, MultiplicativePI, Update
from craft_optim.functional import gram, project_and_merge_

from .methods import METHODS, Method, Run, Step, craft, stepping
from .setting import divergence, orders, teacher_logprobs
from .training import Job, Record, fine_tune

__all__ = ["VARIANTS", "HeldOutDual", "vary"]

_ASIDE = 4  # one anchor of so many drives the multiplier only
_LOOSER = 2.0
_REPLACED = 0.05  # share of characters


class HeldOutDual:
    """A controller that follows the drift on anchors that no gradient is taken of, instead of those of the batch.

    Args:
        inner: What makes the multiplier of it.
        drift: Measures it.
    """

    def __init__(self, inner: Controller, drift: Callable[[], float]) -> None:
        self._inner, self._drift = inner, drift

    def initial_state(self) -> dict[str, float]:
        return self._inner.initial_state()

    def __call__(self, state: Mapping[str, float], *, loss: float, epsilon: float, cap: float = float("inf")) -> Update:
        return self._inner(state, loss=self._drift(), epsilon=epsilon, cap=cap)


def _drift_of(run: Run, rows: Tensor) -> Tensor:
    inputs = run.prepared.setting.anchors.inputs[rows]
    return divergence(run.model(inputs), run.prepared.teacher[rows])


def held_out_dual(run: Run) -> Step:
    """A quarter of the anchors is kept aside: lambda follows the drift on these, the gradient is of the others."""
    count, size = len(run.prepared.setting.anchors), run.prepared.setting.anchor_batch
    places = torch.arange(count)
    aside, others = places[places % _ASIDE == 0], places[places % _ASIDE != 0]
    of_aside, of_others = orders(len(aside), size, run.seed), orders(len(others), size, run.seed)

    @torch.no_grad()
    def measured() -> float:
        return float(_drift_of(run, aside[next(of_aside)]))

    def closure() -> Tensor:
        return _drift_of(run, others[next(of_others)])

    dual = HeldOutDual(MultiplicativePI(), measured)
    return stepping(run, CraftOptimizer(run.base, closure, epsilon=run.strength, dual=dual))


def _changed_anchors(change: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Run], Step]:
    """Anchors are changed anew for each pass; the pretrained network says what is right on what they have become."""

    def start(run: Run) -> Step:
        teacher, inputs = run.prepared.model(), run.prepared.setting.anchors.inputs
        generator, rows = torch.Generator().manual_seed(run.seed), run.anchor_rows()

        def closure() -> Tensor:
            batch = change(inputs[next(rows)], generator)
            return divergence(run.model(batch), teacher_logprobs(teacher, batch))

        return stepping(run, CraftOptimizer(run.base, closure, epsilon=run.strength))

    return start


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


class _Multiplier:
    """A controller with its state, capped as in CraftOptimizer."""

    def __init__(self) -> None:
        self._controller = MultiplicativePI()
        self._state = self._controller.initial_state()

    def __call__(self, loss: float, epsilon: float, task: Sequence[Tensor], anchors: Sequence[Tensor]) -> float:
        found = gram(list(task), list(anchors))
        cap = (found.tt / found.rr) ** 0.5 if found.rr > 0.0 else float("inf")
        update = self._controller(self._state, loss=loss, epsilon=epsilon, cap=cap)
        self._state = update.state
        return update.multiplier


def update_projection(run: Run) -> Step:
    """While drift is above epsilon, the *update* loses what works against the anchors, not the task gradient.

    AdamW's step on g_t + lambda g_r is made as it is; then theta loses the component of the step along g_r, if that
    would let the drift grow to first order.
    """
    multiplier, rows = _Multiplier(), run.anchor_rows()

    def step(task: Tensor) -> None:
        ours = torch.autograd.grad(task, run.parameters)
        drift = _drift_of(run, next(rows))
        theirs = torch.autograd.grad(drift, run.parameters)
        lam = multiplier(drift.item(), run.strength, ours, theirs)
        for p, g, r in zip(run.parameters, ours, theirs, strict=True):
            p.grad = g + lam * r
        before = run.snapshot()
        run.base.step()
        if drift.item() > run.strength:
            project_update(run.parameters, before, theirs)

    return step


@torch.no_grad()
def project_update(parameters: Sequence[Tensor], before: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
    """theta - <theta - theta_before, r> / |r|^2 r, where that inner product is positive; in place."""
    moved = sum(float(((p - q) * r).sum()) for p, q, r in zip(parameters, before, anchors, strict=True))
    if moved > 0.0:
        share = moved / sum(float(r.square().sum()) for r in anchors)
        for p, r in zip(parameters, anchors, strict=True):
            p.sub_(share * r)


@dataclass(frozen=True)
class _Half:
    """Some of the parameters, with a multiplier of their own."""

    names: tuple[str, ...]
    multiplier: _Multiplier


def own_budgets(run: Run) -> Step:
    """Early and late layers may each make half of epsilon of drift, measured with the other half as pretrained."""
    named, head = dict(run.model.named_parameters()), run.prepared.setting.head
    late = tuple(name for name in named if name.startswith(head))
    halves = [_Half(names, _Multiplier()) for names in (tuple(n for n in named if n not in late), late)]
    rows = run.anchor_rows()

    def alone(half: _Half, batch: Tensor) -> Tensor:
        weights = run.prepared.weights | {name: named[name] for name in half.names}
        logits = functional_call(run.model, weights, (run.prepared.setting.anchors.inputs[batch],))
        return divergence(logits, run.prepared.teacher[batch])

    def step(task: Tensor) -> None:
        gradients = dict(zip(named, torch.autograd.grad(task, list(named.values())), strict=True))
        batch, budget = next(rows), run.strength / 2.0
        for half in halves:
            drift, own = alone(half, batch), [named[name] for name in half.names]
            ours, theirs = [gradients[name] for name in half.names], torch.autograd.grad(drift, own)
            lam = half.multiplier(drift.item(), budget, ours, theirs)
            merged: list[Tensor | None] = [*theirs]
            project_and_merge_([*ours], merged, lam=lam, project=drift.item() > budget)
            for p, g in zip(own, merged, strict=True):
                p.grad = g
        run.base.step()

    return step


class LeastShare:
    """A controller that keeps the retention gradient from becoming small beside the task's: lambda >= share x cap.

    With rho = 1, as by default at K = 1, the cap is |g_t| / |g_r|: lambda |g_r| is at least this share of |g_t|, also
    while the drift is far below epsilon. Like the rest of the controller it knows no units.

    Args:
        share: In [0, 1].
    """

    def __init__(self, share: float) -> None:
        self._inner, self._share = MultiplicativePI(), share

    def initial_state(self) -> dict[str, float]:
        return self._inner.initial_state()

    def __call__(self, state: Mapping[str, float], *, loss: float, epsilon: float, cap: float = float("inf")) -> Update:
        found = self._inner(state, loss=loss, epsilon=epsilon, cap=cap)
        least = min(self._share * cap, self._inner.maximum)  # the cap is without bound where nothing has drifted
        return found._replace(multiplier=max(found.multiplier, least))


def least_share(share: float) -> Callable[[Run], Step]:
    """Epsilon is a bound and no aim: retention always has a share of the step."""

    def start(run: Run) -> Step:
        rows = run.anchor_rows()
        optimizer = CraftOptimizer(
            run.base, lambda: _drift_of(run, next(rows)), epsilon=run.strength, dual=LeastShare(share)
        )
        return stepping(run, optimizer)

    return start


def _variant(title: str, start: Callable[[Run], Step], finish: Callable[[Run], None] = lambda run: None) -> Method:
    return Method(title, start, "epsilon", METHODS["craft"].grid, finish)


VARIANTS = {
    "held_out_dual": _variant("held-out anchors drive lambda", held_out_dual),
    "mixed": _variant("mixed anchors", _changed_anchors(mixed)),
    "augmented": _variant("augmented anchors", _changed_anchors(augmented)),
    "interpolated": _variant("twice epsilon, then interpolation", looser, interpolate),
    "update_projection": _variant("projection of the update", update_projection),
    "own_budgets": _variant("own budgets of early and late layers", own_budgets),
    "least_share_10": _variant("at least a tenth for retention", least_share(0.1)),
    "least_share_30": _variant("at least three tenths", least_share(0.3)),
}


def vary(job: Job, folder: Path) -> Record:
    """Fine-tunes by a variant; see `fine_tune`."""
    return fine_tune(job, folder, VARIANTS)
