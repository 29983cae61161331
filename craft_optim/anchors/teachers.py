"""Teachers without a second model: for one pass, adapters are switched off or old weights are swapped in.

Both make the model in training what it was before fine-tuning.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .names import plain_name, unwrapped

__all__ = ["Snapshot", "adapters_off", "find_adapters"]


class Snapshot:
    """Copy of a model's current trainable weights on the CPU: a teacher that takes device memory only in its own pass.

        retention = OnlineRetention(model, anchors, teacher=Snapshot(model))

    `with snapshot():` gives the model its weights at the time of the snapshot; afterwards it has its current weights
    again, bit for bit, also after an exception. Values are swapped in place: views, compiled code, DDP and FSDP2 keep
    their pointers, each process swaps its own shard. After a swap between a forward and its backward, autograd raises
    if that backward needs a weight.

    Make it before the first step, from the model as it is trained: frozen, with its adapters, sharded by `fully_shard`;
    best on its device. DDP, `torch.compile`, moves and casts may come later; after a cast the teacher is the cast
    original. Checkpoints do not hold it: a resumed run makes it from the pretrained weights, and then loads the
    checkpoint.

    Covers the parameters that require gradients now, and persistent buffers such as BatchNorm's statistics; tied
    parameters once. Frozen tensors must not change.

    Cost: host memory for these tensors (page-locked for those on CUDA, which torch rounds up to powers of two). In its
    pass a second copy on their own device, the transfer there, and two copies within the device.

    Args:
        model: The model before fine-tuning, on a real device.

    Raises:
        TypeError: The model is sharded by FSDP1.
        ValueError: No parameter is trainable. In a block: parameters were replaced, reshaped, or made trainable since;
            the message names them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _reshard(model)
        self._parameters = [(name, p, _on_cpu(p)) for name, p in model.named_parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError(
                f"No parameter of {type(model).__name__} requires a gradient: there is nothing to keep. Freeze and "
                "unfreeze as in training first, then make the Snapshot."
            )
        self._buffers = {name: _on_cpu(buffer) for name, buffer in _persistent_buffers(model).items()}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Gives the model the snapshot's weights within the block."""
        _reshard(self.model)
        current, original = self._pairs()
        kept = [x.clone() for x in current]
        try:
            _write(current, original)
            yield
        finally:
            _write(current, kept)
            _reshard(self.model)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The model's tensors on this process, and the snapshot of each."""
        parameters, buffers = dict(self.model.named_parameters()), _persistent_buffers(self.model)
        here = {id(p) for p in parameters.values()}
        known = {id(p) for _, p, _ in self._parameters}
        pairs = [(name, _local(p) if id(p) in here else None, x) for name, p, x in self._parameters]
        pairs += [(name, _local(buffers[name]) if name in buffers else None, x) for name, x in self._buffers.items()]
        _refuse([name for name, now, x in pairs if now is None or now.shape != x.shape], "replaced or reshaped")
        _refuse([n for n, p in parameters.items() if p.requires_grad and id(p) not in known], "made trainable or added")
        return [now for _, now, _ in pairs if now is not None], [x for *_, x in pairs]


def _refuse(names: Sequence[str], done: str) -> None:
    if names:
        raise ValueError(
            f"{len(names)} tensors were {done} since the Snapshot was made, such as {', '.join(names[:3])}: it cannot "
            "make the model what it was. Make it of the model as it is trained: after adapters, freezing, resizing and "
            "`fully_shard`, before the first step and before a checkpoint is loaded. Of new tokens or classes there "
            "is nothing to keep: leave them out, Reading(forward=lambda model, batch: model(**batch).logits[..., :V])."
        )


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name, not by identity: moves and casts replace buffers, unlike parameters."""
    return {
        plain_name(f"{prefix}.{name}"): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _local(tensor: Any) -> Tensor:
    """The shard of a DTensor, or the tensor itself, outside of autograd and in the same memory."""
    tensor = tensor.detach()
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _on_cpu(tensor: Tensor) -> Tensor:
    local = _local(tensor)
    return torch.empty_like(local, device="cpu", pin_memory=local.is_cuda).copy_(local)


def _write(tensors: list[Tensor], values: list[Tensor]) -> None:
    if any(x.device.type == "cpu" and x.is_pinned() for x in tensors):
        torch.accelerator.synchronize()  # FSDP2's offloaded weights may still be on their way to the device
    # One call, which Ctrl-C cannot cut in two.
    torch._foreach_copy_(tensors, values, non_blocking=True)
    # Autocast keeps casts of the weights by their address: the values there are others now.
    torch.clear_autocast_cache()


def _reshard(model: nn.Module) -> None:
    """Frees parameters that FSDP2 keeps gathered after a forward, such as the root's; the next gathers them."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise TypeError(
                f"A Snapshot cannot swap the weights of {type(model).__name__}, which FullyShardedDataParallel (FSDP1) "
                "holds in buffers of its own. Use fully_shard (FSDP2), or `build` and `LogitRetention`."
            )
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def find_adapters(model: nn.Module) -> nn.Module:
    """The module within the model's wrappers that can switch its adapters off.

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
    """Switches the model's adapters off within the block; afterwards everything is as before.

    Switching costs a walk over the modules and no memory.

    Raises:
        ValueError: As `find_adapters`; or the adapters are merged or switched off already; or trainable parameters stay
            in use without the adapters, so that the rest is not the model before fine-tuning.
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
            # PEFT freezes adapters that it switches off; parameters that are still trainable are in use.
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
    """PEFT's layers, found by their switch. The core does not import PEFT."""
    return [m for m in model.modules() if isinstance(getattr(type(m), "disable_adapters", None), property)]
