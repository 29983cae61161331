"""Gradients of parameters as lists of pointers: take them out of `.grad`, put them back, swap them for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Gradients", "all_zero", "gradients_of", "put", "set_aside"]

Gradients = list[Tensor | None]


def gradients_of(parameters: Iterable[Tensor]) -> Gradients:
    """The `.grad` of each parameter; no copies."""
    return [p.grad for p in parameters]


def put(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Points each parameter's `.grad` at the given tensor, or at nothing."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g


@contextmanager
def set_aside(parameters: list[Tensor]) -> Iterator[Gradients]:
    """Within the block every `.grad` is None; afterwards, also after an exception, it is what it was.

    Yields the gradients that were set aside. Only pointers move: no memory, no traffic.
    """
    kept = gradients_of(parameters)
    try:
        for p in parameters:
            p.grad = None
        yield kept
    finally:
        put(parameters, kept)


def all_zero(gradients: Iterable[Tensor | None]) -> bool:
    """Whether there is at least one gradient and every element of all of them is zero. Reads the device."""
    present = [g for g in gradients if g is not None]
    with torch.no_grad():
        return bool(present) and not any(
            bool((g.coalesce().values() if g.is_sparse else g).count_nonzero()) for g in present
        )
