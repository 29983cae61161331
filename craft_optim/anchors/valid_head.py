"""The vocabulary head, run only at the positions whose logits count."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import run
from .masks import rows, select
from .passes import Forward, call, eager, logits_of, saving_hooks
from .structure import Inputs

__all__ = ["HeadUse", "head_agrees", "head_at", "output_head"]


@dataclass
class HeadUse:
    """The head in a forward under `head_at`.

    Attributes:
        used: True if the logits are `[1, P, V]`, those of the P valid positions in row-major order.
        calls: Number of times that the head has run. After more than one the output is of no use: run again without.
    """

    used: bool = False
    calls: int = 0


def output_head(model: nn.Module) -> nn.Module | None:
    """The one module that the model, or a model within it, calls its output embeddings; None of none or several."""
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    heads = {id(head): head for get in getters if callable(get) and isinstance(head := get(), nn.Module)}
    return next(iter(heads.values())) if len(heads) == 1 else None


@contextmanager
def head_at(model: nn.Module, valid: Tensor, head: nn.Module | None = None) -> Iterator[HeadUse]:
    """Within the block, a forward runs the vocabulary head at the valid positions only, if it can.

    The head, `get_output_embeddings()` as in Hugging Face, is given the hidden states `[1, P, D]` of the P positions
    instead of `[B, T, D]`: time and memory of the head and of the logits shrink by P / (B T). What the model does to
    logits position by position (softcapping, a cast) it does to `[1, P, V]`; what it does along positions would be
    wrong, and labels of `[B, T]` do not fit: `head_agrees` finds out. A compiled model runs as it is written.

    Nothing happens, and `used` stays False, where there is no such head or more than one, every position or none is
    valid, or what the head is given is not a plain tensor `[B, T, D]` (sequence and tensor parallelism), or is given
    within an activation checkpoint, whose second run would be another.

    Args:
        model: Unmodified, and not modified; in any wrapper.
        valid: `[B, T]`, true where logits are compared. On the CPU: the host does not wait for an accelerator.
        head: The head, if it is known: to look for it is a walk over the modules.
    """
    seen, places = HeadUse(), valid.flatten().nonzero().flatten()
    head = head or output_head(model)
    if head is None or valid.ndim != 2 or not 0 < len(places) < valid.numel():
        yield seen
        return
    outside = torch.is_grad_enabled(), saving_hooks()

    def at_valid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.calls += 1
        seen.used = False
        name, hidden = ("", args[0]) if args else next(iter(kwargs.items()), ("", None))
        if seen.calls > 1 or type(hidden) is not Tensor or hidden.ndim != 3 or hidden.shape[:2] != valid.shape:
            return None
        if (torch.is_grad_enabled(), saving_hooks()) != outside:
            return None
        seen.used = True
        selected = select(hidden.flatten(0, 1), places).unsqueeze(0)
        return ((selected, *args[1:]), kwargs) if args else (args, kwargs | {name: selected})

    handle = head.register_forward_pre_hook(at_valid, with_kwargs=True)
    try:
        with eager():
            yield seen
    finally:
        handle.remove()


def head_agrees(model: nn.Module, inputs: Inputs, valid: Tensor, *, forward: Forward | None = None) -> bool:
    """True if the model's logits under `head_at` are its logits at the valid positions.

    Runs two forwards without gradients, one of them with every logit: ask once, in the conditions of the passes.

    Args:
        model: As for `head_at`.
        inputs: A batch, on the model's device.
        valid: `[B, T]`, true where logits are compared.
        forward: As for `run`.
    """
    if output_head(model) is None:
        return False
    with torch.no_grad():
        whole = logits_of(run(model, inputs, forward=forward)[0])
        try:
            with head_at(model, valid) as seen:
                found = logits_of(call(model, inputs, forward))
        except Exception:  # whatever a model does with logits of another shape, such as a loss over labels
            return False
    if not seen.used or whole is None or found is None or whole.shape[:-1] != valid.shape:
        return False
    expected = rows(whole, valid)
    if found.shape != (1, *expected.shape):
        return False
    rounding = torch.finfo(torch.bfloat16).eps
    scale = float(torch.where(expected.isfinite(), expected, 0.0).abs().max())
    return torch.allclose(found[0], expected, rtol=rounding, atol=rounding * scale, equal_nan=True)
