"""A model as it was before it is fine-tuned, without a copy: its adapters switched off for the length of a pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .names import unwrapped

__all__ = ["adapters_off", "find_adapters"]


def find_adapters(model: nn.Module) -> nn.Module:
    """The module within its wrappers that knows how to switch its adapters off.

    That is a `peft.PeftModel`, or any model that PEFT's layers were put into (transformers' `add_adapter`, PEFT's
    `inject_adapter_in_model`).

    Raises:
        ValueError: There are no adapters, or they are a learned prompt.
    """
    owner = unwrapped(model)
    if getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"`teacher` is None, and the adapter of {type(owner).__name__} is a learned prompt: it changes what the "
            "model says, and the length of its logits, before the first step. Use LoRA or another adapter of the "
            "layers; or pass teacher=model.disable_adapter, a `forward=` that leaves the prompt's positions out of "
            "the logits, and strict=False."
        )
    if not hasattr(type(owner), "disable_adapter") and not _layers(owner):
        raise ValueError(
            f"`teacher` is None, and {type(model).__name__} has no adapters that can be switched off to get the "
            "teacher back. Pass teacher=: a frozen copy of the model (copy.deepcopy(model)), or a function that "
            "returns a context manager within which the model is the teacher. Or use `build` and `LogitRetention`, "
            "which keep the teacher's outputs on disk."
        )
    return owner


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes what it did without its adapters; afterwards everything is as before.

    Switching costs a walk over the modules and no memory.

    Raises:
        ValueError: As `find_adapters`; or the adapters are merged or switched off already; or parameters are trainable
            that stay in use without the adapters, so that what is left is not the model before fine-tuning.
    """
    owner = find_adapters(model)
    layers = _layers(owner)
    if any(getattr(layer, "merged", False) is True for layer in layers):
        raise ValueError(
            "The adapters are merged into the weights: switching them off would take them out again, and a merged "
            "adapter cannot be trained. Call `unmerge_adapter()` first."
        )
    if layers and all(layer.disable_adapters for layer in layers):
        raise ValueError("The adapters are switched off already: model and teacher are the same. Switch them on.")
    flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore_flags() -> None:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    try:
        with _off(owner, layers):
            # PEFT freezes what it switches off; what is still trainable is in use.
            left = [name for name, p in model.named_parameters() if p.requires_grad]
            # At once: FSDP2 takes the flags over at its first forward.
            restore_flags()
            if left:
                raise ValueError(
                    f"Without its adapters the model still uses {len(left)} trainable parameters, such as "
                    f"{', '.join(left[:3])}: once these have moved, it is not the model before fine-tuning. Freeze "
                    "them (bias='none' for LoRA), name their modules in PEFT's `modules_to_save`, or pass "
                    "teacher=, a frozen copy."
                )
            yield
    finally:
        restore_flags()


@contextmanager
def _off(owner: Any, layers: list[Any]) -> Iterator[None]:
    if hasattr(type(owner), "disable_adapter"):
        with owner.disable_adapter():
            yield
        return
    on = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in on:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)


def _layers(model: nn.Module) -> list[Any]:
    """PEFT's layers: those with a switch. The core does not import PEFT."""
    return [m for m in model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property)]
