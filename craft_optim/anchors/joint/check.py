"""Whether one forward on two batches gives what two forwards give, and its backward what two backwards give.

Gradients are those of random gradients of the outputs: at the teacher's own weights those of a drift are nothing but
rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["differentiable", "other_gradients", "random_gradients", "same_values"]


def differentiable(output: Any) -> list[Tensor]:
    """The tensors in an output that have a graph."""
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]


def random_gradients(outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `inputs` for random gradients of `outputs`, the same for the same place and shapes of a sequence."""
    random = []
    for number, tensors in enumerate(outputs):
        generator = torch.Generator().manual_seed(number)
        random += [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in tensors]
    return list(torch.autograd.grad([x for xs in outputs for x in xs], inputs, random, allow_unused=True))


def same_values(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether all are the same, to `tolerance` of the largest value of each."""
    return [x.shape for x in ours] == [x.shape for x in theirs] and all(
        _close(x.detach(), y.detach(), tolerance) for x, y in zip(ours, theirs, strict=True)
    )


def other_gradients(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tolerance: float) -> list[int]:
    """Places of gradients that are not the same.

    A gradient may be off by `tolerance` of its norm, and of that of the largest: some are zero but for rounding. One
    that is missing is zero; but one that is missing here must be zero there.
    """
    largest = max((_norm(y) for y in theirs), default=0.0)
    return [i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if not _same(x, y, tolerance, largest)]


def _close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    scale = float(torch.where(y.isfinite(), y, 0.0).abs().max()) if y.numel() else 0.0
    return torch.allclose(x.double(), y.double(), rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _same(x: Tensor | None, y: Tensor | None, tolerance: float, largest: float) -> bool:
    if x is None or y is None:
        return _norm(x) == _norm(y) == 0.0
    apart = float((_dense(x) - _dense(y)).norm())
    return apart <= tolerance * (3.0 * _norm(y) + largest)


def _norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(_dense(x).norm())


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_sparse else x
