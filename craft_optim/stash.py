"""Where the task gradients wait while the retention pass runs, and until the base optimizer has stepped.

For N elements of float32, beyond the base optimizer's own peak:

| `gradient_memory` | they wait | in the pass | in the base's step | error | cost |
|---|---|---|---|---|---|
| "copy" | where they are | N | N | none | none |
| "bfloat16" | rounded | N/2 | N/2 | at most 2^-8 of an element | 2 conversions |
| "host" | in the main memory | 0 | 0; N in between, for the merge | none | 3 transfers |
| "streaming" | see `craft_optim.streaming` | largest tensor | 0 | last coefficients | a read per tensor |

A gradient that is a view into a larger buffer (a bucket of DDP, say) cannot be freed and stays where it is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from craft_optim.gradients import Gradients

__all__ = ["GradientMemory", "Stash"]

GradientMemory = Literal["copy", "bfloat16", "host", "streaming"]


class _Away(NamedTuple):
    """A gradient that waits in another form.

    Attributes:
        copy: What of it is on this process, rounded or in the main memory.
        dtype: As it was.
        device: As it was.
        wrap: Makes of a tensor like `copy` what the gradient was, a DTensor perhaps.
    """

    copy: Tensor
    dtype: torch.dtype
    device: torch.device
    wrap: Callable[[Tensor], Tensor]


class Stash:
    """Gradients that are needed again later. Whoever makes it lets go of them, so that their memory is free meanwhile.

    Args:
        gradients: Of any kind; entries may be None.
        memory: See above; "streaming" is as "copy" here.
    """

    def __init__(self, gradients: Gradients, memory: GradientMemory) -> None:
        self._kept: list[Tensor | _Away | None] = [_put_away(g, memory) for g in gradients]

    def for_surgery(self) -> Gradients:
        """On their devices; rounded ones as they wait. Copies of those that wait elsewhere."""
        return [g.wrap(g.copy.to(g.device, non_blocking=True)) if isinstance(g, _Away) else g for g in self._kept]

    def give_back(self, parameters: Sequence[Tensor]) -> None:
        """Points each `.grad` at what it was, up to rounding.

        One after another, and each where another gradient was freed: no third list of gradients lives at any time.
        """
        for i, p in enumerate(parameters):
            kept, p.grad = self._kept[i], None
            if isinstance(kept, _Away):
                kept = self._kept[i] = kept.wrap(kept.copy.to(kept.device, kept.dtype, non_blocking=True))
            p.grad = kept

    def in_their_dtype(self, merged: Sequence[Tensor | None]) -> Gradients:
        """Of merged gradients, those that are rounded task gradients in the dtype of before."""
        return [
            g if g is None or not isinstance(kept, _Away) else g.to(kept.dtype)
            for g, kept in zip(merged, self._kept, strict=True)
        ]


def _put_away(g: Tensor | None, memory: GradientMemory) -> Tensor | _Away | None:
    if g is None or memory in ("copy", "streaming") or g.layout != torch.strided:
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
    from torch.distributed.tensor import DTensor  # slow to import, and whoever comes here has done so

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"
