"""Bytes of an anchor on disk, counted from shapes."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from craft_optim.anchors.images import is_image
from craft_optim.anchors.structure import flatten

__all__ = ["class_bytes", "has_pictures", "input_bytes", "value_bytes"]


def value_bytes(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes per anchor of values or hidden states `[B, ..., D]`."""
    return float(math.prod(shape[1:]) * dtype.itemsize)


def class_bytes(positions: float, classes: int, k: int, dtype: torch.dtype) -> float:
    """Bytes of the classes at an anchor's positions; in float16 2 V per position, or 6 k + 2.

    That is V log-probabilities; or k of them, their indices in int32, and one for the rest.
    """
    if k >= classes:
        return positions * classes * dtype.itemsize
    return positions * (k * (dtype.itemsize + 4) + dtype.itemsize)


def input_bytes(batch: Any) -> float:
    """Bytes per anchor of the inputs, including padding, which a cache leaves out; pictures as original bytes."""
    found = flatten(batch)
    return sum(x.numel() if is_image(x) else x.nbytes for x in found.tensors.values()) / found.count


def has_pictures(batch: Any) -> bool:
    """True if `input_bytes` has counted any as bytes."""
    return any(map(is_image, flatten(batch).tensors.values()))
