"""Retention closures: the loss that `CraftOptimizer` constrains, and the questions that it can answer.

A plain function without arguments that returns L_ret as a scalar tensor with a graph is enough. Objects of a subclass
of `Retention` answer questions, too. Nothing is read from, or written to, any other object.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from craft_optim._numbers import whole

__all__ = ["Retention", "RetentionClosure", "as_retention", "measurable"]

RetentionClosure = Callable[[], Tensor]
"""A function without arguments that returns L_ret, a scalar tensor with a graph; each `Retention` is one."""


class Retention(ABC):
    """A retention loss on anchors that are numbered: pass 0, 1, 2, ...

    `CraftOptimizer` keeps the number of the next pass in its own state and calls `loss(number)`. So a line search that
    evaluates twice, a resumed run, a copied optimizer and a second one on the same closure each see the right anchors;
    nothing has to be restored.

    In your own loop call the object, `retention()`: it counts its passes, and `state_dict` holds the count.

    Attributes:
        unit: Unit of L_ret and of epsilon, in words.
        tolerance: Largest |L_ret| that rounding gives an unchanged model; infinite if unknown.
        repeats: True if the same number gives the same anchors again, so that L_ret can be compared before and after a
            step.
        shared: True if each of several processes has a share of the anchors, see `shard`.

    Example:
        >>> import torch
        >>> class Drift(Retention):
        ...     unit = "mean squared difference of outputs"
        ...     def __init__(self, model, inputs):
        ...         self.model, self.inputs = model, inputs  # inputs: batches of anchors
        ...         with torch.no_grad():
        ...             self.before = [model(x) for x in inputs]
        ...     def loss(self, number):
        ...         i = number % len(self.inputs)
        ...         return (self.model(self.inputs[i]) - self.before[i]).square().mean()
        >>> drift = Drift(torch.nn.Linear(2, 1), [torch.ones(3, 2), torch.zeros(3, 2)])
        >>> drift().item(), drift.state_dict()
        (0.0, {'position': 1})
    """

    unit: str = "the closure's own unit"
    tolerance: float = math.inf
    repeats: bool = True
    shared: bool = False

    _position = 0
    _fixed: frozenset[str] = frozenset()  # attributes that only the constructor sets: others derive from them

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            raise AttributeError(f"`{name}` of a closure is fixed. Make another closure with it.")
        super().__setattr__(name, value)

    @abstractmethod
    def loss(self, number: int) -> Tensor:
        """L_ret on the anchors of a pass: a scalar tensor, with a graph unless gradients are off.

        Args:
            number: Number of the pass, >= 0. The same number must give the same anchors and the same random draws.
        """

    def __call__(self) -> Tensor:
        """`loss` of the next pass, with a graph wherever it is called; counts the pass if it succeeds."""
        with torch.enable_grad():
            loss = self.loss(self._position)
        self._position += 1
        return loss

    @property
    def position(self) -> int:
        """Number of the pass that the next call without a number runs; passes of `CraftOptimizer` do not count."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        self._position = whole("position", value, least=0)

    def state_dict(self) -> dict[str, int]:
        """The count of calls without a number, for checkpoints of your own loop."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores the count of `state_dict`.

        Raises:
            KeyError, ValueError: `state` has no position, or an impossible one.
        """
        self.position = state["position"]

    def parameters(self) -> Iterable[Tensor]:
        """All parameters that the backward may reach, whoever owns them. Default: what the loss's graph shows."""
        return ()

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Raises if the model is not the one to keep; called before pass 0 if the base may move it first.

        Default: no check. A closure that checks in pass 0 must not check again after this.
        """

    def drift(self, anchors: Any = None, count: int | None = None) -> float:
        """The mean of L_ret without gradients, in `unit`. Advances nothing.

        Args:
            anchors: Anchors to measure on instead of its own, such as held-out ones. None: its own.
            count: Largest number of anchors to measure on, evenly spaced, the same ones at every call. None: all.

        Raises:
            TypeError: This class does not measure it.
        """
        raise TypeError(f"{type(self).__name__} has no `drift`: it tells its loss on the next anchors only.")

    def check_anchors(self, anchors: Any) -> None:  # noqa: B027 - nothing to check by default
        """Raises ValueError if `drift` cannot take these anchors, as far as known without a forward."""

    def examples(self, count: int) -> list[Any]:
        """Inputs of at most `count` of its anchors, evenly spaced, each a batch of one; empty if it cannot give any."""
        return []

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Makes this process one of several that train one model; called before their first pass.

        Default: sets `shared`, nothing else.

        Args:
            rank: Place of this process among those that see different data, in [0, world_size).
            world_size: Number of these processes.
            mean: Function that averages a small tensor over these processes; each must make the same calls.
        """
        self.shared = world_size > 1


class _Function(Retention):
    """A plain function as a `Retention`; it counts its own passes, if at all."""

    repeats = False

    def __init__(self, function: RetentionClosure) -> None:
        self.function = function

    def loss(self, number: int) -> Tensor:
        return self.function()


def as_retention(closure: object, name: str = "retention_closure") -> Retention:
    """The closure itself if it is a `Retention`, else a `Retention` that calls it.

    Args:
        closure: A `Retention`, or a function without arguments.
        name: Name of the argument, for messages.

    Raises:
        TypeError: It cannot be called, is a class, or its `unit` or `tolerance` is invalid.
    """
    if isinstance(closure, Retention):
        if not isinstance(closure.unit, str):
            raise TypeError(f"`{name}.unit` must be text. Found {closure.unit!r}.")
        if not isinstance(closure.tolerance, int | float) or not closure.tolerance >= 0.0:
            raise TypeError(f"`{name}.tolerance` must be a number >= 0. Found {closure.tolerance!r}.")
        return closure
    if not callable(closure) or isinstance(closure, type):
        found = closure.__name__ if isinstance(closure, type) else type(closure).__name__
        wraps = "cache.retention(model), such as LogitRetention(model, cache)"
        remedy = f": pass what runs the model on it, {wraps}" if hasattr(closure, "retention") else ""
        raise TypeError(
            f"`{name}` must be callable without arguments and return the retention loss, or be None. Found "
            f"{found}{remedy}."
        )
    return _Function(closure)


def measurable(closure: object, name: str = "retention") -> Retention:
    """The closure itself, if it is a `Retention` that can measure its `drift`.

    Raises:
        TypeError: It is a plain function, or its class does not define `drift`.
    """
    if not isinstance(closure, Retention) or type(closure).drift is Retention.drift:
        raise TypeError(
            f"`{name}` must be a craft_optim.Retention with a method `drift()` that measures it without "
            "gradients, as the closures of craft_optim.anchors are: others tell their loss on the next anchors only. "
            f"Found {type(closure).__name__}."
        )
    return as_retention(closure, name)
