"""The retention side of one optimizer step: from task gradients in `.grad` to merged gradients in `.grad`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from craft_optim import scaling
from craft_optim._warn import warn
from craft_optim.decision import Decision, Gram, Granularity, Merge, Products, decide, labels_of
from craft_optim.dual import Controller, Update
from craft_optim.gradients import Gradients, gradients_of, put, set_aside
from craft_optim.stash import GradientMemory, Stash
from craft_optim.surgery import GradientPairs

if TYPE_CHECKING:
    from craft_optim.distributed import Layout

__all__ = ["Projection", "RetentionStep", "Rules"]

Projection = Literal["violated", "always", "never"]


@dataclass(frozen=True)
class Rules:
    """What decides how a step merges; `CraftOptimizer` explains each."""

    controller: Controller
    rho: float
    projection: Projection
    conflict_threshold: float
    merge: Merge
    granularity: Granularity
    max_grad_norm: float | None
    gradient_memory: GradientMemory


class _Measured(NamedTuple):
    """Of one retention pass.

    Attributes:
        pairs: The task gradients and the retention gradients times `scale`, what of them is on this process.
        task: The task gradients as the stash gave them.
        whole: The retention gradients as autograd left them.
        products: Inner products per label, over all processes, without the scale.
        loss: L_ret.
        scale: The private loss scale; 1 without float16.
    """

    pairs: GradientPairs
    task: Gradients
    whole: Gradients
    products: Products
    loss: float
    scale: float


class RetentionStep:
    """One step; of a line search, all its evaluations, on the same anchors and with the same multiplier.

    Args:
        closure: The retention closure.
        rules: Of the merge.
        parameters: All of the optimizer's.
        group_sizes: How many of them each parameter group has.
        state: The `craft_*` floats before the step.
        epsilon: The drift allowed at this step.
        layout: Of several processes; None for one.
        float16: Whether float16 takes part in the closure's backward; None to find out.
        find_reached: Whether to look which tensors the retention loss reaches: one more read of its gradients.

    Attributes:
        state: The floats to write once the base has stepped.
        metrics: What was measured; empty if nothing was.
        reached: Of each parameter, whether its retention gradient, on any process, is not zero; empty if not asked for.
        float16: As found out.
    """

    def __init__(
        self,
        closure: Callable[[], Tensor],
        rules: Rules,
        parameters: list[Tensor],
        group_sizes: Sequence[int],
        *,
        state: dict[str, float],
        epsilon: float,
        layout: "Layout | None",
        float16: bool | None,
        find_reached: bool = False,
    ) -> None:
        self.state = dict(state)
        self.metrics: dict[str, float] = {}
        self.reached: list[bool] = []
        self.float16 = float16
        self._closure, self._rules = closure, rules
        self._parameters, self._find_reached = parameters, find_reached
        self._epsilon, self._layout = epsilon, layout
        self._labels = labels_of(rules.granularity, group_sizes)
        self._update: Update | None = None
        self._stash: Stash | None = None
        self._start = getattr(closure, "position", None)

    @property
    def ran(self) -> bool:
        """Whether there was anything to merge."""
        return self._stash is not None

    def share_reached(self) -> float:
        """The part of the trainable elements that is in tensors with a retention gradient; in [0, 1].

        Whole tensors count: of an embedding only the rows of the anchors' tokens have a gradient. Collective.
        """
        sizes = torch.tensor([p.numel() * p.requires_grad for p in self._parameters], dtype=torch.float64)
        if self._layout is not None and self._layout.fsdp1:  # its parameters, unlike DTensors, know only their shard
            here = sizes * torch.tensor(self._layout.shares(self._parameters), dtype=torch.float64)
            sizes = self._layout.total(here.to(self._parameters[0].device)).cpu()
        return float(sizes[torch.tensor(self.reached)].sum() / sizes.sum())

    @contextmanager
    def undone_after_errors(self) -> Iterator[None]:
        """Leaves the task gradients in `.grad`; after an exception also the anchors where they were."""
        try:
            yield
        except BaseException:
            self._rewind()
            raise
        finally:
            if self._stash is not None:
                self._stash.give_back(self._parameters)

    def _rewind(self) -> None:
        if self._start is not None:
            self._closure.position = self._start  # type: ignore[attr-defined]

    @torch.no_grad()
    def merge(self) -> None:
        """Runs the retention pass and points `.grad` at the merged gradients, or at the task's if it was not finite."""
        self._stash = Stash(gradients_of(self._parameters), self._rules.gradient_memory)
        pairs, task, whole, products, value, scale = self._measured(self._stash)
        gram = products.gram()
        if not (math.isfinite(value) and gram.finite):
            self._skip(value, gram.tt, gram.rr)
            return
        if self.float16:
            self.state |= scaling.grown(self.state)

        update = self._updated(value, gram)
        decision = decide(
            products,
            lam=update.multiplier,
            project=self._may_project(value),
            conflict_threshold=self._rules.conflict_threshold,
            merge=self._rules.merge,
            max_norm=self._rules.max_grad_norm,
        )
        if self._find_reached and not self.metrics:
            self.reached = self._reached(pairs.retention)
        with record_function("CraftOptimizer.merge"):
            merged = pairs.merge_([c.of_scaled(scale) for c in decision.coefficients])
            if self._layout is not None:
                merged = self._layout.wrapped(merged, self._parameters, task, whole)
            put(self._parameters, self._stash.in_their_dtype(merged))
        self._report(value, gram, update, decision)

    def _updated(self, value: float, gram: Gram) -> Update:
        """The multiplier; of a line search, that of the first evaluation."""
        if self._update is None:
            cap = self._rules.rho * math.sqrt(gram.tt) / math.sqrt(gram.rr) if gram.rr > 0.0 else math.inf
            dual_state = {
                k.removeprefix("craft_dual_"): v for k, v in self.state.items() if k.startswith("craft_dual_")
            }
            self._update = self._rules.controller(dual_state, loss=value, epsilon=self._epsilon, cap=cap)
            self.state |= {f"craft_dual_{k}": float(v) for k, v in self._update.state.items()}
            self.state["craft_lambda"] = self._update.multiplier
        return self._update

    def _may_project(self, value: float) -> bool:
        projection = self._rules.projection
        return projection == "always" or (projection == "violated" and value > self._epsilon)

    def _report(self, value: float, gram: Gram, update: Update, decision: Decision) -> None:
        if self.metrics:  # of a line search, the first evaluation: where the step began
            return
        self.metrics = {
            "retention_loss": value,
            "epsilon": self._epsilon,
            "lambda": update.multiplier,
            "violation": value / self._epsilon if self._epsilon > 0.0 else math.inf if value > 0.0 else 0.0,
            "grad_dot": gram.tr,
            "grad_cos": gram.cos,
            "conflict": decision.conflict,
            "projected": decision.projected,
            "task_grad_norm": math.sqrt(gram.tt),
            "retention_grad_norm": math.sqrt(gram.rr),
            "merged_grad_norm": decision.norm,
            "capped": float(update.capped),
            "clipped": float(decision.clipped),
            "skipped": self.state["craft_skipped"],
        }

    def _measured(self, stash: Stash) -> "_Measured":
        """Runs the retention pass and the inner products.

        Repeats a pass whose gradients have overflowed, as long as a smaller scale may help.
        """
        while True:
            self._rewind()  # a line search evaluates more than once: always on the same anchors
            with record_function("CraftOptimizer.retention"):
                loss, whole, scale = self._retention_gradients()
            with record_function("CraftOptimizer.merge"):
                task = stash.for_surgery()
                pairs = self._pairs(*self._local(task, whole), self._labels)
                scaled, (value,) = pairs.inner_products(loss, reduce=self._reduce)
            products = scaled.unscaled(scale)
            gram = products.gram()
            overflowed = math.isfinite(value) and math.isfinite(gram.tt) and not gram.finite
            if not (overflowed and self.float16):
                break
            if scale == 1.0:
                self.state |= scaling.initial_scale()  # no scale helps: the next pass shall not pay for this one
                break
            self.state |= scaling.shrunk(self.state)
            del task, whole, pairs
        self._note_position()
        return _Measured(pairs, task, whole, products, value, scale)

    def _note_position(self) -> None:
        if self._start is not None:
            self.state["craft_anchor_position"] = float(self._closure.position)  # type: ignore[attr-defined]

    def _pairs(self, task: Gradients, retention: Gradients, labels: Sequence[int]) -> GradientPairs:
        shares = None if self._layout is None else self._layout.shares(self._parameters)
        return GradientPairs(task, retention, labels, shares)

    @property
    def _reduce(self) -> Callable[[Tensor], Tensor] | None:
        return None if self._layout is None else self._layout.reduce

    def _reached(self, retention: Gradients) -> list[bool]:
        pairs = self._pairs([None] * len(retention), retention, range(len(retention)))
        products, _ = pairs.inner_products(reduce=self._reduce)
        return [bool(square > 0.0) for square in products.rr]

    def _retention_gradients(self) -> tuple[Tensor, Gradients, float]:
        """L_ret, the gradients of `scale` times it, and scale."""
        with self._isolated():
            loss, scale = self._scaled_loss()
            loss.backward()  # type: ignore[no-untyped-call]
            retention = gradients_of(self._parameters)
        if self._layout is not None:
            retention = self._layout.averaged(retention, self._parameters)
        self._check_reached(retention)
        return loss.detach() if scale == 1.0 else loss.detach() / scale, retention, scale

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Within the block, no pass reaches a `.grad` or a reduction that is not its own."""
        own = {id(p) for p in self._parameters}
        reachable: Iterable[Tensor] = getattr(self._closure, "parameters", tuple)()
        others = [p for p in reachable if id(p) not in own]
        own_reduction = nullcontext() if self._layout is None else self._layout.own_reduction()
        put(self._parameters, [None] * len(self._parameters))  # they are in the stash
        with set_aside(others), own_reduction, torch.enable_grad():
            yield

    def _scaled_loss(self) -> tuple[Tensor, float]:
        """L_ret times the private scale, and the scale."""
        loss = self._closure()
        _check_loss(loss)
        if self.float16 is None:
            self.float16 = scaling.reaches_float16(loss)
        scale = self.state["craft_scale"] if self.float16 else 1.0
        wide = loss.float() if loss.dtype == torch.float16 else loss
        return (wide if scale == 1.0 else wide * scale), scale

    def _check_reached(self, retention: Gradients) -> None:
        # FSDP1 leaves a process parameters without elements, and those without gradients.
        reached = [g is not None for p, g in zip(self._parameters, retention, strict=True) if p.numel() > 0]
        if reached and not any(reached):
            raise RuntimeError(
                "The retention loss reaches none of the optimizer's parameters: every retention gradient is None. "
                "Does the closure run the model that is being trained (not a copy, not a re-created PEFT wrapper), and "
                "are the parameters behind the anchored output trainable? Under DeepSpeed ZeRO the optimizer owns "
                "flattened copies that no backward reaches: use DDP or FSDP2."
            )

    def _local(self, task: Gradients, retention: Gradients) -> tuple[Gradients, Gradients]:
        if self._layout is not None:
            task = self._layout.local(task, self._parameters)
            retention = self._layout.local(retention, self._parameters)
        if any(_same_memory(t, r) for t, r in zip(task, retention, strict=True)):
            raise RuntimeError(
                "The retention backward wrote its gradients into the memory of the task gradients, which are lost now: "
                "a wrapper of the model keeps its own gradient buffers. Let the retention closure run the model that "
                "is wrapped (`.module`)."
            )
        return task, retention

    def _skip(self, loss: float, tt: float, rr: float) -> None:
        if self._stash is not None:
            self._stash.give_back(self._parameters)
        self._note_skip(loss, tt, rr, "")

    def _note_skip(self, loss: float, tt: float, rr: float, where: str) -> None:
        self.state["craft_skipped"] += 1.0
        culprit = "task gradient" if not math.isfinite(tt) else "retention pass"
        first = self._layout is None or self._layout.first
        if first and self.state["craft_skipped"] in (1.0, 10.0, 100.0, 1000.0):
            warn(
                f"The {culprit} is not finite (L_ret = {loss:g}, |g_ret|^2 = {rr:g}, |g_task|^2 = {tt:g}): step "
                f"{int(self.state['craft_step'])} used the task gradient alone{where}. Skipped so far: "
                f"{int(self.state['craft_skipped'])} (reported again at 10, 100, 1000).",
            )


def _same_memory(t: Tensor | None, r: Tensor | None) -> bool:
    if t is None or r is None or t.is_sparse or r.is_sparse or t.numel() == 0:
        return False
    return t.data_ptr() == r.data_ptr()


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"`retention_closure` must return the retention loss as a tensor. Found {type(loss).__name__}. "
            "Return the loss itself, not loss.item(), and do not call backward."
        )
    if loss.numel() != 1:
        raise RuntimeError(
            f"`retention_closure` must return a scalar. Found a tensor of shape {tuple(loss.shape)}. Reduce it, for "
            "example with .mean()."
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "`retention_closure` returned a loss without a graph: it reaches no trainable parameter. Is it computed "
            "under no_grad, detached, or from a model whose parameters are all frozen?"
        )
