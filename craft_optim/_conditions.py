"""Conditions of a pass over anchors: attributes that make noise set otherwise and, if asked for, nothing compiled.

They hold in the forward, and once more in the backward, where activation checkpointing repeats the forward: with
dropout back on it would be another function, and compiled where it was not it would keep other tensors. Who runs both
has a block around them, `held`. Of a loss that is handed out, autograd's engine owns what sets them back: it goes when
the engine ends, with an error or without, and nothing else can keep it.
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
    """Of one pass.

    Attributes:
        eager: What is compiled runs as written in the backward.
        held: A block of `held` sees to the backward.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self.needed = any(getattr(one.owner, one.name) != one.value for one in settings)
        self.eager = self.held = False
        self._settings = settings

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the settings are made; afterwards attributes are what they were."""
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
        """Around a backward."""
        with self.off(), ExitStack() as stack:
            if self.eager:
                stack.enter_context(_EAGER_BACKWARD())
            yield


def _set(setting: Setting) -> None:
    # Past what configs make of it: a dataclass may be frozen, or check its types
    object.__setattr__(setting.owner, setting.name, setting.value)


class _EagerBackward:
    """Compiled code runs as written while any backward that asked for it goes on: two losses may share one."""

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
    """Sets the conditions; sets them back when the engine calls it, or lets go of it after an error."""

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
    """The blocks that are being run in this thread, the innermost last: forwards, and what `held` holds."""

    def __init__(self) -> None:
        self.forwards: list[_Conditions] = []
        self.holders: list[list[_Conditions]] = []


_BLOCKS = _Blocks()


@contextmanager
def with_settings(settings: Sequence[Setting]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block these settings are made; afterwards every attribute is what it was.

    Yields a function that makes a loss remember this for its backward; without activation checkpointing it changes
    nothing.
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
    """For who runs the backward of a loss that is made in the block: yields a function of the block around it."""
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
    """Within the block what is compiled runs as written; so does the backward of a loss that remembers it.

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
