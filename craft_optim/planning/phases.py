"""What the phases of a step hold, measured on stand-ins: no memory, no arithmetic, the model's own code."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from craft_optim.planning.live_memory import LiveMemory
from craft_optim.planning.passes import AnchorPass, Loss, can_checkpoint, checkpointing, is_checkpointing
from craft_optim.planning.stand_ins import batch_like, standing_in

__all__ = ["Base", "Pass", "Phases", "measured"]

Base = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Pass:
    """A forward and its backward; bytes.

    Attributes:
        peak: The most that it holds, gradients that it makes included.
        activations: The most without these: what the backward needs, and what forward and backward work with.
        flops: Its matrix products, convolutions and attention.
    """

    peak: int
    activations: int
    flops: int


@dataclass(frozen=True)
class Phases:
    """What there is all the time, and what the phases of a step hold beyond it; bytes.

    Attributes:
        weights: Parameters and buffers.
        inputs: The task's batch.
        state: The base's state, after its first step.
        gradients: Those of the task.
        rounded: The same as `gradient_memory="bfloat16"` keeps them.
        trained: The parameters that have them; `trained_count` their number.
        base_step: What the base's step works with.
        passes: ("task" or "anchors", whether activations are checkpointed) -> the pass; what is not known how to turn
            on is not there.
        checkpointing: Whether the model does it as it is.
        question: What a first pass holds while it looks at the model's head.
        look: A forward of anchors without gradients.
        kept: Bytes that a cache holds of each anchor's outputs.
        logits, piece, left_out: As of `AnchorPass`.
        read: Numbers that the model asked for, and was told 1.
    """

    weights: int
    inputs: int
    state: int
    gradients: int
    rounded: int
    trained: int
    trained_count: int
    base_step: int
    passes: dict[tuple[str, bool], Pass]
    checkpointing: bool
    question: int
    look: Pass
    kept: float
    logits: int
    piece: int
    left_out: bool
    read: int


def measured(
    model: nn.Module, batch: Any, anchor_batch: Any, loss: Loss, base: Base, anchors: AnchorPass, *, values: bool
) -> Phases:
    """Goes through the phases of a step.

    Args:
        model: On any device, the meta device included; neither its values nor its flags are changed.
        batch: Inputs of the task, and what its loss needs.
        anchor_batch: Inputs of a pass over anchors.
        loss: The task's.
        base: Makes the base optimizer.
        anchors: The pass, of this model.
        values: Run copies with their values in the place of stand-ins.

    Raises:
        ValueError: The model needs values, or nothing trains; or as `standing_in`.
    """
    memory = LiveMemory()
    checkpointed = is_checkpointing(model)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if not values:
            stack.enter_context(_shapes_alone(model))
        stack.enter_context(memory)
        stack.enter_context(standing_in(model, values))
        weights = memory.live
        batch = batch_like(batch, values)
        inputs = memory.live - weights
        parameters = _trainable(model)
        for p in parameters:
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: memory.set_aside(p.grad)
            )
        walk = _Walk(memory, parameters)
        question = walk.through(lambda: anchors.ask(batch_like(anchor_batch, values)))
        passes, reached = {}, parameters
        for on in {checkpointed, *((False, True) if can_checkpoint(model) else ())}:
            with checkpointing(model, on):
                passes["task", on] = walk.backward(lambda: loss(model, batch))
                reached = walk.reached
                passes["anchors", on] = walk.backward(lambda: anchors(batch_like(anchor_batch, values)))
        with torch.no_grad():
            look = walk.through(lambda: anchors(batch_like(anchor_batch, values)))
        before = memory.live
        for p in reached:
            p.grad = torch.zeros_like(p)
        gradients = memory.live - before
        optimizer = base(parameters)
        optimizer.step()
        state = memory.live - before - gradients
        step = walk.through(optimizer.step)
        return Phases(
            weights=weights,
            inputs=inputs,
            state=state,
            gradients=gradients,
            rounded=sum(p.nbytes if p.dtype not in _ROUNDED else 2 * p.numel() for p in reached),
            trained=sum(p.nbytes for p in reached),
            trained_count=sum(p.numel() for p in reached),
            base_step=step.peak,
            passes=passes,
            checkpointing=checkpointed,
            question=question.peak,
            look=look,
            kept=anchors.kept,
            logits=anchors.logits,
            piece=anchors.piece,
            left_out=anchors.left_out,
            read=memory.read,
        )


_ROUNDED = (torch.float32, torch.float64)


class _Walk:
    """Runs phases, one after another."""

    def __init__(self, memory: LiveMemory, parameters: list[nn.Parameter]) -> None:
        self._memory, self._parameters = memory, parameters
        self.reached: list[nn.Parameter] = []  # by the last backward

    def through(self, phase: Callable[[], Any]) -> Pass:
        """What a function holds at most beyond what is there."""
        before = self._memory.begin()
        phase()
        return Pass(self._memory.peak - before, self._memory.rest - before, self._memory.flops)

    def backward(self, compute: Callable[[], Tensor]) -> Pass:
        """The same of a forward and its backward, whose gradients are let go of."""
        found = self.through(lambda: _scalar(compute()).backward())  # type: ignore[no-untyped-call]
        self.reached = [p for p in self._parameters if p.grad is not None]
        for p in self._parameters:
            p.grad = None
        return found


def _scalar(loss: Tensor) -> Tensor:
    if loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a graph'}"
        raise ValueError(f"`loss` must return a scalar with a graph. Found {found}: reduce it, for example by .mean().")
    return loss


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError(f"Nothing of {type(model).__name__} trains: there is no parameter with requires_grad=True.")
    return found


@contextmanager
def _shapes_alone(model: nn.Module) -> Iterator[None]:
    """Within the block tensors are made without memory; operations that need values are refused by name."""
    from torch._subclasses.fake_tensor import (  # takes a second
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"{type(model).__name__} needs the values of a tensor, by {error.func}, and a plan has shapes alone. Leave "
            "masks out of the batch; or pass values=True and a model with weights, of which a copy runs on the CPU."
        ) from error
