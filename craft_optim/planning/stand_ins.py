"""Stand-ins for a model's tensors: shapes and dtypes on the CPU, without memory and without values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from craft_optim.anchors.structure import map_tensors

__all__ = ["batch_like", "stand_in", "standing_in"]


def stand_in(x: Tensor, values: bool = False) -> Tensor:
    """A tensor like `x` on the CPU; within a mode of fake tensors it has no memory.

    Args:
        x: Tensor on any device.
        values: True to copy its values.
    """
    new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    if values:
        with torch.no_grad():
            new.copy_(x)
    return new


def batch_like(batch: Any, values: bool = False) -> Any:
    """A batch of stand-ins; other values stay. A library's own mapping becomes a dict."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return map_tensors(lambda x: stand_in(x, values) if isinstance(x, Tensor) else x, batch)


@contextmanager
def standing_in(model: nn.Module, values: bool = False) -> Iterator[None]:
    """Replaces parameters and buffers by stand-ins within the block; restores them afterwards.

    Shared tensors stay shared. Modules are in train mode.

    Raises:
        ValueError: A parameter has no shape yet, or is a shard.
    """
    tables: list[Any] = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    kept = [dict(table) for table in tables]
    modes = [(module, module.training) for module in model.modules()]
    made: dict[int, Tensor] = {}
    try:
        model.train()
        for table, tensors in zip(tables, kept, strict=True):
            for name, x in tensors.items():
                if x is not None and id(x) not in made:
                    made[id(x)] = _of(name, x, values)
                table[name] = x if x is None else made[id(x)]
        yield
    finally:
        for table, tensors in zip(tables, kept, strict=True):
            table.clear()
            table.update(tensors)
        for module, training in modes:
            module.training = training


def _of(name: str, x: Tensor, values: bool) -> Tensor:
    if is_lazy(x) or is_traceable_wrapper_subclass(x):
        raise ValueError(
            f"A plan needs whole parameters with shapes. Found {name!r}, {type(x).__name__}: plan the model before it "
            "is sharded or quantised, and after its first forward if it has lazy modules."
        )
    if values and x.is_meta:
        raise ValueError(f"values=True needs a model with weights. Found {name!r} on the meta device.")
    new = stand_in(x, values)
    return nn.Parameter(new, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else new
