"""Constraint: a retention loss, its epsilon and the controller of its multiplier; and its pass in one step."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craft_optim._conditions import held
from craft_optim.dual import Controller, Update, make_controller
from craft_optim.retention import Retention, RetentionClosure, as_retention, measurable
from craft_optim.schedules import Schedule, as_schedule, epsilon_at

from . import scaling
from .decision import MOST
from .drift import DRIFT, Drift
from .gradients import (
    Gradients,
    Graph,
    any_of,
    gradients_of,
    graph_of,
    leaves,
    not_among,
    put,
    set_aside,
    without_hooks,
)
from .layout import Averaged, Layout
from .rules import Projection

__all__ = [
    "Constraint",
    "Passed",
    "RetentionPass",
    "constraints_of",
    "initial_state",
    "prefix",
]

_EPSILON, _DUAL = 0.05, "pi"
_HOOKS = attrgetter("_post_accumulate_grad_hooks")


@dataclass(frozen=True)
class Constraint:
    """One constraint of several, L_ret <= epsilon(t).

    Args:
        retention: Closure that returns L_ret on its next anchors: a `craft_optim.Retention`, or a function without
            arguments.
        epsilon: The drift to allow, in the unit of L_ret: a number, a `craft_optim.schedules` object, or any callable
            step -> float.
        dual: Controller of lambda: "pi", "ascent", "nupi", "augmented_lagrangian" or a `craft_optim.dual.Controller`.
        heldout: Held-out anchors, as `retention.drift` takes them: epsilon is then the drift on these. 128 of them are
            measured, without a backward, in a pass every 25 steps. The anchors' epsilon becomes epsilon times the ratio
            of drift on the anchors to drift on these, averaged over measurements; at least epsilon / 30.

    Attributes:
        closure: `retention` as a `Retention`.
        schedule: `epsilon` as a function of the step.
        controller: `dual` as an object.

    Raises:
        TypeError: `retention` cannot be called, or cannot measure `drift` for `heldout`; or `epsilon` or `dual` has a
            wrong type.
        ValueError: A value is out of its range, a name is unknown, or `heldout` is of another kind.

    Example:
        >>> import torch
        >>> from craft_optim import Constraint, CraftOptimizer
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> base = torch.optim.SGD([w], lr=0.1)
        >>> optimizer = CraftOptimizer(
        ...     base, {"first": Constraint(lambda: w[0] ** 2, 0.5), "second": Constraint(lambda: w[1] ** 2, 0.1)}
        ... )
        >>> w.sum().backward()
        >>> optimizer.step()
        >>> optimizer.metrics["epsilon/second"]
        0.1
    """

    retention: RetentionClosure
    epsilon: float | Schedule = _EPSILON
    dual: str | Controller = _DUAL
    heldout: Any = None
    closure: Retention = field(init=False, repr=False, compare=False)
    schedule: Schedule = field(init=False, repr=False, compare=False)
    controller: Controller = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = {
            "closure": as_retention(self.retention, "retention"),
            "schedule": as_schedule(self.epsilon),
            "controller": make_controller(self.dual),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        if self.heldout is not None:
            measurable(self.closure).check_anchors(self.heldout)


Constraints = RetentionClosure | Constraint | Mapping[str, RetentionClosure | Constraint] | Sequence[Constraint]
"""One constraint without a name, or several by name or by place, as `CraftOptimizer` takes them."""


def constraints_of(
    given: Constraints | None,
    epsilon: float | Schedule | None = None,
    dual: str | Controller | None = None,
    heldout: Any = None,
) -> dict[str | None, Constraint]:
    """The constraints by name, None for a single one without a name; empty for None.

    Args:
        given: Constraints as `CraftOptimizer` takes them. Places of a list are the names "0", "1", ...
        epsilon: Epsilon of closures that are not a `Constraint`; None for 0.05.
        dual: Controller for closures that are not a `Constraint`; None for "pi".
        heldout: Held-out anchors of one closure that is not a `Constraint`.

    Raises:
        TypeError: One cannot be called, or a name is not a string.
        ValueError: There is no constraint, too many, a name that cannot be part of a key, or a Constraint with a
            separate `epsilon`, `dual` or `heldout`.
    """
    what = "`retention_closure`"
    if given is None:
        return {}
    named: dict[Any, Any] = {None: given}
    if isinstance(given, list | tuple):
        given = {str(place): one for place, one in enumerate(given)}
    if isinstance(given, Mapping):
        named = dict(given)
        for name in named:
            if not isinstance(name, str):
                raise TypeError(f"Names in {what} must be strings. Found {name!r}.")
            if not name or "/" in name:
                raise ValueError(
                    f'Names in {what} must not be empty or contain "/": metrics are called "lambda/name". '
                    f"Found {name!r}."
                )
    if not named:
        raise ValueError(f"{what} must name at least one closure, or be None. Found none.")
    if len(named) > MOST:
        raise ValueError(
            f"{what} may name at most {MOST} closures, since each is a pass of its own. Found {len(named)}. Put those "
            "that may share an epsilon into one `craft_optim.anchors.CombinedRetention`."
        )
    ready = [one for one in named.values() if isinstance(one, Constraint)]
    for setting, value in (("epsilon", epsilon), ("dual", dual), ("heldout", heldout)):
        if ready and value is not None:
            raise ValueError(
                f"`{setting}` is the closures' that are no Constraint, and {what} has {len(ready)} Constraint objects. "
                f"Found {setting}={value!r}: say it in each, Constraint(retention, {setting}=...)."
            )
    if heldout is not None and len(named) > 1:
        raise ValueError(
            f"`heldout` is one closure's, and {what} names {len(named)}: say it in each, Constraint(retention, "
            "heldout=...)."
        )

    def constraint(name: str | None, one: Any) -> Constraint:
        if isinstance(one, Constraint):
            return one
        as_retention(one, "retention_closure" if name is None else f"retention_closure[{name!r}]")
        return Constraint(one, _EPSILON if epsilon is None else epsilon, _DUAL if dual is None else dual, heldout)

    return {name: constraint(name, one) for name, one in named.items()}


def initial_state(controller: Controller) -> dict[str, float]:
    """The floats of one constraint before its first pass."""
    dual = {f"craft_dual_{key}": float(value) for key, value in controller.initial_state().items()}
    return {"craft_lambda": 0.0, "craft_anchor_position": 0.0, **DRIFT, **scaling.initial_scale(), **dual}


_HELDOUT_COUNT = 128  # anchors


def prefix(name: str | None) -> str:
    """The beginning of a message about a constraint."""
    return "" if name is None else f"Constraint {name!r}: "


class Passed(NamedTuple):
    """The result of one pass.

    Attributes:
        loss: L_ret, a tensor without a graph.
        gradients: The gradients of `scale` times the loss, as autograd left them.
        scale: The private loss scale; 1 without float16.
        averaged: The gradients as the layout averaged them.
    """

    loss: Tensor
    gradients: Gradients
    scale: float
    averaged: Averaged


class RetentionPass:
    """Pass of one constraint's closure in one step, isolated from everything else, and its multiplier.

    A line search runs the pass once for each evaluation: the same number, so the same anchors.

    Args:
        name: Name of the constraint; None if it has none.
        constraint: The constraint.
        step: Optimizer steps before this one.
        parameters: All parameters of the optimizer. The stash holds their `.grad`, which after a pass is None or the
            pass' gradient.
        ascended: For each parameter, True if the base steps along its gradient, not against it.
        state: The constraint's own `craft_*` floats before the step.
        layout: Layout of the processes.

    Attributes:
        name, constraint: The arguments.
        epsilon: Epsilon at this step; the anchors' if held-out ones adapt it.
        state: The floats after the step.
        drift: Knowledge of the drift; a view of `state`.
        float16: True if float16 took part in the last pass.
        update: The controller's answer; None before its call.

    Raises:
        ValueError: epsilon(t) is negative or not finite, or a controller's multiplier is.
    """

    def __init__(
        self,
        name: str | None,
        constraint: Constraint,
        step: int,
        parameters: list[Tensor],
        *,
        ascended: Sequence[bool],
        state: dict[str, float],
        layout: Layout,
    ) -> None:
        self.name, self.constraint, self.state, self.float16 = name, constraint, state, False
        self._step, self.drift = step, Drift(state, epsilon_at(constraint.schedule, step))
        self.update: Update | None = None
        self._closure, self._parameters, self._layout = constraint.closure, parameters, layout
        self._ascended = ascended
        self._number = int(state["craft_anchor_position"])

    def gradients(self, wanted: list[bool]) -> Passed:
        """Runs the closure and its backward on the anchors of this step.

        Args:
            wanted: For each parameter, True if it has a task gradient. The base leaves a parameter without one on any
                process untouched; its retention gradient is left out.
        """
        put(self._parameters, [None] * len(self._parameters))  # the stash has them
        with self._layout.own_reduction(), torch.enable_grad(), held() as conditions:
            loss, graph, scale = self._scaled_loss()
            named = list(self._closure.parameters())
            if not (named and self._layout.several):  # sharding frameworks put their own tensors into the graph
                named += leaves(graph)
            others = not_among(named, self._parameters)
            del graph  # it is freed as the backward goes
            left_out = [] if all(wanted) else [p for p, want in zip(self._parameters, wanted, strict=True) if not want]
            # Where the base ascends the sign is turned first
            early = nullcontext() if any(self._ascended) else self._layout.during_backward(self._parameters, self.name)
            with set_aside(others), without_hooks([*others, *left_out]):
                hooked = [(p, p._version) for p in compress(self._parameters, map(_HOOKS, self._parameters))]
                with early, conditions():
                    loss.backward()  # type: ignore[no-untyped-call]
                self._check_unmoved(hooked)
                retention = gradients_of(self._parameters)
        if any(self._ascended):
            for g, ascended in zip(retention, self._ascended, strict=True):
                if g is not None and ascended:
                    g.neg_()
        averaged = self._layout.averaged(retention, self._parameters, wanted, self.name)
        if not averaged.told:
            self.check_reached(any_of(retention, self._parameters))
        return self._passed(loss.detach() if scale == 1.0 else loss.detach() / scale, averaged, scale)

    def complete(self, passed: Passed) -> Passed:
        """The pass completed by gradients that some process had beyond the agreed ones. Collective."""
        return self._passed(passed.loss, self._layout.added(passed.averaged, self._parameters, self.name), passed.scale)

    def _passed(self, loss: Tensor, averaged: Averaged, scale: float) -> Passed:
        """The pass, with gradients of the parameters that the base will touch."""
        gradients, wanted = averaged.gradients, averaged.wanted
        if not all(wanted):
            gradients = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
        return Passed(loss, gradients, scale, averaged)

    def _check_unmoved(self, hooked: Sequence[tuple[Tensor, int]]) -> None:
        """Raises if a hook has stepped in the backward, on the retention gradient alone, as versions show."""
        if moved := [tuple(p.shape) for p, version in hooked if p._version != version]:
            raise RuntimeError(
                f"{prefix(self.name)}A hook of `register_post_accumulate_grad_hook` has changed {len(moved)} of the "
                f"optimizer's parameters in the retention backward (the first has shape {moved[0]}): an optimizer that "
                "steps in the backward would step on the retention gradient. Give each parameter to one optimizer, "
                "and remove the hook from those that CraftOptimizer has."
            )

    def check(self) -> None:
        """Has the closure check the model, before the first pass of a run."""
        if self._number == 0:
            self._closure.check()

    def count(self) -> None:
        """Records in the state that the anchors of this step have been used."""
        self.state["craft_anchor_position"] = self._number + 1.0

    def _scaled_loss(self) -> tuple[Tensor, Graph, float]:
        """L_ret times the private scale, L_ret's graph, and the scale."""
        loss = self._closure.loss(self._number)
        _check_loss(loss, self.name)
        # In every pass: mixed precision may begin and end during a run
        graph = graph_of(loss)
        self.float16 = scaling.reaches_float16(graph)
        scale = self.state["craft_scale"] if self.float16 else 1.0
        wide = loss.float() if loss.dtype == torch.float16 else loss
        return (wide if scale == 1.0 else wide * scale), graph, scale

    def check_reached(self, reached: bool) -> None:
        """Raises unless the pass has reached a parameter, on any process."""
        if not reached:
            raise RuntimeError(
                f"{prefix(self.name)}The retention loss reaches none of the optimizer's parameters: every "
                "retention gradient is None. Does the closure run the model that is being trained (not a copy, not a "
                "re-created PEFT wrapper), and are the parameters behind the anchored output trainable? Under "
                "DeepSpeed ZeRO the optimizer owns flattened copies that no backward reaches: use DDP or FSDP2."
            )

    def overflowed(self, scale: float) -> bool:
        """Records an overflow in float16, with a smaller scale in the state; True if that may help."""
        if scale == 1.0:
            self.state |= scaling.initial_scale()  # no scale helps: the next pass must not pay for this one
            return False
        self.state |= scaling.shrunk(self.state)
        return True

    def passed(self) -> None:
        """Records a pass with finite gradients."""
        if self.float16:
            self.state |= scaling.grown(self.state)

    @property
    def epsilon(self) -> float:
        return self.drift.epsilon

    @property
    def bounds_steps(self) -> bool:
        """True if some drift is allowed, and the closure can be evaluated again on the same anchors."""
        return self.drift.asked_for > 0.0 and self._closure.repeats

    def saw(self, loss: float) -> None:
        """Adds L_ret of this pass to the drift; measures held-out anchors when due. Collective."""
        self.drift.saw(loss)
        if self.constraint.heldout is None or not self.drift.wants_heldout(self._step):
            return
        with self._layout.without_backward():
            found = self._closure.drift(self.constraint.heldout, _HELDOUT_COUNT)
        if self._layout.several:  # each has measured all, but machines round differently
            place = next(p.device for p in self._parameters)
            found = float(self._layout.mean(torch.tensor(found, dtype=torch.float64, device=place)))
        self.drift.saw_heldout(found, self._step)

    @property
    def heldout(self) -> dict[str, float]:
        """The metrics of held-out anchors; none without them."""
        if self.constraint.heldout is None:
            return {}
        return {"epsilon_heldout": self.drift.asked_for, "heldout": self.drift.heldout}

    def look(self, passes: int) -> Tensor:
        """L_ret now on the anchors of that many coming passes, without gradients.

        Not on this pass' anchors: its gradient holds them better than others.
        """
        with self._layout.without_backward(), torch.no_grad(), held():
            losses = [self._closure.loss(self._number + 1 + i).detach().float() for i in range(passes)]
        return torch.stack([loss.reshape(()) for loss in losses]).mean()

    def asked(self, loss: float, cap: float, unit: float, steps: int) -> Update:
        """The controller's answer; changes nothing."""
        dual = {k.removeprefix("craft_dual_"): v for k, v in self.state.items() if k.startswith("craft_dual_")}
        controller = self.constraint.controller
        update = controller(dual, loss=loss, epsilon=self.epsilon, cap=cap, unit=unit, steps=steps)
        if not 0.0 <= update.multiplier < math.inf:
            raise ValueError(
                f"{prefix(self.name)}A controller must return a finite multiplier >= 0. Found "
                f"multiplier={update.multiplier!r} of {controller!r}, for L_ret = {loss:g}."
            )
        return update

    def use(self, update: Update) -> None:
        """Uses an answer for the merges of this step."""
        self.update = update
        self.state |= {f"craft_dual_{k}": float(v) for k, v in update.state.items()}
        self.state["craft_lambda"] = update.multiplier

    def may_project(self, projection: Projection) -> bool:
        """True if the projection may remove the task gradient's conflicting part."""
        return projection == "always" or (projection == "violated" and self.drift.average > self.epsilon)


def _check_loss(loss: object, name: str | None) -> None:
    what = "`retention_closure`" if name is None else f"`retention_closure[{name!r}]`"
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{what} must return the retention loss as a tensor. Found {type(loss).__name__}. "
            "Return the loss itself, not loss.item(), and do not call backward."
        )
    if loss.numel() != 1:
        raise RuntimeError(
            f"{what} must return a scalar. Found a tensor of shape {tuple(loss.shape)}. Reduce it, for example with "
            ".mean()."
        )
    if not loss.requires_grad:
        raise RuntimeError(
            f"{what} returned a loss without a graph: it reaches no trainable parameter. Is it computed under no_grad, "
            "detached, or from a model whose parameters are all frozen?"
        )
