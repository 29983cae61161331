"""Anchors and task batch in one forward and one backward, with their gradients apart: `JointPass`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils import _pytree as pytree

from craft_optim._warn import warn

from ..cache import AnchorBatch
from ..capture import Layer, run
from ..forwards import outcome_of
from ..masks import IGNORED
from ..passes import autocast_dtype, checkpoints_activations, is_compiled, is_noisy, isolated_rng, logits_of, to_device
from ..retention import AnchorRetention, CachedRetention
from ..structure import Inputs
from .check import differentiable, other_gradients, random_gradients, same_values
from .join import Joined, JoinError, join
from .row_gradients import Aliases, RowsError, parts_with_parameters, rows_apart

if TYPE_CHECKING:
    from craft_optim.optimizer import CraftOptimizer

__all__ = ["JointPass", "JointPassError"]

_INSTEAD = "Call the model itself instead of `JointPass.run`: retention then runs passes of its own."


class JointPassError(ValueError):
    """Task batch and anchors cannot go through the model together, or not with the same gradients."""


@dataclass
class _Pending:
    """A joint forward whose retention gradients come with the backward of the task's loss.

    Attributes:
        position: Of the anchors.
        loss: L_ret.
        seeds: Its gradients at what the anchors' rows gave.
        aliases: Take the retention gradients.
        parameters: Of the model.
        versions: Theirs: they must not change before the gradients are used.
        done: Whether the backward has gone through.
    """

    position: int
    loss: Tensor
    seeds: list[Tensor | None]
    aliases: Aliases
    parameters: list[nn.Parameter]
    versions: list[int]
    done: bool = field(default=False)

    def take_seeds(self) -> list[Tensor | None]:
        """The seeds, once: a second backward through the same graph must not add them again."""
        seeds, self.seeds = self.seeds, [None] * len(self.seeds)
        if any(seed is not None for seed in seeds):
            Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
        return seeds

    def _finish(self) -> None:
        self.done = True


class _Handed(torch.autograd.Function):
    """What the user gets of an output; its backward also starts the anchors', which no scale of the task's reaches."""

    @staticmethod
    def forward(ctx: Any, pending: _Pending, value: Tensor, *anchored: Tensor) -> Tensor:
        ctx.pending = pending
        return value.view_as(value) if value.ndim else value.clone()  # losses may be scaled in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, grad, *ctx.pending.take_seeds()


class _Deposit(torch.autograd.Function):
    """A loss whose backward puts gradients that are known already where autograd would have put them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("The gradients of a joint pass are handed over once: this is the second backward.")
        if grad.device.type == "cpu" and float(grad) == 1.0:  # an accelerator is not waited for
            return None, None, *gradients
        if len({x.device for x in gradients}) == 1 and not any(x.is_sparse for x in gradients):
            torch._foreach_mul_(gradients, grad.to(gradients[0].device))
        else:
            gradients = [x * grad.to(x.device) for x in gradients]
        return None, None, *gradients


class JointPass:
    """Runs the anchors of the coming retention step along with the task batch: one forward and one backward for both.

    The gradients are those of separate passes: the task's in `p.grad`, retention's kept until `optimizer.step()` asks
    for them. The arithmetic is the same, with fewer operations to launch: that may pay where a GPU waits for launches,
    and hardly pays on a CPU. `make bench GROUP=joint` counts and times both. The activations of both batches live at
    once. And it runs on the anchors what separate passes leave out: modules whose outputs are cached
    (`build(frozen=...)`), the head at positions that do not count, layers that `HiddenRetention` does not need.

    The first joint pass runs both separately, too, and compares outputs and random gradients of all parameters; so does
    the first after modules change their mode, parameters begin or cease to require gradients, autocast changes, or
    padding sets in. Steps without retention, further micro-batches of a step and forwards without gradients run the
    model alone; wherever no joint pass has come through, `step` runs retention on its own as ever.

    Example:
        optimizer = CraftOptimizer(base, LogitRetention(model, cache), epsilon=0.05)
        joint = JointPass(optimizer)
        for batch in loader:
            loss = joint.run(batch).loss  # instead of model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        optimizer: With a `LogitRetention`, `HiddenRetention` or `TokenRetention`, whose place this object takes as its
            `retention_closure`.
        fill: Input -> value in the anchors' rows, for inputs that make the model compute the task's loss: the value
            must keep the anchors out of it. None: -100 in "labels", which transformers' losses leave out.

    Attributes:
        retention: The closure that was the optimizer's.
        joined: Number of joint forwards so far.

    Raises:
        TypeError: The optimizer has another retention closure.
        JointPassError: There are several processes, the model is compiled, trains in float16, checkpoints activations
            or owns trainable parameters outside of its parts.
    """

    def __init__(self, optimizer: "CraftOptimizer", *, fill: Mapping[str, float] | None = None) -> None:
        retention = optimizer.retention_closure
        if not isinstance(retention, CachedRetention):
            raise TypeError(
                "`optimizer` must have a LogitRetention, HiddenRetention or TokenRetention as its retention closure. "
                f"Found {type(retention).__name__}."
            )
        if retention.layers and retention.cache.features.batch_dim != 0:
            raise JointPassError(
                f"Joint passes need hidden states with the anchors as first dimension. {retention.cache.path} was "
                f"built with batch_dim={retention.cache.features.batch_dim}. {_INSTEAD}"
            )
        self.retention, self.joined = retention, 0
        self._optimizer, self._model = optimizer, retention.model
        self._fill = {"labels": IGNORED} if fill is None else dict(fill)
        self._forward = retention.forward or _call
        self._pending: _Pending | None = None
        self._checked: dict[Any, dict[str, nn.Module]] = {}
        self._warned = False
        self._parts(list(self._model.modules()))
        optimizer.retention_closure = self

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def run(self, batch: Any) -> Any:
        """What the model gives for the task batch; on a retention step the next anchors go with it.

        A mapping is passed as keywords, a tuple as arguments, a tensor as the argument; if the closure has a
        `forward=`, that is called with the model and the batch. Tensors with rows in the output are cut to the task's;
        a cache of keys and values, or what else is no tensor, is handed on as it is.

        Raises:
            JointPassError: The task batch and the anchors cannot be joined, or the first joint pass does not give what
                separate passes give, as with active dropout, batch statistics or losses over all rows. Nothing has
                changed then.
            AnchorMismatchError: As from the retention closure.
        """
        if not (torch.is_grad_enabled() and self._due()) or self._usable():
            return self._forward(self._model, batch)
        self._pending = None
        retention = self.retention
        anchors = retention._next(retention.position)
        inputs = to_device(anchors.inputs, retention.device)
        try:
            joined = join(batch, inputs, self._fill)
        except JoinError as error:
            raise JointPassError(f"{error} Or: {_INSTEAD}") from error
        modules = list(self._model.modules())
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        key = (
            tuple((id(m), m.training) for m in modules),
            tuple((id(p), p.requires_grad, p.dtype) for p in parameters),
            joined.lengths is not None,
            autocast_dtype(retention.device, None),
        )
        if key not in self._checked:
            self._refuse_precision()
            parts = self._parts(modules)
            self._check(batch, inputs, joined, parts)
            self._checked[key] = parts
        aliases = Aliases()
        output, anchored = self._joint(joined, self._checked[key], aliases)
        loss, seeds = self._retention(anchored, anchors)
        pending = _Pending(retention.position, loss, seeds, aliases, parameters, [p._version for p in parameters])

        def hand(x: Any) -> Any:
            differentiable = isinstance(x, Tensor) and x.requires_grad
            return _Handed.apply(pending, x, *anchored.tensors()) if differentiable else x  # type: ignore[no-untyped-call]

        handed = pytree.tree_map(hand, output)
        self._pending = pending
        self.joined += 1
        return handed

    @property
    def position(self) -> int:
        return self.retention.position

    @position.setter
    def position(self, value: int) -> None:
        self.retention.position = value

    def parameters(self) -> list[nn.Parameter]:
        """As of the retention closure."""
        return self.retention.parameters()

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Refuses: joint passes are for one process."""
        raise JointPassError(f"Joint passes are for one process. Found {world_size}. {_INSTEAD}")

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def __call__(self) -> Tensor:
        """L_ret on the next anchors: from the joint pass if there was one, else from a pass of its own."""
        usable, pending, self._pending = self._usable(), self._pending, None
        gradients = pending.aliases.take_gradients() if pending is not None and usable else {}
        if pending is not None and not gradients and not self._warned:
            self._warned = True
            warn(
                "A joint pass ran, and was of no use: the task's loss was not followed by a `backward()` that fills "
                "`.grad`, or the parameters or anchors changed in between. Retention runs a pass of its own."
            )
        if pending is None or not gradients:
            return self.retention()
        self.retention.position += 1
        loss: Tensor = _Deposit.apply(pending.loss, list(gradients.values()), *gradients)  # type: ignore[no-untyped-call]
        return loss

    def _due(self) -> bool:
        step = int(self._optimizer.param_groups[0]["craft_step"])
        return self._optimizer.retention_closure is self and step % self._optimizer.retention_every == 0

    def _usable(self) -> bool:
        """Whether the gradients of the last joint pass are those of the next step."""
        pending = self._pending
        return (
            pending is not None
            and pending.done
            and pending.position == self.retention.position
            and pending.versions == [p._version for p in pending.parameters]
        )

    def _parts(self, modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
        """What runs otherwise in a joint pass.

        Raises:
            JointPassError: Joint passes are not for this model.
        """
        why = ""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            why = "There are several processes."
        elif is_compiled(self._model):
            why = "The model is compiled."
        for module in modules:
            if checkpoints_activations(module):
                why = f"{type(module).__name__} checkpoints activations: its second forward would be another."
            elif isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
                why = f"{type(module).__name__} is in train mode: its statistics would be those of both batches."
        if why:
            raise JointPassError(f"{why} Joint passes cannot be used with that. {_INSTEAD}")
        try:
            return parts_with_parameters(self._model)
        except RowsError as error:
            raise JointPassError(f"{error} Or: {_INSTEAD}") from error

    def _refuse_precision(self) -> None:
        running, wanted = autocast_dtype(self.retention.device, None), self.retention.autocast
        if wanted is not None and wanted != running:
            raise JointPassError(
                f"The retention closure wants autocast {wanted}, the task's forward runs under {running}: both are one "
                "now. Make them the same."
            )
        if torch.float16 in (running, *(p.dtype for p in self._model.parameters())):
            raise JointPassError(
                "Retention needs a loss scale of its own in float16, and joint passes have none. Use bfloat16. Or: "
                f"{_INSTEAD}"
            )

    def _joint(self, joined: Joined, parts: Mapping[str, nn.Module], aliases: Aliases) -> "tuple[Any, _Anchored]":
        """One forward on both batches: the task's output, and what is compared of the anchors'."""
        with rows_apart(parts, aliases, joined.size, joined.cut):
            output, hidden = run(self._model, joined.inputs, forward=self._forward, layers=self.retention.layers)
        logits = logits_of(output) if self.retention._compares_output() else None
        compared = [*([] if logits is None else [logits]), *hidden.values()]
        divided = {id(x): joined.divide(x) for x in compared}
        if without := [tuple(x.shape) for x in compared if divided[id(x)] is None]:
            raise JointPassError(
                f"What is compared has the shape {without[0]}, where {joined.size} rows run: which of it belongs to "
                f"the anchors cannot be told. {_INSTEAD}"
            )

        def of_task(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            both = divided[id(x)] if id(x) in divided else joined.divide(x)
            return x if both is None else both[0]

        def of_anchors(x: Tensor) -> Tensor:
            return cast(tuple[Tensor, Tensor], divided[id(x)])[1]

        anchored = _Anchored(
            output,
            None if logits is None else of_anchors(logits),
            {layer: of_anchors(x) for layer, x in hidden.items()},
        )
        return pytree.tree_map(of_task, output), anchored

    def _retention(self, anchored: "_Anchored", batch: AnchorBatch) -> tuple[Tensor, list[Tensor | None]]:
        """L_ret, and its gradients at what is compared."""
        retention, leaves = self.retention, anchored.leaves()
        outcome = outcome_of(leaves.output, leaves.logits, leaves.hidden, batch.features.get("mask"))
        values = retention._weighted(retention._compare(outcome, batch))
        loss = retention._combine(values)
        if retention.position == 0:
            retention._check_first({name: value.detach() for name, value in values.items()}, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), [leaf.grad for leaf in leaves.tensors()]

    def _check(self, task: Any, anchors: Inputs, joined: Joined, parts: Mapping[str, nn.Module]) -> None:
        """Raises unless a joint forward gives what two forwards give, and its backward what two backwards give."""
        retention, device, aliases = self.retention, self.retention.device, Aliases()
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        parameters = list(named.values())
        with isolated_rng(device, 0):
            of_task = differentiable(self._forward(self._model, task))
        if not of_task:
            raise JointPassError("The model's output for the task batch has no graph: it reaches nothing that trains.")
        task_gradients = random_gradients([of_task], parameters)
        with retention._pass(0):
            output, hidden = run(self._model, anchors, forward=retention.forward, layers=retention.layers)
            logits = logits_of(output) if retention._compares_output() else None
            of_anchors = _Anchored(output, logits, hidden).tensors()
        anchor_gradients = random_gradients([[], of_anchors], parameters)
        with isolated_rng(device, 0):
            try:
                output, anchored = self._joint(joined, parts, aliases)
            except RowsError as error:
                raise JointPassError(f"{error} {_INSTEAD}") from error
        together = differentiable(output), anchored.tensors()
        tolerance = self._tolerance()
        for batch, ours, theirs in (("task batch", together[0], of_task), ("anchors", together[1], of_anchors)):
            if not same_values(ours, theirs, tolerance):
                raise JointPassError(f"The model gives something else for the {batch} in a joint pass.{self._why()}")
        aliased = dict(aliases.items())
        found = random_gradients(together, [*parameters, *aliased.values()])
        of_alias = dict(zip(aliased, found[len(parameters) :], strict=True))
        for batch, of_both, of_one in (
            ("task batch", found[: len(parameters)], task_gradients),
            ("anchors", [of_alias.get(p) for p in parameters], anchor_gradients),
        ):
            if other := other_gradients(of_both, of_one, tolerance):
                raise JointPassError(
                    f"The gradient of {list(named)[other[0]]!r} on the {batch} is another in a joint pass: the "
                    "parameter is used in another way than by calling the module that owns it, or rows are not the "
                    f"first dimension there. {_INSTEAD}"
                )

    def _why(self) -> str:
        noisy = [name for name, m in self._model.named_modules() if m.training and is_noisy(m)]
        known = f" In train mode are {', '.join(noisy[:3])}: joint passes cannot be used with dropout." if noisy else ""
        return (
            f"{known} Rows must not depend on each other, and a loss that the model computes must leave out the rows "
            f"of the anchors (`fill`). {_INSTEAD}"
        )

    def _tolerance(self) -> float:
        """Relative, far above rounding: what goes wrong here is no matter of digits."""
        coarsest = max(torch.finfo(dtype).eps for dtype in AnchorRetention._precisions(self.retention))
        if self.retention.device.type != "cpu":
            coarsest = max(coarsest, 2.0**-10)  # TF32
        return float(coarsest**0.5)


class _Anchored(NamedTuple):
    """What is compared of a forward: the model's output, of which the logits, and hidden states."""

    output: Any
    logits: Tensor | None
    hidden: dict[Layer, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*([] if self.logits is None else [self.logits]), *self.hidden.values()]

    def leaves(self) -> "_Anchored":
        """The same without what came before it."""
        logits = None if self.logits is None else self.logits.detach().requires_grad_()
        return _Anchored(self.output, logits, {k: x.detach().requires_grad_() for k, x in self.hidden.items()})


def _call(model: nn.Module, inputs: Any) -> Any:
    """As a loop calls it; labels too, unlike in `passes.call`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
