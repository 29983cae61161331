"""One constraint in one optimizer step: the pass of its closure, apart from all else, and its multiplier."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from craft_optim import scaling
from craft_optim.constraints import Constraint
from craft_optim.dual import Update
from craft_optim.gradients import Gradients, gradients_of, put, set_aside
from craft_optim.retention import as_retention

if TYPE_CHECKING:
    from craft_optim.distributed import Layout

__all__ = ["Passed", "RetentionPass"]


class Passed(NamedTuple):
    """What one pass gives.

    Attributes:
        loss: L_ret, a tensor without a graph.
        gradients: Those of `scale` times it, as autograd left them.
        scale: The private loss scale; 1 without float16.
    """

    loss: Tensor
    gradients: Gradients
    scale: float


class RetentionPass:
    """Of a line search, the passes of all evaluations.

    Args:
        constraint: At this step.
        parameters: All of the optimizer's. Their `.grad` is in the stash: it is None after a pass, or what it gave.
        state: The constraint's own `craft_*` floats before the step.
        layout: Of several processes; None for one.
        float16: Whether float16 takes part in the closure's backward; None to find out.

    Attributes:
        constraint: As given.
        state: The floats after the step.
        float16: As found out.
        update: What the controller has said; None before it was asked.
    """

    def __init__(
        self,
        constraint: Constraint,
        parameters: list[Tensor],
        *,
        state: dict[str, float],
        layout: "Layout | None",
        float16: bool | None,
    ) -> None:
        self.constraint = constraint
        self.state = state
        self.float16 = float16
        self.update: Update | None = None
        self._closure, self._parameters, self._layout = as_retention(constraint.closure), parameters, layout
        self._number = int(state["craft_anchor_position"])  # a line search evaluates more than once, all on these

    def note_position(self) -> None:
        """Keeps, in the state, the number of the next pass."""
        self.state["craft_anchor_position"] = float(self._number + 1)

    def gradients(self) -> Passed:
        """Runs the closure and its backward on the anchors of this step."""
        with self.isolated():
            loss, scale = self.scaled_loss()
            loss.backward()  # type: ignore[no-untyped-call]
            retention = gradients_of(self._parameters)
        if self._layout is not None:
            retention = self._layout.averaged(retention, self._parameters)
        self.check_reached(retention)
        return Passed(loss.detach() if scale == 1.0 else loss.detach() / scale, retention, scale)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Within the block, no pass reaches a `.grad` or a reduction that is not its own."""
        own = {id(p) for p in self._parameters}
        others = [p for p in self._closure.parameters() if id(p) not in own]
        own_reduction = nullcontext() if self._layout is None else self._layout.own_reduction()
        put(self._parameters, [None] * len(self._parameters))  # they are in the stash
        with set_aside(others), own_reduction, torch.enable_grad():
            yield

    def scaled_loss(self) -> tuple[Tensor, float]:
        """L_ret times the private scale, and the scale."""
        loss = self._closure.loss(self._number)
        _check_loss(loss, self.constraint.name)
        if self.float16 is None:
            self.float16 = scaling.reaches_float16(loss)
        scale = self.state["craft_scale"] if self.float16 else 1.0
        wide = loss.float() if loss.dtype == torch.float16 else loss
        return (wide if scale == 1.0 else wide * scale), scale

    def check_reached(self, retention: Gradients) -> None:
        """Raises RuntimeError if no parameter has a gradient."""
        # FSDP1 leaves a process parameters without elements, and those without gradients.
        reached = [g is not None for p, g in zip(self._parameters, retention, strict=True) if p.numel() > 0]
        if reached and not any(reached):
            raise RuntimeError(
                f"{self.constraint.prefix}The retention loss reaches none of the optimizer's parameters: every "
                "retention gradient is None. Does the closure run the model that is being trained (not a copy, not a "
                "re-created PEFT wrapper), and are the parameters behind the anchored output trainable? Under "
                "DeepSpeed ZeRO the optimizer owns flattened copies that no backward reaches: use DDP or FSDP2."
            )

    def may_repeat(self, scale: float) -> bool:
        """After an overflow in float16: whether a smaller scale may help; the state has it then."""
        if scale == 1.0:
            self.state |= scaling.initial_scale()  # no scale helps: the next pass shall not pay for this one
            return False
        self.state |= scaling.shrunk(self.state)
        return True

    def updated(self, loss: float, cap: float) -> Update:
        """Asks the controller; of a line search, at the first evaluation."""
        if self.update is None:
            dual_state = {
                k.removeprefix("craft_dual_"): v for k, v in self.state.items() if k.startswith("craft_dual_")
            }
            update = self.constraint.controller(dual_state, loss=loss, epsilon=self.constraint.epsilon, cap=cap)
            self.state |= {f"craft_dual_{k}": float(v) for k, v in update.state.items()}
            self.use(update)
            return update
        return self.update

    def use(self, update: Update) -> None:
        """What the merges of this step use."""
        self.update = update
        self.state["craft_lambda"] = update.multiplier

    def may_project(self, projection: str, loss: float) -> bool:
        """Whether what works against this constraint may be removed."""
        return projection == "always" or (projection == "violated" and loss > self.constraint.epsilon)


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
