"""The retention side of one optimizer step: from task gradients in `.grad` to merged gradients in `.grad`."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from craft_optim import scaling
from craft_optim._warn import warn
from craft_optim.constraints import Constraint, keyed, own_state, put_together
from craft_optim.decision import Decision, Gram, Granularity, Merge, labels_of
from craft_optim.gradients import Gradients, gradients_of, put
from craft_optim.retention_pass import Passed, RetentionPass
from craft_optim.several import ProductsOfSeveral, caps, common_factor, decide_several
from craft_optim.stash import GradientMemory, Stash
from craft_optim.surgery import GradientPairs, GradientSets

if TYPE_CHECKING:
    from craft_optim.distributed import Layout

__all__ = ["SHARED_STATE", "Projection", "RetentionStep", "Rules"]

Projection = Literal["violated", "always", "never"]

# Floats of the state that belong to no constraint.
SHARED_STATE = ("craft_step", "craft_skipped")


@dataclass(frozen=True)
class Rules:
    """What decides how a step merges; `CraftOptimizer` explains each."""

    rho: float
    projection: Projection
    conflict_threshold: float
    merge: Merge
    granularity: Granularity
    max_grad_norm: float | None
    gradient_memory: GradientMemory


class _Measured(NamedTuple):
    """Of the retention passes of one evaluation.

    Attributes:
        sets: The task gradients and the retention gradients times their scales, what of them is on this process.
        task: The task gradients as the stash gave them.
        passed: What each pass gave.
        products: Inner products per label, over all processes, without the scales.
        losses: Of each constraint.
    """

    sets: GradientSets
    task: Gradients
    passed: list[Passed]
    products: ProductsOfSeveral
    losses: list[float]


class RetentionStep:
    """One step; of a line search, all its evaluations, on the same anchors and with the same multipliers.

    Args:
        constraints: One without a name, or several with names.
        rules: Of the merge.
        parameters: All of the optimizer's.
        group_sizes: How many of them each parameter group has.
        state: The `craft_*` floats before the step.
        layout: Of several processes; None for one.
        float16: Name -> whether float16 takes part in the closure's backward; finds out what is not there.
        find_reached: Whether to look which tensors the retention losses reach: one more read of their gradients.

    Attributes:
        metrics: What was measured; empty if nothing was.
        reached: Name -> of each parameter, whether its retention gradient, on any process, is not zero; empty if not
            asked for.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        rules: Rules,
        parameters: list[Tensor],
        group_sizes: Sequence[int],
        *,
        state: dict[str, float],
        layout: "Layout | None",
        float16: dict[str | None, bool],
        find_reached: bool = False,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self.reached: dict[str | None, list[bool]] = {}
        self._rules, self._layout = rules, layout
        self._parameters, self._find_reached = parameters, find_reached
        self._labels = labels_of(rules.granularity, group_sizes)
        self._shared = {key: state[key] for key in SHARED_STATE}
        own = {key: value for key, value in state.items() if key not in SHARED_STATE}
        self._passes = [
            RetentionPass(
                constraint,
                parameters,
                state=own_state(own, constraint.name),
                layout=layout,
                float16=float16.get(constraint.name),
            )
            for constraint in constraints
        ]
        self._stash: Stash | None = None

    @property
    def ran(self) -> bool:
        """Whether there was anything to merge."""
        return self._stash is not None

    @property
    def constraints(self) -> list[Constraint]:
        """As given."""
        return [run.constraint for run in self._passes]

    @property
    def state(self) -> dict[str, float]:
        """The floats to write once the base has stepped."""
        own = {keyed(what, run.constraint.name): x for run in self._passes for what, x in run.state.items()}
        return self._shared | own

    @property
    def float16(self) -> dict[str | None, bool]:
        """As given, and found out."""
        return {run.constraint.name: run.float16 for run in self._passes if run.float16 is not None}

    def share_reached(self, name: str | None) -> float:
        """The part of the trainable elements that is in tensors with a retention gradient; in [0, 1].

        Whole tensors count: of an embedding only the rows of the anchors' tokens have a gradient. Collective.
        """
        sizes = torch.tensor([p.numel() * p.requires_grad for p in self._parameters], dtype=torch.float64)
        if self._layout is not None and self._layout.fsdp1:  # its parameters, unlike DTensors, know only their shard
            here = sizes * torch.tensor(self._layout.shares(self._parameters), dtype=torch.float64)
            sizes = self._layout.total(here.to(self._parameters[0].device)).cpu()
        return float(sizes[torch.tensor(self.reached[name])].sum() / sizes.sum())

    @contextmanager
    def undone_after_errors(self) -> Iterator[None]:
        """Leaves the task gradients in `.grad`."""
        try:
            yield
        finally:
            if self._stash is not None:
                self._stash.give_back(self._parameters)

    @torch.no_grad()
    def merge(self) -> None:
        """Runs the retention passes and points `.grad` at the merged gradients.

        At the task's, if anything was not finite.
        """
        self._stash = Stash(gradients_of(self._parameters), self._rules.gradient_memory)
        sets, task, passed, products, losses = self._measured(self._stash)
        grams = products.grams
        if not (all(map(math.isfinite, losses)) and products.finite):
            self._stash.give_back(self._parameters)
            self._note_skip(losses, grams)
            return
        for run in self._passes:
            if run.float16:
                run.state |= scaling.grown(run.state)

        decisions = decide_several(
            products,
            lams=self._multipliers(losses, products),
            project=[
                run.may_project(self._rules.projection, loss) for run, loss in zip(self._passes, losses, strict=True)
            ],
            conflict_threshold=self._rules.conflict_threshold,
            merge=self._rules.merge,
            max_norm=self._rules.max_grad_norm,
        )
        if self._find_reached and not self.metrics:
            for run, retention in zip(self._passes, sets.retention, strict=True):
                self.reached[run.constraint.name] = self._reached(retention)
        with record_function("CraftOptimizer.merge"):
            merged = sets.merge_(
                [
                    [c.of_scaled(of.scale) for c in decision.coefficients]
                    for decision, of in zip(decisions, passed, strict=True)
                ]
            )
            if self._layout is not None:
                whole = (of.gradients for of in passed)
                merged = self._layout.wrapped(merged, self._parameters, task, *whole)
            put(self._parameters, self._stash.in_their_dtype(merged))
        self._report(losses, grams, decisions)

    def _multipliers(self, losses: Sequence[float], products: ProductsOfSeveral) -> list[float]:
        """Of a line search, those of the first evaluation."""
        updates = [run.update for run in self._passes if run.update is not None]
        if not updates:
            updates = [
                run.updated(loss, cap)
                for run, loss, cap in zip(self._passes, losses, caps(products, self._rules.rho), strict=True)
            ]
            factor = common_factor(products, [update.multiplier for update in updates], self._rules.rho)
            if factor < 1.0:
                updates = [x._replace(multiplier=x.multiplier * factor, capped=True) for x in updates]
                for run, update in zip(self._passes, updates, strict=True):
                    run.use(update)
        return [update.multiplier for update in updates]

    def _report(self, losses: Sequence[float], grams: Sequence[Gram], decisions: Sequence[Decision]) -> None:
        if self.metrics:  # of a line search, the first evaluation: where the step began
            return
        rows = {}
        for run, loss, gram, decision in zip(self._passes, losses, grams, decisions, strict=True):
            epsilon, update = run.constraint.epsilon, run.update
            rows[run.constraint.name] = {
                "retention_loss": loss,
                "epsilon": epsilon,
                "lambda": run.state["craft_lambda"],
                "violation": loss / epsilon if epsilon > 0.0 else math.inf if loss > 0.0 else 0.0,
                "grad_dot": gram.tr,
                "grad_cos": gram.cos,
                "conflict": decision.conflict,
                "projected": decision.projected,
                "retention_grad_norm": math.sqrt(gram.rr),
                "capped": float(update is not None and update.capped),
            }
        self.metrics = put_together(rows) | {
            "task_grad_norm": math.sqrt(grams[0].tt),
            "merged_grad_norm": decisions[0].norm,
            "clipped": float(decisions[0].clipped),
            "skipped": self._shared["craft_skipped"],
        }

    def _measured(self, stash: Stash) -> _Measured:
        """Runs the retention passes and the inner products.

        Repeats a pass whose gradients have overflowed, as long as a smaller scale may help.
        """
        passed: dict[RetentionPass, Passed] = {}
        while True:
            for run in self._passes:
                if run not in passed:
                    with record_function("CraftOptimizer.retention"):
                        passed[run] = run.gradients()
            found = [passed[run] for run in self._passes]
            with record_function("CraftOptimizer.merge"):
                task = stash.for_surgery()
                sets = self._sets(task, [of.gradients for of in found])
                scaled, losses = sets.inner_products(*(of.loss for of in found), reduce=self._reduce)
            products = scaled.unscaled([of.scale for of in found])
            again = [
                run
                for run, loss, gram, of in zip(self._passes, losses, products.grams, found, strict=True)
                if run.float16
                and math.isfinite(loss)
                and math.isfinite(gram.tt)
                and not gram.finite
                and run.may_repeat(of.scale)
            ]
            if not again:
                break
            del task, sets, found
            for run in again:
                del passed[run]
        for run in self._passes:
            run.note_position()
        return _Measured(sets, task, found, products, losses)

    @property
    def _reduce(self) -> Callable[[Tensor], Tensor] | None:
        return None if self._layout is None else self._layout.reduce

    def _reached(self, retention: Gradients) -> list[bool]:
        shares = None if self._layout is None else self._layout.shares(self._parameters)
        pairs = GradientPairs([None] * len(retention), retention, range(len(retention)), shares)
        products, _ = pairs.inner_products(reduce=self._reduce)
        return [bool(square > 0.0) for square in products.rr]

    def _sets(self, task: Gradients, retention: Sequence[Gradients]) -> GradientSets:
        """What of the gradients is on this process."""
        shares = None
        lists = [task, *retention]
        if self._layout is not None:
            shares = self._layout.shares(self._parameters)
            lists = [self._layout.local(gradients, self._parameters) for gradients in lists]
        for one, other in combinations(lists, 2):
            if any(map(_same_memory, one, other)):
                raise RuntimeError(
                    "The retention backward wrote its gradients into the memory of the task gradients, or of another "
                    "constraint's, which are lost now: a wrapper of the model keeps its own gradient buffers. Let the "
                    "retention closure run the model that is wrapped (`.module`)."
                )
        return GradientSets(lists[0], lists[1:], self._labels, shares)

    def _note_skip(self, losses: Sequence[float], grams: Sequence[Gram], where: str = "") -> None:
        self._shared["craft_skipped"] += 1.0
        bad = [
            j
            for j, (loss, gram) in enumerate(zip(losses, grams, strict=True))
            if not (math.isfinite(loss) and gram.finite)
        ]
        j = bad[0] if bad else 0
        names = [repr(self._passes[i].constraint.name) for i in bad if self._passes[i].constraint.name is not None]
        culprit = "retention pass" + (f" of {' and of '.join(names)}" if names else "")
        if not math.isfinite(grams[j].tt):
            culprit = "task gradient"
        skipped = self._shared["craft_skipped"]
        first = self._layout is None or self._layout.first
        if first and skipped in (1.0, 10.0, 100.0, 1000.0):
            warn(
                f"The {culprit} is not finite (L_ret = {losses[j]:g}, |g_ret|^2 = {grams[j].rr:g}, |g_task|^2 = "
                f"{grams[j].tt:g}): step {int(self._shared['craft_step'])} used the task gradient alone{where}. "
                f"Skipped so far: {int(skipped)} (reported again at 10, 100, 1000).",
            )


def _same_memory(t: Tensor | None, r: Tensor | None) -> bool:
    if t is None or r is None or t.is_sparse or r.is_sparse or t.numel() == 0:
        return False
    return t.data_ptr() == r.data_ptr()
