"""CraftOptimizer: any torch optimizer under the constraint that the model does not drift; the order of one step."""

import copy
import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from itertools import chain
from operator import call, is_
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from craft_optim._interrupts import interrupts_wait
from craft_optim._step import floats
from craft_optim._step.constraint import Constraint, Constraints, constraints_of, initial_state
from craft_optim._step.evaluations import (
    Evaluations,
    ascended,
    check_base,
    may_move,
    stands_still,
    values_back_after_errors,
    without_gradients,
)
from craft_optim._step.gradients import all_zero, gradients_of
from craft_optim._step.layout import ONE_PROCESS, Layout, layout_of
from craft_optim._step.pace import due
from craft_optim._step.rules import Rules
from craft_optim._step.step import SHARED_STATE, RetentionStep, split_state
from craft_optim._step.watch import REACH_AT, CapWatch, HeldOutWatch, SinkWatch, StepWatch, warn_of_little_reach
from craft_optim._warn import warn
from craft_optim._wrapper import Arguments, Wrapper
from craft_optim.dual import Controller, DualAscent, make_controller
from craft_optim.metrics import keyed
from craft_optim.retention import Retention, RetentionClosure
from craft_optim.schedules import Linear, Schedule, as_schedule

__all__ = ["CraftOptimizer"]

# Keywords that are no attributes: to set one would do nothing
_SETTINGS = {"epsilon", "dual", "heldout", *(field.name for field in fields(Rules))}


class CraftOptimizer(Wrapper):
    r"""Any torch optimizer, under the constraint that the model does not drift: L_ret <= epsilon(t).

    One step takes the task gradients g_t from `p.grad`, runs the retention closure and its backward (g_r), and lets the
    base optimizer step on

        g = a g_t + w g_r,        by default a = 1, w = lambda - p

    where p = <g_t, g_r> / |g_r|^2 while drift, an average of L_ret, is above epsilon and the gradients conflict, else
    0, and lambda follows L_ret / epsilon (`craft_optim.dual`). Drift also sets how often retention runs
    (`retention_every`), and a step that leads far beyond epsilon is shortened (`trust_region`). `p.grad` holds the task
    gradients again afterwards. Without a retention closure it is the base optimizer, bit for bit.

    Several constraints L_j <= epsilon_j(t): pass a mapping name -> closure or `Constraint`, or a list of `Constraint`.
    Each has a pass, a multiplier and metrics of its own, called "lambda/name" and so on; docs/constraints.md says how
    they are merged, what that costs and what cannot be combined with it. A mapping with one entry equals its closure
    alone.

    Pass this object wherever the loop used the base optimizer: schedulers, scalers, checkpoints. Its own state is a few
    floats named `craft_*` in every parameter group, among them the position. `load_state_dict` restores it, called on
    this object or on a base that is wrapped afterwards. A base that another CraftOptimizer of this process has wrapped
    starts anew.

    Cost of a step that runs retention: one forward and backward of the closure, one additional copy of the gradients
    while they live (see `gradient_memory`), about 5N elements of memory traffic, one read of the device. The first of
    these steps, and steps that might lead too far, also cost a copy of the parameters and forwards on anchors
    (`Rules`). Other steps cost the base's step. Several processes add an all-reduce of a few numbers; DDP also one of
    all retention gradients.

    Args:
        base_optimizer: The optimizer that does the step.
        retention_closure: Function that returns L_ret on a batch of anchors, for example
            `craft_optim.anchors.LogitRetention`; several constraints as above; None for none.
        epsilon: The drift to allow, in the unit of L_ret: a number, a `craft_optim.schedules` object, or any callable
            step -> float. None: 0.05, or what each `Constraint` says.
        dual: Controller of lambda: "pi", "ascent", "nupi", "augmented_lagrangian" or a `craft_optim.dual.Controller`.
            None: "pi", or what each `Constraint` says.
        heldout: Held-out anchors, such as a second cache: epsilon is then the drift on these, see `Constraint`. None:
            epsilon is the drift on the anchors.
        process_group: Group of the processes over which gradients of plain (not sharded) parameters are averaged. None:
            that of the DDP module that holds the parameters; needed where gradients are averaged in another way. False:
            no group.
        on_metrics: Function called with `metrics` after every retention step, for example
            `craft_optim.metrics.JSONLWriter`; one of several processes calls it.
        rules: Fields of `craft_optim.Rules` by keyword, such as `rho`, `retention_every` and `max_grad_norm`.

    Attributes:
        metrics: Floats measured on the last retention step; `craft_optim.metrics.METRICS` says what each one is. Empty
            before the first.
        rules: The `Rules`; another object may be set.
        base_optimizer: The wrapped optimizer.
        retention_closure: The closure or closures; may be set again, for example after unpickling. The position of a
            new closure starts at 0.

    Raises:
        TypeError: If `base_optimizer` is not an optimizer or has been wrapped by a framework already, or
            `retention_closure` or `dual` cannot be called, or `process_group` is not a group, or a keyword is unknown.
        ValueError: If a value is out of its range, a name is unknown, settings cannot be combined, or two groups share
            a parameter.

    Example:
        >>> import torch
        >>> from craft_optim import CraftOptimizer
        >>> model = torch.nn.Linear(2, 1)
        >>> start = [p.detach().clone() for p in model.parameters()]
        >>> def drift():
        ...     return sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), start))
        >>> optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), drift, epsilon=0.01)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     loss = optimizer.step()
        >>> 0.008 < optimizer.metrics["drift"] < 0.012
        True
    """

    _base_moves: bool | None = None  # True if the base evaluates closures elsewhere; None: not yet known

    # Found out at the first retention pass, for these closures, parameters and processes.
    _layout: Layout
    _found_for: list[Callable[[], Any]]
    _measured: int  # retention steps since then

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        retention_closure: Constraints | None = None,
        *,
        epsilon: float | Schedule | None = None,
        dual: str | Controller | None = None,
        heldout: Any = None,
        process_group: "dist.ProcessGroup | Literal[False] | None" = None,
        on_metrics: Callable[[Mapping[str, float]], None] | None = None,
        **rules: Any,
    ) -> None:
        if unknown := sorted(set(rules) - {field.name for field in fields(Rules)}):
            known = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
            raise TypeError(
                f"CraftOptimizer has no `{unknown[0]}`. Its keywords are {', '.join(known[2:])}; a controller of your "
                "own is dual=craft_optim.dual.DualAscent(...)."
            )
        self.process_group = process_group
        self._rules = Rules(**rules)
        self._epsilon = None if epsilon is None else as_schedule(epsilon)
        self._dual = None if dual is None else make_controller(dual)
        self._heldout = heldout
        super().__init__(base_optimizer)
        self._constraints = self._checked(retention_closure)
        self._left: dict[str | None, weakref.ref[Retention]] = {}  # closures whose positions are in the state

        self.on_metrics = on_metrics
        self.metrics: dict[str, float] = {}
        self._cap_watch, self._sink_watch = CapWatch(), SinkWatch()
        self._heldout_watch, self._step_watch = HeldOutWatch(), StepWatch()
        self._lost_closure = False
        self._forget_circumstances()
        floats.begin_anew(base_optimizer, self)
        self._groups_changed()

    @classmethod
    def published(
        cls,
        base_optimizer: torch.optim.Optimizer,
        retention_closure: Constraints,
        *,
        total_steps: int,
        **overrides: Any,
    ) -> "CraftOptimizer":
        """Builds the published method, with its behaviour and defaults, for comparison.

        Dual ascent with eta = 0.01, lambda_0 = 1, lambda_max = 10 and no cap; epsilon from 1 to 0.1, linear over
        `total_steps`; projection always, where the cosine is below -0.1; every 5 steps.

        Args:
            base_optimizer: The optimizer that does the step.
            retention_closure: Closure or closures, as for the class.
            total_steps: Length of training in optimizer steps.
            overrides: Any keyword of the class.
        """
        settings: dict[str, Any] = {
            "epsilon": Linear(1.0, 0.1, total_steps),
            "dual": DualAscent(1.0, 0.01, 10.0),
            "rho": math.inf,
            "projection": "always",
            "conflict_threshold": -0.1,
            "retention_every": 5,
            "trust_region": None,
        }
        return cls(base_optimizer, retention_closure, **(settings | overrides))

    @classmethod
    def bind(
        cls,
        optimizer_class: type[torch.optim.Optimizer],
        retention_closure: Constraints | None,
        **craft: Any,
    ) -> "type[CraftOptimizer]":
        """Makes a class that builds the base and wraps it, for frameworks that need an optimizer class.

        Args:
            optimizer_class: Class of the base, called as `optimizer_class(params, **kwargs)` with the framework's
                arguments.
            retention_closure: Closure or closures, as for the class.
            craft: Keywords of the class.

        Example:
            >>> import torch
            >>> AdamW = CraftOptimizer.bind(torch.optim.AdamW, None, epsilon=0.05)
            >>> AdamW(torch.nn.Linear(2, 1).parameters(), lr=1e-3).param_groups[0]["lr"]
            0.001
        """

        class Bound(CraftOptimizer):
            def __init__(self, params: Any, **kwargs: Any) -> None:
                super().__init__(optimizer_class(params, **kwargs), retention_closure, **craft)

            def __reduce_ex__(self, protocol: Any) -> Any:
                # A class made in a function cannot be found again by name; its objects unpickle as plain wrappers.
                return _empty_wrapper, (), self.__getstate__()

        Bound.__name__ = Bound.__qualname__ = f"Craft{optimizer_class.__name__}"
        return Bound

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS:
            remedy = "set `retention_closure`, with a `Constraint`"
            if name in Rules.__dataclass_fields__:
                remedy = f"set `rules`, dataclasses.replace(optimizer.rules, {name}={value!r})"
            raise AttributeError(f"`{name}` of an optimizer is not an attribute. Found {name}={value!r}: {remedy}.")
        if name == "process_group" and not (value is None or value is False or hasattr(value, "rank")):
            raise TypeError(
                "`process_group` must be a torch.distributed.ProcessGroup that this process belongs to, False or None. "
                f"Found process_group={value!r}."
            )
        super().__setattr__(name, value)

    @property
    def rules(self) -> Rules:
        return self._rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        if not isinstance(rules, Rules):
            raise TypeError(f"`rules` must be a craft_optim.Rules. Found {type(rules).__name__}.")
        rules.check_for(len(self._constraints))
        self._rules = rules

    @property
    def constraints(self) -> dict[str | None, Constraint]:
        """A copy of the constraints by name; the name is None for a single constraint without one."""
        return dict(self._constraints)

    @property
    def retention_closure(self) -> RetentionClosure | dict[str, RetentionClosure] | None:
        """The closure, or a mapping of closures, as given."""
        if None in self._constraints:
            return self._constraints[None].retention
        closures = {name: constraint.retention for name, constraint in self._constraints.items()}
        return cast(dict[str, RetentionClosure], closures) or None

    @retention_closure.setter
    def retention_closure(self, closure: Constraints | None) -> None:
        constraints = self._checked(closure)
        old = {name: weakref.ref(one.closure) for name, one in self._constraints.items()} or self._left
        closures = {name: one() for name, one in old.items()}
        self._left = {} if constraints else old
        self._constraints, self._lost_closure = constraints, False
        self._complete_groups()
        for name, constraint in constraints.items():
            if name in closures and closures[name] is not constraint.closure:  # anchors of its own, from the first
                anew = initial_state(constraint.controller).items()
                of_lambda = ("craft_lambda", "craft_dual_")  # which stays
                rest = {keyed(what, name): value for what, value in anew if not what.startswith(of_lambda)}
                floats.write(self.base_optimizer, rest)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._left = {}

    def _checked(self, closure: Constraints | None) -> dict[str | None, Constraint]:
        """The constraints by name; raises if they do not fit the rules."""
        constraints = constraints_of(closure, self._epsilon, self._dual, self._heldout)
        self._rules.check_for(len(constraints))
        if constraints:
            check_base(self.base_optimizer)
        return constraints

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, *others: Any, **named: Any) -> Any:  # type: ignore[override]
        """Does one optimizer step; see the class.

        Args:
            closure: The task's closure, as for any torch optimizer; retention is merged after each of its evaluations.
                Within one step all evaluations use the same anchors and the same coefficients a and w, so that a base
                with a line search sees one function: it gets a L_task + w L_ret as the closure's value. A base that has
                moved the parameters before it evaluates (LBFGS, SAM) costs a copy of them.
            others, named: Further arguments of the base's `step`.

        Returns:
            Result of the base's `step`; L_task instead of the merged value if that result is an evaluation's.

        Raises:
            ValueError: If epsilon(t) is negative or not finite, or the base differentiates through its step.
            RuntimeError: If another CraftOptimizer has wrapped the same base since.
            TypeError, RuntimeError: If the closure does not return a scalar with a graph, its gradient reaches none of
                the parameters, or there are several processes and it is not clear whether they train one model. Nothing
                has changed then: not the parameters, the state or the position. An error while the drift after a step
                is measured (`trust_region`) leaves the whole step done and counted.
        """
        floats.check_owner(self.base_optimizer, self)
        if not self._constraints:
            if self._lost_closure:
                self._lost_closure = False
                warn(
                    "This CraftOptimizer was unpickled, which leaves its retention closure behind: it now steps "
                    "without retention. Set `optimizer.retention_closure` again.",
                )
            return self._step_base(closure, (others, named))
        if not (closure is None or callable(closure)):
            raise TypeError(f"`closure` must be a function without arguments, or None. Found {type(closure).__name__}.")
        return self._constrained_step(closure, (others, named))

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]  # lazy, unlike torch.compiler.disable
    def _constrained_step(self, closure: Callable[[], Any] | None, more: Arguments) -> Any:
        if not floats.are_complete(self.base_optimizer):  # the base was given other groups
            self._groups_changed()
        groups = self.param_groups
        check_base(self.base_optimizer)
        step = int(groups[0]["craft_step"])
        if closure is None and self._is_priming(step):
            return self._prime_base()
        if not due(groups[0], self._rules) or (closure is None and without_gradients(self._each_parameter())):
            result = self._step_base(closure, more)
            self._count(step, None)
            self._finish(step, None)
            return result

        parameters = list(self._each_parameter())
        retention = RetentionStep(
            self._constraints,
            self._rules,
            parameters,
            ascended=ascended(self.base_optimizer),
            state=groups[0],
            layout=self._find_layout(parameters),
            shorten=closure is None or not (isinstance(self.base_optimizer, torch.optim.LBFGS) or self._base_moves),
            find_reached=self._measured + 1 == REACH_AT,
        )
        with interrupts_wait():
            with retention.task_gradients_back():
                if closure is None:
                    retention.merge()
                    result = self._step_base(None, more)
                else:
                    result = self._evaluated(closure, more, parameters, retention)
                try:
                    retention.shorten()
                finally:
                    self._count(step, retention)  # before anything else, as memory for the gradients, may be missing
            self._finish(step, retention)
        return result

    def _evaluated(
        self,
        closure: Callable[[], Any],
        more: Arguments,
        parameters: list[Tensor],
        retention: RetentionStep,
    ) -> Any:
        """Does the base's step on a closure that the base may evaluate at other parameters."""
        evaluations = Evaluations(closure, parameters, retention)
        moves = self._may_move
        if moves:
            retention.check()  # while the parameters are the caller's
        with values_back_after_errors(parameters) if moves else nullcontext():
            result = self._step_base(evaluations, more)
        if evaluations.moved:
            retention.keep_whole_step()
        self._base_moves = evaluations.moved or bool(self._base_moves)
        return evaluations.loss(result)

    @property
    def _may_move(self) -> bool:
        return may_move(self.base_optimizer) if self._base_moves is None else self._base_moves

    def _is_priming(self, step: int) -> bool:
        """True if a framework steps on zero gradients only to make the base create its state.

        torch.distributed.checkpoint does so, with lr = 0, whenever it saves or loads an optimizer without state.
        """

        if step != 0 and not stands_still(self.base_optimizer):
            return False
        parameters = list(self._each_parameter())
        layout = self._find_layout(parameters)
        # A shard may be all zero, or empty, where others are not: all processes must agree.
        zero = all_zero(layout.local(gradients_of(parameters), parameters))
        (moves,) = layout.any([not zero], next((p.device for p in parameters), torch.device("cpu")))
        return not moves

    def _find_layout(self, parameters: list[Tensor]) -> Layout:
        """The layout of the current parameters: frameworks replace them in the groups after an optimizer is made.

        Passes it on to the closures, which may be new, too.
        """
        closures = [constraint.closure for constraint in self._constraints.values()]
        world = dist.group.WORLD if dist.is_available() else None  # None before it is initialised
        found_for = [self.process_group, world, *closures, *parameters]
        # Not by ids, which others get when these are gone; nor held, since a framework may have made other parameters
        same = len(self._found_for) == len(found_for) and all(map(is_, map(call, self._found_for), found_for))
        if not same:
            self._forget_circumstances()
            self._found_for = [_reference(one) for one in found_for]
            self._layout = layout_of(parameters, self.process_group)
            if self._layout.several or any(closure.shared for closure in closures):
                for closure in closures:
                    closure.shard(self._layout.rank, self._layout.world_size, self._layout.mean)
        return self._layout

    def _count(self, step: int, retention: RetentionStep | None) -> None:
        state = retention.state if retention is not None and retention.ran else {}
        floats.write(self.base_optimizer, state | {"craft_step": float(step + 1)})

    def _finish(self, step: int, retention: RetentionStep | None) -> None:
        if retention is None or not retention.ran:
            if self.metrics:
                self.metrics["fresh"] = 0.0
            return
        if not retention.metrics:
            self.metrics |= {"skipped": retention.state["craft_skipped"], "fresh": 0.0}
            return
        self.metrics = retention.metrics | {"retention_step": float(step), "fresh": 1.0}
        self._measured += 1
        if self._measured == REACH_AT:
            names = [name for group in self.param_groups for name in group.get("param_names", ())]
            for name, reached in retention.reached.items():
                warn_of_little_reach(name, reached, list(self._each_parameter()), names, self._layout)
        if self._layout.first:  # the values are the same on every process: one of them reports
            if self.metrics["capped"] or self._cap_watch.counts:
                for name in self._constraints:
                    self._cap_watch.look(name, self.metrics, self._rules)
            self._step_watch.look(self.metrics)
            for name, constraint in self._constraints.items():
                if constraint.heldout is not None:
                    self._heldout_watch.look(name, self.metrics)
            if self.on_metrics is not None:
                self._sink_watch.tell(self.on_metrics, self.metrics)

    def _forget_circumstances(self) -> None:
        self._layout, self._found_for, self._measured = ONE_PROCESS, [], 0

    # -- our state: floats in every parameter group --------------------------------------------------------------------

    def _groups_changed(self) -> None:
        _, brought = split_state(dict.fromkeys(chain(*self.param_groups), 0.0))
        if brought and (new := [name for name in self._constraints if name not in brought]):
            warn(
                f"The state that was loaded is of constraints named {[*brought]} (None: without a name), and has "
                f"nothing of {new}: what is new begins with its first anchors and the first lambda. If it is not new, "
                "name it as in the run that was saved.",
            )
        self._complete_groups()

    def _complete_groups(self) -> None:
        """Completes the groups' floats; keeps those of named constraints until closures with other names are set."""
        known = dict(SHARED_STATE)
        controllers = {name: constraint.controller for name, constraint in self._constraints.items()}
        for name, controller in (controllers or {None: self._dual or make_controller("pi")}).items():
            known |= {keyed(what, name): value for what, value in initial_state(controller).items()}
        floats.complete(self.base_optimizer, known, keep_named=not self._constraints)

    def __getstate__(self) -> dict[str, Any]:
        # The closures and the sink hold models and files.
        left_behind = ("_constraints", "on_metrics", "process_group", "_layout", "_found_for", "_left")
        kept = {k: v for k, v in super().__getstate__().items() if k not in left_behind}
        return kept | {"_lost_closure": self._lost_closure or bool(self._constraints)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._constraints, self._left = {}, {}
        self.on_metrics = None
        self.process_group = None
        self._forget_circumstances()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CraftOptimizer":
        """A copy of the base, the state and the closures, which run the copied model; the sink is shared."""
        twin = cast(CraftOptimizer, super().__deepcopy__(memo))
        twin._constraints = {
            name: Constraint(copy.deepcopy(one.retention, memo), one.epsilon, one.dual, one.heldout)
            for name, one in self._constraints.items()
        }
        twin.on_metrics = self.on_metrics
        twin.process_group = self.process_group
        twin._lost_closure = self._lost_closure
        return twin

    def __repr__(self) -> str:
        of = ", ".join(
            f"{'' if name is None else f'{name}: '}epsilon={one.epsilon}, dual={one.dual}"
            for name, one in self._constraints.items()
        )
        return f"{type(self).__name__} ({of or 'no constraint'})\n{self.base_optimizer!r}"


def _reference(one: Any) -> Callable[[], Any]:
    """A function that returns the object, or None once it is gone."""
    return (lambda: one) if one is None or one is False else weakref.ref(one)


def _with_fields_of_rules(signature: inspect.Signature) -> inspect.Signature:
    """The signature with the fields of `Rules` instead of `**rules`."""
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in inspect.signature(Rules).parameters.values()]
    return signature.replace(parameters=[*own, *named])


CraftOptimizer.__init__.__signature__ = _with_fields_of_rules(inspect.signature(CraftOptimizer.__init__))  # type: ignore[attr-defined]


def _empty_wrapper() -> CraftOptimizer:
    return CraftOptimizer.__new__(CraftOptimizer)
