"""Tensors that are made of others, such as quantised states: their own operations are few, those of their parts all."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["copies_of", "parts_of"]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold its values; of a plain one itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]


def _copy(tensor: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().clone()
    names, context = tensor.__tensor_flatten__()
    parts = {name: _copy(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def copies_of(values: Iterable[Any]) -> dict[int, Any]:
    """Copies of those that are made of others, by id, as `copy.deepcopy` keeps them in its memo."""
    made = [x for x in values if isinstance(x, Tensor) and is_traceable_wrapper_subclass(x)]
    return {id(x): _copy(x) for x in made}
