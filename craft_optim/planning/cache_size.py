"""Bytes of an anchor on disk, counted from shapes."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from craft_optim.anchors.structure import flatten

__all__ = ["class_bytes", "input_bytes", "value_bytes"]


def value_bytes(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes per anchor of values or hidden states `[B, ..., D]`."""
    return float(math.prod(shape[1:]) * dtype.itemsize)


def class_bytes(positions: float, classes: int, top_k: int | None, dtype: torch.dtype) -> float:
    """Bytes of the classes at an anchor's positions; in float16 2 V for each position, or 6 k + 2.

    That is V log-probabilities; or k of them, their numbers in int32, and that of the rest.
    """
    if top_k is None or top_k >= classes:
        return positions * classes * dtype.itemsize
    return positions * (top_k * (dtype.itemsize + 4) + dtype.itemsize)


def input_bytes(batch: Any) -> float:
    """Bytes per anchor of the inputs, padding included, which a cache leaves out; pictures as the bytes they were."""
    found = flatten(batch)
    return sum((x.numel() if _is_picture(x) else x.nbytes) / found.count for x in found.tensors.values())


def _is_picture(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.ndim >= 4
