"""Rewind: after a block of training, model, optimizers and random numbers are what they were before it."""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from craft_optim._tensors import parts_of
from craft_optim.anchors.names import class_names

__all__ = ["Rewind", "rewound"]

_PLAIN = (int, float, complex, str, bytes, bool, type(None))


class Rewind:
    """State of a `rewound` block.

    Attributes:
        stepped: Torch optimizers that have stepped in the block, in the order of their first step.
    """

    def __init__(self, stack: ExitStack, values: "_Values") -> None:
        self.stepped: list[Optimizer] = []
        self._kept: set[int] = set()
        self._stack, self._values = stack, values

    def values_back(self) -> None:
        """Restores every tensor's value now, within the block; other things stay as they are."""
        self._values.put_back()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not any(optimizer is known for known in self.stepped):
            self.keep(optimizer)
            self.stepped.append(optimizer)

    def keep(self, optimizer: Optimizer) -> None:
        """Records the optimizer's state and groups, and its parameters that are not the model's, as they are now."""
        if id(optimizer) in self._kept:
            return
        self._kept.add(id(optimizer))
        for group in optimizer.param_groups:
            for p in group["params"]:
                if not self._values.has(p):
                    self._stack.callback(setattr, p, "grad", None)  # its first backward may have been already
        attributes = {name: x for name, x in vars(optimizer).items() if isinstance(x, _PLAIN)}
        self._stack.callback(vars(optimizer).update, attributes)
        for tree in (optimizer.state, optimizer.param_groups):
            self._stack.callback(_form(tree, self._values))


@contextmanager
def rewound(model: nn.Module, others: Iterable[Any] = ()) -> Iterator[Rewind]:
    """Restores everything bit for bit after a block that may train the model in any way, also after an error.

    Everything: parameters, buffers, gradients, train and eval modes of the model; state and parameter groups of every
    torch optimizer that steps in the block, found automatically, and its parameters; `others`; the random numbers of
    Python, NumPy, the CPU and the accelerators. Tensors keep their place in memory. Gradients are None when the block
    begins.

    Batches that data loaders have handed out, files and plain attributes of modules are not restored.

    Args:
        model: The model, not sharded over processes.
        others: Other objects that change, with `state_dict` and `load_state_dict` such as learning-rate schedulers and
            gradient scalers; optimizers may be among them.

    Memory: on the CPU, all values of the model, its gradients and its optimizers' state.

    Raises:
        TypeError: One of `others` has no state, or the model is sharded.
    """
    others = list(others)
    for other in others:
        if not (hasattr(other, "state_dict") and hasattr(other, "load_state_dict")):
            raise TypeError(f"`restore` needs `state_dict` and `load_state_dict`. Found {type(other).__name__}.")
    _refuse_sharded(model)
    values = _Values()
    with ExitStack() as stack:
        stack.enter_context(_random_numbers())
        stack.callback(values.put_back)  # after everything that follows has put its tensors in their places
        _keep_model(model, values, stack)
        rewind = Rewind(stack, values)
        for other in others:
            if isinstance(other, Optimizer):
                rewind.keep(other)
            else:
                stack.callback(other.load_state_dict, copy.deepcopy(other.state_dict()))
        hook = register_optimizer_step_pre_hook(rewind._before_step)  # type: ignore[arg-type]
        try:
            yield rewind
        finally:
            hook.remove()


class _Values:
    """Tensors, and copies on the CPU of the values that they had when they were added."""

    def __init__(self) -> None:
        self._named: dict[int, Tensor] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []

    def has(self, tensor: Tensor) -> bool:
        return id(tensor) in self._named

    def keep(self, tensor: Tensor) -> None:
        if self.has(tensor):
            return
        self._named[id(tensor)] = tensor
        for part in parts_of(tensor):
            value = part.detach()
            # Subclasses that do not say what they are made of may not travel
            self._kept.append((part, value.to("cpu", copy=True) if type(value) is Tensor else value.clone()))

    def put_back(self) -> None:
        with torch.no_grad():
            for tensor, value in self._kept:
                tensor.detach().copy_(value)
        torch.clear_autocast_cache()  # it knows weights by their address, and they have other values now


def _keep_model(model: nn.Module, values: _Values, stack: ExitStack) -> None:
    modules = list(model.modules())
    for module in modules:
        stack.callback(setattr, module, "training", module.training)
        for slots in (module._parameters, module._buffers):
            stack.callback(slots.update, dict[str, Any](slots))
            for tensor in slots.values():
                if tensor is not None:
                    values.keep(tensor)
    for p in model.parameters():
        stack.callback(setattr, p, "grad", p.grad)
        if p.grad is not None:
            values.keep(p.grad)
            p.grad = None


def _form(tree: Any, values: _Values) -> Callable[[], Any]:
    """A function that restores the tree to what it is now, in the same containers; its tensors are kept in `values`."""
    if isinstance(tree, Tensor):
        values.keep(tree)
        return lambda: tree
    if isinstance(tree, MutableMapping):
        parts = {key: _form(x, values) for key, x in tree.items()}
        return lambda: _refill(tree, lambda: tree.update({key: part() for key, part in parts.items()}))
    if isinstance(tree, list | deque):
        items = [_form(x, values) for x in tree]
        return lambda: _refill(tree, lambda: tree.extend([item() for item in items]))
    if isinstance(tree, tuple):
        items = [_form(x, values) for x in tree]
        return lambda: ([item() for item in items], tree)[1]
    if isinstance(tree, np.ndarray | set):
        kept = copy.deepcopy(tree)
        return lambda: kept
    return lambda: tree


def _refill(container: Any, fill: Callable[[], None]) -> Any:
    container.clear()
    fill()
    return container


@contextmanager
def _random_numbers() -> Iterator[None]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = "cuda" if accelerator is None else accelerator.type
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the legacy one is what datasets draw from
    devices = range(0 if accelerator is None else torch.accelerator.device_count())
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _refuse_sharded(model: nn.Module) -> None:
    if "FullyShardedDataParallel" in class_names(model) or any(hasattr(p, "to_local") for p in model.parameters()):
        raise TypeError(
            f"{type(model).__name__} is sharded over processes (FSDP or tensor parallelism), which cannot be rewound. "
            "Do this with the whole model, before it is sharded."
        )
