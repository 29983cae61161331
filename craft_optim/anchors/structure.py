"""A batch as named tensors, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inputs", "Structure", "flatten", "map_tensors"]

Inputs = Tensor | tuple[Tensor | None, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Structure:
    """The form of a batch: its kind, and the names of its tensors.

    Attributes:
        kind: "tensor", "tuple" or "mapping".
        names: One per stored tensor: "0", "1", ... by place, or the mapping's keys.
        skipped: Places of a tuple that are None, or keys of a mapping whose values are not tensors.
    """

    kind: str
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def rebuild(self, tensors: Mapping[str, Tensor]) -> Inputs:
        """The batch in its original structure; what was skipped is None in a tuple and absent from a mapping."""
        if self.kind == "tensor":
            return tensors[self.names[0]]
        if self.kind == "tuple":
            return tuple(tensors.get(str(i)) for i in range(len(self.names) + len(self.skipped)))
        return {name: tensors[name] for name in self.names}


def flatten(batch: Any) -> tuple[Structure, dict[str, Tensor], int]:
    """Structure, named tensors and number of anchors of a batch.

    A batch is a tensor, a tuple or list of tensors, or a mapping from names to tensors. Entries of a mapping that are
    not tensors (task strings, None) are skipped and recorded; a tuple may hold None besides tensors.

    Raises:
        TypeError: The batch, or an entry of it, is something else.
        ValueError: The tensors do not share a first dimension of at least 1, the anchors.
    """
    if isinstance(batch, Tensor):
        kind, entries = "tensor", [("0", batch)]
    elif isinstance(batch, Mapping):
        kind, entries = "mapping", list(batch.items())
    elif isinstance(batch, tuple | list):
        kind, entries = "tuple", [(str(i), value) for i, value in enumerate(batch)]
    else:
        raise TypeError(f"A batch must be a tensor, a tuple or a mapping of tensors. Found {type(batch).__name__}.")
    named: dict[str, Tensor] = {}
    skipped: list[str] = []
    for key, value in entries:
        if not isinstance(key, str):
            raise TypeError(f"The keys of a batch must be strings. Found {key!r} of type {type(key).__name__}.")
        if isinstance(value, Tensor):
            named[key] = value
        elif kind == "mapping" or value is None:
            skipped.append(key)
        else:
            raise TypeError(
                f"A tuple batch must hold tensors or None. Found {type(value).__name__} at place {key}: use a "
                "mapping, where such entries are left out, or flatten it and pass `forward=`."
            )
    if not named:
        raise TypeError(f"A batch must hold at least one tensor. Found a {kind} with entries {skipped}.")
    for name, tensor in named.items():
        if tensor.ndim == 0 or tensor.layout != torch.strided:
            raise ValueError(
                f"Input {name!r} must be dense with the anchors as first dimension. Found shape "
                f"{tuple(tensor.shape)}, layout {tensor.layout}."
            )
    sizes = {name: len(tensor) for name, tensor in named.items()}
    count = next(iter(sizes.values()))
    if count == 0 or any(size != count for size in sizes.values()):
        raise ValueError(
            f"All inputs must have the same first dimension, the anchors, and at least one of them. Found {sizes}: "
            "leave other tensors out of the batch and recreate them in `forward=`."
        )
    return Structure(kind, tuple(named), tuple(skipped)), named, count


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The batch with `function` applied to each of its tensors."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(None if x is None else function(x) for x in inputs)
    return {name: function(x) for name, x in inputs.items()}
