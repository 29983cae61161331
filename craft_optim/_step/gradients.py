"""Gradients of parameters as lists of pointers: taken out of `.grad`, kept in a `Stash`, put back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from inspect import getclosurevars
from itertools import repeat
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rules import GradientMemory

__all__ = [
    "Gradients",
    "Graph",
    "Stash",
    "all_zero",
    "any_of",
    "gradients_of",
    "graph_of",
    "leaves",
    "not_among",
    "not_zero",
    "present",
    "put",
    "set_aside",
    "without_hooks",
]

Gradients = list[Tensor | None]

_PLACE = object.__hash__  # unique among live objects, as `id`, which `filelock` audits in Python


def gradients_of(parameters: Iterable[Tensor]) -> Gradients:
    """The `.grad` of each parameter; no copies."""
    return [p.grad for p in parameters]


def present(gradients: Iterable[Tensor | None]) -> list[bool]:
    """For each gradient, True if there is one."""
    return [g is not None for g in gradients]


def any_of(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> bool:
    """True if there is any gradient, or no parameter with elements: FSDP1 may leave a process only empty ones."""
    elements = False
    for g, p in zip(gradients, parameters, strict=True):  # usually decided by the first one
        if p.numel() > 0:
            if g is not None:
                return True
            elements = True
    return not elements


def not_among(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that are none of the others."""
    known = set(map(_PLACE, others))
    return [x for x in tensors if _PLACE(x) not in known]


def put(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Points each parameter's `.grad` at the given tensor, or at nothing."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g


@contextmanager
def set_aside(parameters: list[Tensor]) -> Iterator[None]:
    """Makes every `.grad` None within the block; restores it afterwards, also after an exception.

    Only pointers move: no memory, no traffic.
    """
    kept = gradients_of(parameters)
    try:
        put(parameters, repeat(None, len(parameters)))
        yield
    finally:
        put(parameters, kept)


@contextmanager
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Removes the hooks of these parameters within the block; restores them afterwards, also after an exception.

    Hooks that frameworks put at the nodes of the graph stay.
    """
    # In place: autograd, and handles that remove hooks, hold these dictionaries
    tables = [
        table
        for p in parameters
        for table in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
        if table
    ]
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def not_zero(gradients: Iterable[Tensor | None]) -> list[bool]:
    """For each gradient, True if any of its elements is not zero. One read of each device."""
    flags = [False if g is None else (g.coalesce().values() if g.is_sparse else g).count_nonzero() for g in gradients]
    counts: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        if isinstance(flag, Tensor):
            counts.setdefault(flag.device, []).append(flag)
    read = {device: torch.stack(of_device).tolist() for device, of_device in counts.items()}
    return [bool(read[flag.device].pop(0)) if isinstance(flag, Tensor) else flag for flag in flags]


def all_zero(gradients: Sequence[Tensor | None]) -> bool:
    """True if there is at least one gradient and every element of all of them is zero. Reads the device."""
    with torch.no_grad():
        return any(g is not None for g in gradients) and not any(not_zero(gradients))


class Graph(NamedTuple):
    """Nodes of a loss's graph, without those that a reentrant checkpoint will compute.

    Attributes:
        written: The tensors at its ends, whose `.grad` a backward writes.
        inner: The nodes before its ends.
    """

    written: list[Tensor]
    inner: list[Any]


def graph_of(loss: Tensor) -> Graph:
    """Collects every node of the loss's graph once, with one look at each: it is walked on each pass."""
    graph = Graph([], [] if loss.grad_fn is None else [loss.grad_fn])
    written, inner = graph
    seen = {None, *inner}
    for node in inner:  # grows in the loop
        for following, _ in node.next_functions:
            if following in seen:
                continue
            seen.add(following)
            if type(following).__name__ == "AccumulateGrad":
                written.append(following.variable)
            else:
                inner.append(following)
    return graph


def leaves(graph: Graph) -> list[Tensor]:
    """The tensors whose `.grad` a backward writes, as far as the graph shows; some may appear twice.

    For a reentrant checkpoint, the tensors that its function holds.
    """
    held = [x for node in graph.inner if hasattr(node, "run_function") for x in _held_by(node.run_function)]
    return [*graph.written, *(x for x in held if x.is_leaf)]


def _held_by(function: Any) -> list[Tensor]:
    """The tensors that a function holds: in modules, its bound object, its arguments, or its names."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, torch.nn.Module):
            found += one.parameters()
        elif isinstance(one, list | tuple | set):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, MethodType):
            waiting += [one.__self__, one.__func__]
        elif isinstance(one, partial):
            waiting += [one.func, one.args, one.keywords]
        elif isinstance(one, FunctionType):
            waiting += [one.__defaults__ or (), one.__kwdefaults__ or {}]
            with suppress(ValueError):  # a name not bound yet
                known = getclosurevars(one)
                waiting += [known.nonlocals, known.globals]
        elif not isinstance(one, ModuleType | type):  # a user's object
            waiting += [x for x in getattr(one, "__dict__", {}).values() if isinstance(x, Tensor | torch.nn.Module)]
    return found


class _Away(NamedTuple):
    """A gradient that waits in another form.

    Attributes:
        copy: Local part of the gradient, rounded or in host memory.
        dtype: Original dtype.
        device: Original device.
        wrap: Function that makes the gradient, perhaps a DTensor, from a tensor like `copy`.
    """

    copy: Tensor
    dtype: torch.dtype
    device: torch.device
    wrap: Callable[[Tensor], Tensor]


class Stash:
    """Gradients that are needed again later. The caller drops its references, to free their memory meanwhile.

    A gradient that is a view into a larger buffer (a bucket of DDP, say) cannot be freed and stays where it is.

    Args:
        gradients: Gradients of any kind; entries may be None.
        memory: Storage, `gradient_memory` of `Rules`.
    """

    def __init__(self, gradients: Gradients, memory: GradientMemory) -> None:
        self._stay = memory == "copy"
        self._kept: list[Any] = list(gradients) if self._stay else [_put_away(g, memory) for g in gradients]

    def for_surgery(self) -> Gradients:
        """The gradients on their devices, rounded ones as stored; copies of those stored elsewhere."""
        if self._stay:
            return list(self._kept)
        return [g.wrap(g.copy.to(g.device, non_blocking=True)) if isinstance(g, _Away) else g for g in self._kept]

    def give_back(self, parameters: Sequence[Tensor]) -> None:
        """Restores each `.grad`, up to rounding.

        One after another, each where another gradient was freed: no third list of gradients ever exists. A gradient
        without enough memory is None; the error is raised after all others are restored.
        """
        if self._stay:
            put(parameters, self._kept)
            return
        failed: RuntimeError | None = None
        for i, p in enumerate(parameters):
            kept, p.grad = self._kept[i], None
            if isinstance(kept, _Away):
                try:
                    kept = self._kept[i] = kept.wrap(kept.copy.to(kept.device, kept.dtype, non_blocking=True))
                except RuntimeError as error:
                    kept, failed = None, error
            p.grad = kept
        if failed is not None:
            raise failed

    def in_their_dtype(self, merged: Sequence[Tensor | None]) -> Gradients:
        """The merged gradients; rounded task gradients among them get their original dtype."""
        if self._stay:
            return list(merged)
        return [
            g if g is None or not isinstance(kept, _Away) else g.to(kept.dtype)
            for g, kept in zip(merged, self._kept, strict=True)
        ]


def _put_away(g: Tensor | None, memory: GradientMemory) -> Tensor | _Away | None:
    if g is None or g.layout != torch.strided:
        return g
    local: Tensor = g.to_local() if hasattr(g, "to_local") else g
    if local.untyped_storage().nbytes() > local.nbytes:
        return g
    if memory == "bfloat16":
        if local.dtype not in (torch.float32, torch.float64):
            return g
        copy = local.to(torch.bfloat16)
    else:
        if _is_host(local.device):
            return g
        copy = torch.empty_like(local, device="cpu", pin_memory=local.device.type == "cuda")
        copy.copy_(local, non_blocking=True)
    wrap = _itself
    if local is not g:
        spec: Any = g
        wrap = partial(_as_dtensor, spec.device_mesh, spec.placements, g.shape, g.stride())
    return _Away(copy, local.dtype, local.device, wrap)


def _itself(local: Tensor) -> Tensor:
    return local


def _as_dtensor(mesh: Any, placements: Any, shape: torch.Size, stride: tuple[int, ...], local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor  # slow to import, but imported already here

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"
