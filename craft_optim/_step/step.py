"""The retention step: task gradients in `.grad` become merged gradients in `.grad`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from craft_optim._warn import warn
from craft_optim.dual import Update
from craft_optim.metrics import METRICS, keyed

from .constraint import Constraint, Passed, RetentionPass
from .decision import Decision, Gram, Products, decide
from .gradients import Gradients, Stash, gradients_of, not_zero, present, put
from .layout import Layout
from .pace import PACE, halved, hurried, paced, starting
from .rules import Rules
from .surgery import GradientSets
from .trust import KeptValues

__all__ = ["SHARED_STATE", "RetentionStep", "put_together", "split_state"]

SHARED_STATE = {"craft_step": 0.0, "craft_skipped": 0.0, **PACE}
"""Floats of the state that belong to no constraint, before the first step"""


def split_state(group: Mapping[str, Any]) -> tuple[dict[str, float], dict[str | None, dict[str, float]]]:
    """The shared floats of a group, and those of each constraint by its name, without the name in their keys."""
    shared: dict[str, float] = {}
    own: dict[str | None, dict[str, float]] = {}
    for key, value in group.items():
        if key.startswith("craft_"):
            what, _, name = key.partition("/")
            (shared if what in SHARED_STATE else own.setdefault(name or None, {}))[what] = value
    return shared, own


# Every floating dtype with gradients can hold this, float8 too: a norm below it needs no check of the parameters
_HELD_BY_ALL = 240.0
# Passes whose anchors measure, at the start, how far a step leads: one alone may be unusual
_LOOKS = 2


def _recorded(name: str) -> AbstractContextManager[object]:
    """A range in the profile, if profiling: an unused range would take a tenth of a step's additional time."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


class _Measured(NamedTuple):
    """The retention passes of one evaluation.

    Attributes:
        sets: Task gradients and scaled retention gradients, their parts on this process.
        task: Task gradients from the stash.
        passed: Result of each pass.
        products: Inner products over all processes, without the scales.
        losses: L_ret of each constraint.
    """

    sets: GradientSets
    task: Gradients
    passed: list[Passed]
    products: Products
    losses: list[float]


class Objective(NamedTuple):
    """Objective whose gradient is the merged gradient: `task` L_task + `retention`.

    Attributes:
        task: Coefficient a of the task loss.
        retention: sum_j w_j L_j; negative if the base ascends.
    """

    task: float
    retention: float


class RetentionStep:
    """One retention step, or all evaluations of a line search, on the same anchors and with the same coefficients.

    Args:
        constraints: One constraint without a name, or several by name.
        rules: The rules of the merge.
        parameters: All parameters of the optimizer.
        ascended: For each parameter, True if the base steps along its gradient, not against it.
        state: Group with the `craft_*` floats before the step.
        layout: Layout of the processes.
        shorten: False if the base may need its whole step; see `shorten`.
        find_reached: True to find the tensors that the retention losses reach: one more read of their gradients.

    Attributes:
        passes: Pass of each constraint.
        metrics: Measured values; empty if nothing was measured.
        reached: Name -> for each parameter, True if its retention gradient, on any process, is not zero; empty if not
            requested.

    Raises:
        ValueError: An epsilon(t) is negative or not finite.
    """

    def __init__(
        self,
        constraints: Mapping[str | None, Constraint],
        rules: Rules,
        parameters: list[Tensor],
        *,
        ascended: Sequence[bool],
        state: Mapping[str, Any],
        layout: Layout,
        shorten: bool = True,
        find_reached: bool = False,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self.reached: dict[str | None, list[bool]] = {}
        self._rules, self._layout, self._ascended = rules, layout, ascended
        self._parameters, self._find_reached = parameters, find_reached
        self._shared, own = split_state(state)
        step = int(self._shared["craft_step"])
        self.passes = [
            RetentionPass(name, constraint, step, parameters, ascended=ascended, state=own[name], layout=layout)
            for name, constraint in constraints.items()
        ]
        self._trust, self._starting = rules.trust_region if shorten else None, starting(self._shared)
        self._kept: KeptValues | None = None
        self._before: Tensor | None = None  # L_ret of the anchors that measure how far the step leads
        self._stash: Stash | None = None
        self._decision: Decision | None = None  # of the first evaluation, if it was finite

    @property
    def ran(self) -> bool:
        """True if there was anything to merge."""
        return self._stash is not None

    @property
    def state(self) -> dict[str, float]:
        """The floats to write once the base has stepped."""
        state = dict(self._shared)
        for run in self.passes:
            end = "" if run.name is None else f"/{run.name}"
            state |= {what + end: x for what, x in run.state.items()}
        return state

    def check(self) -> None:
        """Makes the closures check the model if a first pass would; see `Retention.check`."""
        with self._layout.own_reduction():
            for run in self.passes:
                run.check()

    @contextmanager
    def task_gradients_back(self) -> Iterator[None]:
        """Restores the task gradients in `.grad` after the block, also after an exception."""
        try:
            yield
        finally:
            if self._stash is not None:
                self._stash.give_back(self._parameters)

    @torch.no_grad()
    def merge(self) -> Objective:
        """Runs the retention passes and points `.grad` at the merged gradients.

        If anything was not finite, it points at the task's. Further evaluations use the coefficients of the first: a
        line search compares values of one function, the returned one, whose gradient is the merged gradient. If the
        first was not finite, all use the task's alone.
        """
        if self.ran and self._decision is None:
            self._stash = Stash(gradients_of(self._parameters), "copy")
            return Objective(1.0, 0.0)
        gradients = gradients_of(self._parameters)
        wanted = present(gradients)
        self._stash = Stash(gradients, self._rules.gradient_memory)
        del gradients  # frees their memory if they are stored elsewhere
        sets, task, passed, products, losses = self._measured(self._stash, wanted)
        finite = products.finite and all(map(math.isfinite, losses))
        decision = self._decision
        if finite and decision is None:
            decision = self._decided(products, losses)
        if decision is None or not finite:
            self._stash.give_back(self._parameters)
            self._note_skip(losses, products.grams)
            return self._objective(losses)
        self._decision = decision
        for run in self.passes:
            run.passed()
        if self._find_reached and not self.metrics:
            device = next(p.device for p in self._parameters)
            touched = self._layout.any(wanted, device)
            for run, retention in zip(self.passes, sets.retention, strict=True):
                reached = self._layout.any(not_zero(retention), device)
                # Untouched parameters do not drift
                self.reached[run.name] = [r or not t for r, t in zip(reached, touched, strict=True)]
        with _recorded("CraftOptimizer.merge"):
            merged = sets.merge_(
                [c._replace(retention=c.retention / of.scale) for c, of in zip(decision.merges, passed, strict=True)]
            )
            merged = self._layout.wrapped(merged, self._parameters, task, *(of.gradients for of in passed))
            put(self._parameters, self._stash.in_their_dtype(merged))
        if not self.metrics:  # first evaluation of a line search, at the step's start
            self.metrics = self._report(losses, products.grams, decision)
            self._keep()
        return self._objective(losses)

    def _keep(self) -> None:
        """Copies the parameters that the base will move, if its step may lead too far. Collective."""
        if self._trust is None or not any(run.drift.may_leave(self._trust, self._starting) for run in self._watched):
            return
        touched = [p for p in self._parameters if p.grad is not None]
        local = self._layout.local([p.detach() for p in touched], touched)
        self._before = self._look()
        self._kept = KeptValues([x for x in local if x is not None], host=self._rules.gradient_memory == "host")

    @property
    def _watched(self) -> list[RetentionPass]:
        return [run for run in self.passes if run.bounds_steps]

    def keep_whole_step(self) -> None:
        """Makes `shorten` do nothing: the base needs its whole step."""
        self._kept = None

    def shorten(self) -> None:
        """Goes back along the base's step as far as the trust region requires. Collective."""
        if self._kept is None or self._before is None or self._trust is None:
            return
        looks = self._layout.mean(torch.stack([self._before, self._look()])).tolist()
        share = min(
            run.drift.share_of_step(before, after, self._starting, self._trust)
            for run, before, after in zip(self._watched, *looks, strict=True)
        )
        if share < 1.0:
            self._kept.go_back(share)
            self._shared |= hurried(self._shared)
            self.metrics["interval"] = 1.0
        self.metrics["step_kept"] = share
        self._kept = self._before = None

    def _look(self) -> Tensor:
        """L_ret of each watched constraint on anchors of coming passes, on this process."""
        found = [run.look(_LOOKS if self._starting else 1) for run in self._watched]
        return torch.stack([x.to(found[0].device) for x in found])

    def _decided(self, products: Products, losses: Sequence[float]) -> Decision | None:
        """The decision of the step, with the controllers updated; None if gradients cannot hold its result."""
        for run, loss in zip(self.passes, losses, strict=True):
            run.saw(loss)
        violation = max(run.drift.violation for run in self.passes)
        most = min(run.drift.most_steps for run in self.passes)
        pace, steps = paced(self._shared, violation, self._rules, most)
        updates = self._updates(products, losses, steps)
        while self._rules.retention_every == "auto" and steps > 1 and any(update.capped for update in updates):
            pace, steps = halved(pace, steps)
            updates = self._updates(products, losses, steps)
        decision = decide(
            products,
            lams=[update.multiplier for update in updates],
            project=[run.may_project(self._rules.projection) for run in self.passes],
            rules=self._rules,
        )
        if decision.norm > _HELD_BY_ALL and decision.norm > self._largest:
            return None
        for run, update in zip(self.passes, updates, strict=True):
            run.use(update)
        self._shared |= pace
        return decision

    @property
    def _largest(self) -> float:
        """The largest number that all gradients can hold."""
        # Over all trained parameters, the same on every process; a quantised model's integers do not train
        return min(torch.finfo(dtype).max for dtype in {p.dtype for p in self._parameters if p.requires_grad})

    def _objective(self, losses: Sequence[float]) -> Objective:
        if self._decision is None:
            return Objective(1.0, 0.0)
        held = sum(merge.retention * loss for merge, loss in zip(self._decision.merges, losses, strict=True))
        return Objective(self._decision.merges[0].task, -held if all(self._ascended) else held)

    def _measured(self, stash: Stash, wanted: list[bool]) -> _Measured:
        """Runs the retention passes and the inner products.

        Repeats a pass whose gradients overflow, as long as a smaller scale may help.
        """
        passed: dict[RetentionPass, Passed] = {}
        while True:
            for run in self.passes:
                if run not in passed:
                    with _recorded("CraftOptimizer.retention"):
                        passed[run] = run.gradients(wanted)
            found = [passed[run] for run in self.passes]
            with _recorded("CraftOptimizer.merge"):
                task = stash.for_surgery()
                sets = self._sets(task, [of.gradients for of in found])
                told = [flag for of in found for flag in of.averaged.told]
                scaled, read = sets.inner_products(
                    *(of.loss for of in found), *self._on_device(told), reduce=self._layout.reduce
                )
            losses, heard = read[: len(found)], read[len(found) :]
            for run, reached in zip(self.passes, heard[1::2], strict=False):
                run.check_reached(reached > 0.0)
            if any(heard[::2]):
                # Some process had gradients beyond the agreed ones; they change the products
                del task, sets, found
                for run, more in zip(self.passes, heard[::2], strict=True):
                    if more > 0.0:
                        passed[run] = run.complete(passed[run])
                continue
            products = scaled.unscaled([of.scale for of in found])
            again = [
                run
                for run, loss, gram, of in zip(self.passes, losses, products.grams, found, strict=True)
                if run.float16
                and math.isfinite(loss)
                and math.isfinite(gram.tt)
                and not gram.finite
                and run.overflowed(of.scale)
            ]
            if not again:
                break
            del task, sets, found
            for run in again:
                del passed[run]
        for run in self.passes:
            run.count()
        return _Measured(sets, task, found, products, losses)

    def _on_device(self, flags: Sequence[float]) -> list[Tensor]:
        """Flags as scalars on the first parameter's device; filled there, as the host would wait for a copy."""
        if not flags:
            return []
        return [torch.full((), flag, dtype=torch.float64, device=self._parameters[0].device) for flag in flags]

    def _sets(self, task: Gradients, retention: Sequence[Gradients]) -> GradientSets:
        """The gradients' parts on this process."""
        lists = [self._layout.local(gradients, self._parameters) for gradients in (task, *retention)]
        sets = GradientSets(lists[0], lists[1:], self._layout.shares)
        if sets.share_memory:
            raise RuntimeError(
                "The retention backward wrote its gradients into the memory of the task gradients, or of another "
                "constraint's, which are lost now: a wrapper of the model keeps its own gradient buffers. Let the "
                "retention closure run the model that is wrapped (`.module`)."
            )
        return sets

    def _updates(self, products: Products, losses: Sequence[float], steps: int) -> list[Update]:
        """The controllers' answers, for a pass that stands for `steps` steps.

        A controller gets all limits of its multiplier: against an unknown one it would wind up.
        """
        rho = self._rules.rho * steps
        caps = [
            # Without a gradient no multiplier helps
            0.0 if gram.rr == 0.0 and loss > run.epsilon else min(cap, self._rules.most)
            for run, loss, gram, cap in zip(self.passes, losses, products.grams, products.caps(rho), strict=True)
        ]
        units = [math.sqrt(gram.tt / gram.rr) if gram.rr > 0.0 else math.inf for gram in products.grams]
        updates = self._asked(losses, caps, units, steps)
        factor = products.common_factor([update.multiplier for update in updates], rho)
        if factor < 1.0:
            updates = self._asked(losses, [update.multiplier * factor for update in updates], units, steps)
        return updates

    def _asked(
        self, losses: Sequence[float], caps: Sequence[float], units: Sequence[float], steps: int
    ) -> list[Update]:
        return [
            run.asked(loss, cap, unit, steps)
            for run, loss, cap, unit in zip(self.passes, losses, caps, units, strict=True)
        ]

    def _report(self, losses: Sequence[float], grams: Sequence[Gram], decision: Decision) -> dict[str, float]:
        rows = {
            run.name: {
                "retention_loss": loss,
                "drift": run.drift.average,
                "epsilon": run.epsilon,
                **run.heldout,
                "lambda": run.state["craft_lambda"],
                "violation": run.drift.violation,
                "grad_dot": gram.tr,
                "grad_cos": gram.cos,
                "conflict": float(conflict),
                "projected": float(projected),
                "retention_grad_norm": math.sqrt(gram.rr),
                "capped": float(run.update is not None and run.update.capped),
            }
            for run, loss, gram, conflict, projected in zip(
                self.passes, losses, grams, decision.conflict, decision.projected, strict=True
            )
        }
        return put_together(rows) | {
            "task_grad_norm": math.sqrt(grams[0].tt),
            "merged_grad_norm": decision.norm,
            "clipped": float(decision.clipped),
            "step_kept": 1.0,
            "interval": self._shared["craft_next"] - self._shared["craft_step"],
            "skipped": self._shared["craft_skipped"],
        }

    def _note_skip(self, losses: Sequence[float], grams: Sequence[Gram]) -> None:
        skipped = self._shared["craft_skipped"] = self._shared["craft_skipped"] + 1.0
        bad = [
            j
            for j, (loss, gram) in enumerate(zip(losses, grams, strict=True))
            if not (math.isfinite(loss) and gram.finite)
        ]
        j = bad[0] if bad else 0
        names = [repr(self.passes[i].name) for i in bad if self.passes[i].name is not None]
        culprit = "retention pass" + (f" of {' and of '.join(names)}" if names else "")
        if not math.isfinite(grams[j].tt):
            culprit = "task gradient"
        elif not bad:
            culprit = "merged gradient, in its dtype,"
        if self._layout.first and skipped in (1.0, 10.0, 100.0, 1000.0):
            warn(
                f"The {culprit} is not finite (L_ret = {losses[j]:g}, |g_ret|^2 = {grams[j].rr:g}, |g_task|^2 = "
                f"{grams[j].tt:g}): step {int(self._shared['craft_step'])} used the task gradient alone. "
                f"Skipped so far: {int(skipped)} (reported again at 10, 100, 1000).",
            )


def put_together(rows: Mapping[str | None, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of all constraints, under their names, and without a name for all; see `metrics.Metric`.

    Args:
        rows: Name of a constraint, None if it has none, -> its own metrics.
    """
    worst = max(rows.values(), key=lambda row: -math.inf if math.isnan(row["violation"]) else row["violation"])
    whole = dict(worst)
    for name, row in rows.items():
        if name is not None:
            whole |= {what: max(whole[what], row[what]) for what in worst if METRICS[what].largest}
            whole |= {keyed(what, name): x for what, x in row.items()}
    return whole
