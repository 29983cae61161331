"""Phases of a step, measured on stand-ins: no memory, no arithmetic, the model's own code."""

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
        peak: Most bytes that it holds, including the gradients that it makes.
        activations: Most bytes without these: activations for the backward, and working memory.
        flops: Operations of its matrix products, convolutions and attention.
    """

    peak: int
    activations: int
    flops: int


@dataclass(frozen=True)
class Phases:
    """Memory held all the time, and beyond it in the phases of a step; bytes.

    Attributes:
        weights: Parameters and buffers.
        inputs: The task's batch.
        state: The base's state, after its first step.
        gradients: Gradients of the task.
        rounded: The same with `gradient_memory="bfloat16"`.
        trained: Parameters with gradients; `trained_count` is their number.
        base_step: Working memory of the base's step.
        passes: ("task" or "anchors", True if activations are checkpointed) -> pass; without passes that cannot be
            switched.
        checkpointing: True if the model as given checkpoints activations.
        question: Memory of a first pass while it examines the model's head.
        look: Memory of a forward on anchors without gradients.
        kept: Bytes per anchor of the outputs in a cache.
        logits, piece, left_out: Values of `AnchorPass`.
        read: Count of numbers that the model read, answered with 1.
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
    """Measures the phases of a step.

    Args:
        model: Model on any device, also the meta device; its values and flags are not changed.
        batch: Inputs of the task and of its loss.
        anchor_batch: Inputs of a pass over anchors.
        loss: Loss of the task.
        base: Function that makes the base optimizer.
        anchors: Pass over anchors, of this model.
        values: True to run copies with values instead of stand-ins.

    Raises:
        ValueError: The model needs values, or nothing trains; or as for `standing_in`.
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
        self.reached: list[nn.Parameter] = []  # reached by the last backward

    def through(self, phase: Callable[[], Any]) -> Pass:
        """Measures the most memory that a function holds beyond the present."""
        before = self._memory.begin()
        phase()
        return Pass(self._memory.peak - before, self._memory.rest - before, self._memory.flops)

    def backward(self, compute: Callable[[], Tensor]) -> Pass:
        """Measures a forward and its backward, and frees the gradients."""
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
    """Makes tensors without memory within the block; an operation that needs values raises an error with its name."""
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
