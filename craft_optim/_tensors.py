"""Tensors made of other tensors, such as quantised states: they support few operations, their parts all."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["copies_of", "parts_of"]


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values; itself if it is plain."""
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
    """Copies of the tensors made of other tensors, by id, as in the memo of `copy.deepcopy`."""
    made = [x for x in values if isinstance(x, Tensor) and is_traceable_wrapper_subclass(x)]
    return {id(x): _copy(x) for x in made}
