"""Conditions of a pass over anchors: attributes that make noise are changed and, on request, nothing runs compiled.

They hold in the forward, and again in the backward, where activation checkpointing repeats the forward: with dropout it
would be another function, and compiled only the second time it would keep other tensors. A caller that runs both puts a
block around them, `held`. For a loss that is handed out, autograd's engine owns the object that restores the
attributes: it goes when the engine ends, with an error or without, and nothing else can keep it.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

__all__ = ["Setting", "eager", "held", "with_settings"]


class Setting(NamedTuple):
    """The value of an attribute in a pass."""

    owner: Any
    name: str
    value: Any


class _Conditions:
    """Conditions of one pass.

    Attributes:
        eager: True if compiled code runs as written in the backward.
        held: True if a block of `held` is around the backward.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.needed = any(getattr(one.owner, one.name) != one.value for one in settings)
        self.eager = self.held = False
        self._settings = settings

    @contextmanager
    def off(self) -> Iterator[None]:
        """Applies the settings within the block; afterwards attributes are what they were."""
        before = [
            Setting(one.owner, one.name, now)
            for one in self._settings
            if (now := getattr(one.owner, one.name)) != one.value
        ]
        try:
            for one in self._settings:
                _set(one)
            yield
        finally:
            for one in before:
                _set(one)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Applies the conditions around a backward."""
        with self.off(), ExitStack() as stack:
            if self.eager:
                stack.enter_context(_EAGER_BACKWARD())
            yield


def _set(setting: Setting) -> None:
    # Not by the config's own `__setattr__`: a dataclass may be frozen, or check its types
    object.__setattr__(setting.owner, setting.name, setting.value)


class _EagerBackward:
    """Runs compiled code as written while any backward that requested it goes on: two losses may share one."""

    def __init__(self) -> None:
        self._asked = 0
        self._stance: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._asked:
            self._stance = torch.compiler.set_stance("force_eager")
        self._asked += 1
        try:
            yield
        finally:
            self._asked -= 1
            if not self._asked:
                self._stance.__exit__(None, None, None)


_EAGER_BACKWARD = _EagerBackward()


class _UntilTheEngineEnds:
    """Sets the conditions; restores the attributes when the engine calls it, or frees it after an error."""

    def __init__(self, conditions: _Conditions) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(conditions.again())

    def __call__(self) -> None:
        self._stack.close()

    __del__ = __call__


class _SteadyBackward(torch.autograd.Function):
    """Identity. Its backward, the first of all, sets the conditions until the whole backward is done."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, conditions: _Conditions) -> Tensor:
        ctx.conditions = conditions
        return loss.clone()  # not a view: callers may scale it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if not ctx.conditions.held:
            # No name of this frame's: the traceback of an error keeps the frame
            Variable._execution_engine.queue_callback(_UntilTheEngineEnds(ctx.conditions))  # type: ignore[attr-defined]
        return grad, None


class _Blocks(threading.local):
    """The blocks that run in this thread, the innermost last: forwards, and blocks of `held`."""

    def __init__(self) -> None:
        self.forwards: list[_Conditions] = []
        self.holders: list[list[_Conditions]] = []


_BLOCKS = _Blocks()


@contextmanager
def with_settings(settings: Sequence[Setting]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Applies settings within the block; afterwards every attribute is what it was.

    Yields a function that makes a loss apply them in its backward, too; it changes nothing without activation
    checkpointing.
    """
    conditions = _Conditions(settings)

    def remember(loss: Tensor) -> Tensor:
        if not ((conditions.needed or conditions.eager) and loss.requires_grad):
            return loss
        if _BLOCKS.holders:
            _BLOCKS.holders[-1].append(conditions)
        remembering: Tensor = _SteadyBackward.apply(loss, conditions)  # type: ignore[no-untyped-call]
        return remembering

    _BLOCKS.forwards.append(conditions)
    try:
        with conditions.off():
            yield remember
    finally:
        _BLOCKS.forwards.pop()


@contextmanager
def held() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Yields a function that makes the block around the backward of a loss that is computed in this one."""
    found: list[_Conditions] = []
    _BLOCKS.holders.append(found)
    try:
        yield lambda: _around_backward(found) if found else nullcontext()
    finally:
        _BLOCKS.holders.pop()


@contextmanager
def _around_backward(found: Sequence[_Conditions]) -> Iterator[None]:
    with ExitStack() as stack:
        for conditions in found:
            stack.enter_context(conditions.again())
            conditions.held = True
            stack.callback(setattr, conditions, "held", False)
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Runs compiled code as written within the block, and in the backward of a loss that remembers it.

    Compiled code knows nothing of hooks and forwards that were set after its compilation, and cannot be left early.
    Training's compiled code is untouched, and nothing is compiled anew.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        yield
        return
    if _BLOCKS.forwards:
        _BLOCKS.forwards[-1].eager = True
    with torch.compiler.set_stance("force_eager"):
        yield
