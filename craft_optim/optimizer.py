"""CraftOptimizer: the order of one step, and the `torch.optim.Optimizer` contract. No arithmetic."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from craft_optim._warn import warn
from craft_optim.constraints import (
    Closures,
    Constraint,
    by_name,
    check_names,
    constraints_at,
    controllers,
    each,
    keyed,
    of,
)
from craft_optim.decision import Granularity, Merge
from craft_optim.dual import Controller, DualAscent
from craft_optim.gradients import all_zero, gradients_of
from craft_optim.retention import Retention, RetentionClosure
from craft_optim.retention_step import SHARED_STATE, Projection, RetentionStep, Rules
from craft_optim.scaling import initial_scale
from craft_optim.schedules import Linear, Schedule, as_schedule
from craft_optim.stash import GradientMemory
from craft_optim.streaming import StreamingStep

if TYPE_CHECKING:
    from craft_optim.distributed import Layout

__all__ = ["CraftOptimizer", "RetentionClosure"]

# Steps in a row with lambda at its cap and the constraint violated before a warning says so.
_PATIENCE_AT_CAP = 100
_LEAST_PATIENCE = 20  # with a large `retention_every`, where a hundred may be more than the run has
# The retention step that shows how much of the model retention reaches. Earlier gradients may be zero for good reasons:
# at the teacher's own weights, or of a LoRA matrix whose partner is still zero.
_REACH_AT = 10
_LITTLE_REACH = 0.1


class CraftOptimizer(torch.optim.Optimizer):
    r"""Any torch optimizer, under the constraint that the model does not drift: L_ret <= epsilon(t).

    One step takes the task gradients g_t from `p.grad`, runs the retention closure and its backward (g_r), and lets the
    base optimizer step on

        g = a g_t + w g_r,        by default a = 1, w = lambda - p

    where p = <g_t, g_r> / |g_r|^2 while L_ret > epsilon and the gradients conflict, else 0 (`craft_optim.decision`),
    and lambda follows L_ret / epsilon (`craft_optim.dual`). `p.grad` holds the task gradients again afterwards. Without
    a retention closure it is the base optimizer, bit for bit.

    Several constraints L_j <= epsilon_j(t) have names: pass a mapping name -> closure. `epsilon`, `dual` and
    `lambda_init` are then one value for all, or a mapping with the same names. Each constraint has a pass, a multiplier
    and metrics of its own, called "lambda/name" and so on; `craft_optim.several` tells how they are merged, and
    docs/constraints.md what that costs and what cannot be combined with it. A mapping of one is as its closure alone.

    Pass this object wherever the loop used the base optimizer: schedulers, scalers, checkpoints. Its own state is a
    handful of floats named `craft_*` in every parameter group.

    Cost of a step that runs retention: one forward and backward of the closure, one additional copy of the gradients
    while they live (see `gradient_memory`), about 5N elements of memory traffic, one read of the device. Other steps
    cost the base's step. With several processes, an all-reduce of a few numbers; under DDP one of all retention
    gradients, too.

    Args:
        base_optimizer: The optimizer that does the step.
        retention_closure: Returns L_ret on an anchor batch, for example `craft_optim.anchors.LogitRetention`; a mapping
            name -> closure for several constraints; None for none.
        epsilon: The drift to allow, in the unit of L_ret: a number, a `craft_optim.schedules` object, or any callable
            step -> float.
        dual: How lambda is found: "pi" (default), "ascent", "nupi", "augmented_lagrangian" or a
            `craft_optim.dual.Controller`.
        lambda_init: lambda at the start. Ignored, like the next two, if `dual` is an object.
        lambda_lr: Gain of the integral or ascent term.
        lambda_max: Upper bound of lambda.
        rho: Cap on the retention gradient's share: lambda <= rho |g_t| / |g_r|. None means max(1, retention_every);
            `math.inf` turns it off.
        projection: "violated" (only while L_ret > epsilon), "always", or "never".
        conflict_threshold: The projection acts where the *cosine* of the gradients is below this; in [-1, 1].
        merge: "weighted", "equal" or "task_priority".
        granularity: What shares a decision: "global", "group" or "tensor".
        retention_every: Run retention on every K-th step, beginning with the first; the others are the base's alone.
        max_grad_norm: Cap on the norm of the merged gradient on retention steps; None for no cap. Clip task gradients
            as ever, before `step`.
        gradient_memory: Where the task gradients wait while the retention pass runs: "copy" (they stay), "bfloat16"
            (rounded), "host" (in the main memory), or "streaming" (each is merged as its retention gradient arrives,
            with what the last retention step measured). `craft_optim.stash` and `craft_optim.streaming` tell what each
            saves and costs.
        process_group: The processes that gradients of plain (not sharded) parameters are averaged over. None: those of
            the DDP module that holds the parameters; needed where gradients are averaged in another way. False: none.
            See `craft_optim.distributed`.
        on_metrics: Called with `metrics` after every retention step, for example `craft_optim.metrics.JSONLWriter`; of
            several processes, by one.

    Attributes:
        metrics: Floats measured on the last retention step; `craft_optim.metrics.METRICS` says what each one is. Empty
            before the first.
        base_optimizer: The wrapped optimizer.
        retention_closure: May be set again, for example after unpickling.

    Raises:
        TypeError: If `base_optimizer` is not an optimizer or one that a framework has wrapped already, or
            `retention_closure` or `dual` cannot be called, or `process_group` is none.
        ValueError: If a value is out of its range, a name is unknown, mappings differ in their names, settings cannot
            be combined, or two groups share a parameter.

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
        >>> 0.008 < optimizer.metrics["retention_loss"] < 0.012
        True
    """

    # A GradScaler hands unscaling to an optimizer that says True; a fused base says it, but unscales too late for us.
    _step_supports_amp_scaling = False

    # Found out at the first retention pass, for the closure and the parameters of these ids.
    _float16: dict[str | None, bool]
    _layout: "Layout | None"
    _found_for: list[int]
    _measured: int  # retention steps since then

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        retention_closure: RetentionClosure | Closures | None = None,
        *,
        epsilon: float | Schedule | Mapping[str, float | Schedule] = 0.05,
        dual: str | Controller | Mapping[str, str | Controller] = "pi",
        lambda_init: float | Mapping[str, float] = 1.0,
        lambda_lr: float = 0.1,
        lambda_max: float = 1e4,
        rho: float | None = None,
        projection: Projection = "violated",
        conflict_threshold: float = 0.0,
        merge: Merge = "weighted",
        granularity: Granularity = "global",
        retention_every: int = 1,
        max_grad_norm: float | None = None,
        gradient_memory: GradientMemory = "copy",
        process_group: "dist.ProcessGroup | Literal[False] | None" = None,
        on_metrics: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        _check_base(base_optimizer)
        _check_choice("projection", projection, get_args(Projection))
        _check_choice("merge", merge, get_args(Merge))
        _check_choice("granularity", granularity, get_args(Granularity))
        _check_choice("gradient_memory", gradient_memory, get_args(GradientMemory))
        if gradient_memory == "streaming" and granularity == "group":
            raise ValueError(
                '`gradient_memory="streaming"` decides for each tensor or for all of them. Found granularity="group". '
                'Take granularity="tensor" or "global", or another gradient_memory.'
            )
        if not -1.0 <= conflict_threshold <= 1.0:
            raise ValueError(
                "`conflict_threshold` is a cosine and must be in [-1, 1]. "
                f"Found conflict_threshold={conflict_threshold!r}."
            )
        if not isinstance(retention_every, int) or retention_every < 1:
            raise ValueError(f"`retention_every` must be an integer >= 1. Found retention_every={retention_every!r}.")
        if not (process_group is None or process_group is False or hasattr(process_group, "rank")):
            raise TypeError(
                "`process_group` must be a torch.distributed.ProcessGroup that this process belongs to, False or None. "
                f"Found process_group={process_group!r}."
            )
        for name, value in (("max_grad_norm", max_grad_norm), ("rho", rho)):
            if value is not None and not value > 0.0:
                raise ValueError(f"`{name}` must be > 0, or None. Found {name}={value!r}.")

        self.epsilon = each(epsilon, as_schedule)
        self.controller = controllers(dual, lambda_init, learning_rate=lambda_lr, maximum=lambda_max)
        self.rho = max(1.0, float(retention_every)) if rho is None else float(rho)
        self.projection = projection
        self.conflict_threshold = conflict_threshold
        self.merge = merge
        self.granularity = granularity
        self.retention_every = retention_every
        self.max_grad_norm = max_grad_norm
        self.gradient_memory = gradient_memory
        self.process_group = process_group
        self.on_metrics = on_metrics
        self.metrics: dict[str, float] = {}
        self._steps_at_cap: dict[str | None, int] = {}
        self._warned_at_cap: set[str | None] = set()
        self._forget_circumstances()
        self._lost_closure = False
        self._closures = self._checked(retention_closure)

        # `Optimizer.__init__` would copy the groups; they, the state and the defaults stay the base's own objects.
        self.base_optimizer = base_optimizer
        self._make_hooks()
        self._complete_groups()

    @classmethod
    def published(
        cls,
        base_optimizer: torch.optim.Optimizer,
        retention_closure: RetentionClosure | Closures,
        *,
        total_steps: int,
        **overrides: Any,
    ) -> "CraftOptimizer":
        """The behaviour and defaults of the published method, for comparison.

        Dual ascent with eta = 0.01, lambda_0 = 1, lambda_max = 10 and no cap; epsilon from 1 to 0.1, linear over
        `total_steps`; projection always, where the cosine is below -0.1; every 5 steps.

        Args:
            base_optimizer: As for the class.
            retention_closure: As for the class.
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
        }
        return cls(base_optimizer, retention_closure, **(settings | overrides))

    @classmethod
    def bind(
        cls,
        optimizer_class: type[torch.optim.Optimizer],
        retention_closure: RetentionClosure | Closures | None,
        **craft: Any,
    ) -> "type[CraftOptimizer]":
        """A class that builds the base and wraps it, for frameworks that want an optimizer class.

        Args:
            optimizer_class: Called as `optimizer_class(params, **kwargs)` with what the framework passes.
            retention_closure: As for the class.
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

    @property
    def retention_closure(self) -> Callable[[], Tensor] | dict[str, Callable[[], Tensor]] | None:
        """The closure, or a copy of the mapping of closures, as given."""
        if None in self._closures:
            return self._closures[None]
        return cast(dict[str, Callable[[], Tensor]], dict(self._closures)) or None

    @retention_closure.setter
    def retention_closure(self, closure: RetentionClosure | Closures | None) -> None:
        self._closures = self._checked(closure)
        self._complete_groups()

    def _checked(self, closure: object) -> dict[str | None, Callable[[], Tensor]]:
        """The closures by name, if they go with the other arguments."""
        closures = by_name(closure)
        if closures:
            check_names(closures, {"`epsilon`": self.epsilon, "`dual` or `lambda_init`": self.controller})
        if len(closures) > 1 and self.gradient_memory == "streaming":
            raise ValueError(
                '`gradient_memory="streaming"` is for one constraint. Found '
                f'{len(closures)}: {", ".join(map(repr, closures))}. Take "bfloat16" or "host".'
            )
        if len(closures) > 1 and self.conflict_threshold > 0.0:
            raise ValueError(
                "`conflict_threshold` must be <= 0 with several constraints: to remove what helps one of them may "
                f"harm another. Found conflict_threshold={self.conflict_threshold!r}."
            )
        return closures

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimizer step; see the class.

        Args:
            closure: As for any torch optimizer; retention is merged after each of its evaluations. Within one step all
                evaluations use the same anchors and the same multiplier.

        Returns:
            What the base's `step` returns.

        Raises:
            ValueError: If epsilon(t) is negative or not finite.
            TypeError, RuntimeError: If the closure does not return a scalar with a graph, its gradient reaches none of
                the parameters, or there are several processes and it is not clear whether they train one model. Nothing
                has changed then, neither parameters nor state nor the anchors' position.
        """
        if not self._closures:
            if self._lost_closure:
                self._lost_closure = False
                warn(
                    "This CraftOptimizer was unpickled, which leaves its retention closure behind: it now steps "
                    "without retention. Set `optimizer.retention_closure` again.",
                )
            return self._step_base(closure)

        return self._constrained_step(closure)

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]  # lazy, unlike torch.compiler.disable
    def _constrained_step(self, closure: Callable[[], Any] | None) -> Any:
        step = int(self.param_groups[0]["craft_step"])
        if closure is None and self._is_priming(step):
            return self._step_base(None)
        if step % self.retention_every != 0 or (closure is None and _without_gradients(self._each_parameter())):
            result = self._step_base(closure)
            self._finish(step, None)
            return result

        constraints = constraints_at(step, self._closures, self.epsilon, self.controller)
        parameters = self._parameters()
        layout = self._find_layout(parameters)
        kind = StreamingStep if self.gradient_memory == "streaming" else RetentionStep
        retention = kind(
            constraints,
            Rules(
                self.rho,
                self.projection,
                self.conflict_threshold,
                self.merge,
                self.granularity,
                self.max_grad_norm,
                self.gradient_memory,
            ),
            parameters,
            [len(group["params"]) for group in self.param_groups],
            state=self._craft_state(),
            layout=layout,
            float16=self._float16,
            find_reached=self._measured + 1 == _REACH_AT,
        )
        with retention.undone_after_errors():
            if closure is None:
                retention.merge()
                result = self._step_base(None)
            else:
                evaluate = closure

                def merged_closure() -> Any:
                    with torch.enable_grad():
                        loss = evaluate()
                    if not _without_gradients(parameters):
                        retention.merge()
                    return loss

                result = self._step_base(merged_closure)
        self._finish(step, retention)
        return result

    def _step_base(self, closure: Callable[[], Any] | None) -> Any:
        # `self.base_optimizer.step` and not its class's: a scheduler built on the base patches the instance.
        arguments = () if closure is None else (closure,)
        if not any(_global_hooks()):
            return self.base_optimizer.step(*arguments)
        with _without_global_hooks():
            return self.base_optimizer.step(*arguments)

    def _is_priming(self, step: int) -> bool:
        """Whether a framework steps on zero gradients only to make the base create its state.

        torch.distributed.checkpoint does so, with lr = 0, whenever it saves or loads an optimizer without state.
        """

        def is_zero(rate: Any) -> bool:  # a rate on an accelerator is not read: that would be a wait on every step
            return not (isinstance(rate, Tensor) and rate.device.type != "cpu") and bool(rate == 0)

        if step != 0 and not all(is_zero(group.get("lr")) for group in self.param_groups):
            return False
        parameters = self._parameters()
        layout = self._find_layout(parameters)
        if layout is None:
            return all_zero(gradients_of(parameters))
        # A shard may be all zero, or empty, where others are not: all processes must agree.
        zero = all_zero(layout.local(gradients_of(parameters), parameters))
        return not layout.any(not zero, next(p.device for p in parameters))

    def _find_layout(self, parameters: list[Tensor]) -> "Layout | None":
        """The layout of these very parameters: frameworks put others into the groups after an optimizer is made.

        Made known to the closure, which may be another one, too.
        """
        found_for = [*map(id, self._closures.values()), *map(id, parameters)]
        if found_for != self._found_for:
            self._forget_circumstances()
            self._found_for = found_for
            if dist.is_available() and dist.is_initialized():
                from craft_optim.distributed import find_layout

                self._layout = find_layout(parameters, self.process_group)
            for closure in self._closures.values():
                if isinstance(closure, Retention) and self._layout is not None:
                    closure.shard(self._layout.rank, self._layout.world_size, self._layout.mean)
        return self._layout

    def _finish(self, step: int, retention: RetentionStep | None) -> None:
        if retention is None or not retention.ran:
            self._write({"craft_step": float(step + 1)})
            if self.metrics:
                self.metrics["fresh"] = 0.0
            return
        self._float16 = retention.float16
        self._write(retention.state | {"craft_step": float(step + 1)})
        if not retention.metrics:
            self.metrics |= {"skipped": retention.state["craft_skipped"], "fresh": 0.0}
            return
        self.metrics = retention.metrics | {"retention_step": float(step), "fresh": 1.0}
        self._measured += 1
        if self._measured == _REACH_AT:
            for constraint in retention.constraints:
                self._check_reach(retention, constraint)
        if self._layout is None or self._layout.first:  # the values are the same on every process: one of them reports
            for constraint in retention.constraints:
                self._watch_cap(constraint)
            if self.on_metrics is not None:
                self.on_metrics(dict(self.metrics))

    def _watch_cap(self, constraint: Constraint) -> None:
        name, prefix = constraint.name, constraint.prefix
        capped, drift, epsilon = (self.metrics[keyed(x, name)] for x in ("capped", "retention_loss", "epsilon"))
        self._steps_at_cap[name] = self._steps_at_cap.get(name, 0) + 1 if capped == 1.0 and drift > epsilon else 0
        patience = max(_LEAST_PATIENCE, math.ceil(_PATIENCE_AT_CAP / self.retention_every))
        if self._steps_at_cap[name] == patience and name not in self._warned_at_cap:
            self._warned_at_cap.add(name)
            warn(
                f"{prefix}lambda has been at its cap for {patience} retention steps while the drift "
                f"({drift:.3g}) is above epsilon ({epsilon:.3g}). The constraint is not met: raise epsilon, raise rho "
                f"(now {self.rho:g}), lower retention_every (now {self.retention_every}), or lower the learning rate.",
            )

    def _check_reach(self, retention: RetentionStep, constraint: Constraint) -> None:
        share = retention.share_reached(constraint.name)
        if share >= _LITTLE_REACH or not (self._layout is None or self._layout.first):
            return
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        reached = retention.reached[constraint.name]
        trained = [(p.requires_grad, here) for p, here in zip(self._parameters(), reached, strict=True)]
        free = [name for name, of in zip(names, trained, strict=False) if of == (True, False)]
        warn(
            f"{constraint.prefix}After {_REACH_AT} retention steps the retention loss has a gradient in {share:.1%} of "
            f"the trainable elements ({trained.count((True, True))} of {sum(p for p, _ in trained)} tensors"
            f"{'; not in ' + ', '.join(free[:3]) if free else ''}): nothing holds the others. Anchor an output "
            "that depends on what is trained: logits, or hidden states behind the trained layers, not behind frozen "
            "ones only. If the others may move freely, filter this warning out.",
        )

    def _forget_circumstances(self) -> None:
        self._float16, self._layout, self._found_for, self._measured = {}, None, [], 0

    def _each_parameter(self) -> Iterator[Tensor]:
        return (p for group in self.base_optimizer.param_groups for p in group["params"])

    def _parameters(self) -> list[Tensor]:
        return list(self._each_parameter())

    # -- our state: floats in every parameter group --------------------------------------------------------------------

    def _initial_state(self) -> dict[str, float]:
        state = dict.fromkeys(SHARED_STATE, 0.0)
        named = next((x for x in (self.controller, self.epsilon) if isinstance(x, dict)), [None])
        for name in self._closures or named:
            of_dual = of(self.controller, name).initial_state()
            own = {
                "craft_lambda": 0.0,
                "craft_anchor_position": 0.0,
                **initial_scale(),
                **(StreamingStep.initial_state() if self.gradient_memory == "streaming" else {}),
                **{f"craft_dual_{key}": float(value) for key, value in of_dual.items()},
            }
            state |= {keyed(what, name): value for what, value in own.items()}
        return state

    def _complete_groups(self) -> None:
        """Gives every group all of our keys: what the first group has, else the initial values.

        A base restored from one of our checkpoints before it is wrapped thus goes on where the checkpoint was. What
        belongs to names stays until closures are set that have others.
        """
        groups = self.base_optimizer.param_groups
        known = self._initial_state()
        present = {key: float(groups[0][key]) for key in known if key in groups[0]}
        for group in groups:
            ours = [key for key in group if key.startswith("craft_") and not ("/" in key and not self._closures)]
            for stale in set(ours) - set(known):
                del group[stale]
        self._write(known | present)

    def _craft_state(self) -> dict[str, float]:
        group = self.base_optimizer.param_groups[0]
        return {key: value for key, value in group.items() if key.startswith("craft_")}

    def _write(self, state: Mapping[str, float]) -> None:
        for group in self.base_optimizer.param_groups:
            group.update(state)

    # -- the torch.optim.Optimizer contract ----------------------------------------------------------------------------

    def _make_hooks(self) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # torch declares these as attributes; here they are the base's own, also after frameworks rebind them.
    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # What schedule-free bases and transformers' AdafactorSchedule need, and no more: a GradScaler would trust the
        # base's answers.
        if name in ("train", "eval", "_get_lr") and "base_optimizer" in self.__dict__:
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients as the base does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base; it takes part in retention from the next step."""
        self.base_optimizer.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the floats `craft_*` in every param group."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or a plain one of the base (lambda and step then start anew)."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        self.base_optimizer.load_state_dict(state_dict)
        self._complete_groups()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # The closure and the sink hold models and files; hooks and a scheduler's patch of `step` stay behind, as they
        # do with torch's own optimizers.
        left_behind = ("_closures", "on_metrics", "process_group", "_layout", "_found_for", "step")
        return {k: v for k, v in self.__dict__.items() if k not in left_behind and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._closures = {}
        self.on_metrics = None
        self.process_group = None
        self._forget_circumstances()
        self._lost_closure = True
        self._make_hooks()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CraftOptimizer":
        """A copy of the base and the state; the closure and the sink are shared with the original."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._closures = dict(self._closures)
        twin.on_metrics = self.on_metrics
        twin.process_group = self.process_group
        twin._lost_closure = self._lost_closure
        return twin

    def __repr__(self) -> str:
        return f"{type(self).__name__} (epsilon: {self.epsilon}, dual: {self.controller})\n{self.base_optimizer!r}"


def _without_gradients(parameters: Iterable[Tensor]) -> bool:
    """Whether there is nothing to step on. Usually the first parameter tells: most steps shall cost nothing."""
    some = False
    for p in parameters:
        # FSDP1 may leave a process nothing but parameters without elements: it goes by the others' step.
        if p.numel() > 0:
            if p.grad is not None:
                return False
            some = True
    return some


def _empty_wrapper() -> CraftOptimizer:
    return CraftOptimizer.__new__(CraftOptimizer)


def _global_hooks() -> list[dict[int, Any]]:
    return [
        cast(dict[int, Any], torch_optimizer._global_optimizer_pre_hooks),
        cast(dict[int, Any], torch_optimizer._global_optimizer_post_hooks),
    ]


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks for all optimizers fire for the wrapper; the base's step within must not fire them a second time."""
    tables = _global_hooks()
    kept = [OrderedDict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, entries in zip(tables, kept, strict=True):
            added = OrderedDict(table)
            table.clear()
            table.update(entries)
            table.update(added)


# By name: none of these libraries need be installed.
_WRAPPERS_OF_FRAMEWORKS = {
    "AcceleratedOptimizer": "Wrap before Accelerate does, `accelerator.prepare(model, CraftOptimizer(base, ...))`: it "
    "decides which micro-batches step, and retention would run on all of them",
    "LightningOptimizer": "Return CraftOptimizer(base, ...) from `configure_optimizers`",
    "DeepSpeedOptimizer": "DeepSpeed ZeRO keeps flattened copies of the parameters, which no retention backward "
    "reaches. Use DDP or FSDP2",
}


def _check_base(base: object) -> None:
    for kind in type(base).__mro__:
        if kind.__name__ in _WRAPPERS_OF_FRAMEWORKS:
            remedy = _WRAPPERS_OF_FRAMEWORKS[kind.__name__]
            raise TypeError(f"`base_optimizer` must be a plain optimizer. Found {type(base).__name__}. {remedy}.")
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            "`base_optimizer` must be a torch.optim.Optimizer, such as torch.optim.AdamW(model.parameters()). "
            f"Found {type(base).__name__}."
        )
    if isinstance(base, CraftOptimizer):
        raise TypeError("`base_optimizer` is a CraftOptimizer already: wrap its `base_optimizer` instead.")
    seen: dict[int, int] = {}
    for i, group in enumerate(base.param_groups):
        for p in group["params"]:
            if seen.setdefault(id(p), i) != i:
                raise ValueError(
                    f"`base_optimizer` has a parameter of shape {tuple(p.shape)} in the groups {seen[id(p)]} and {i}: "
                    "it would be stepped twice. Put each parameter into one group."
                )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Found {name}={value!r}.")
