"""Fingerprints: short names for a model's weights and for anchors, which show whether a cache belongs to them."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .names import plain_name
from .structure import Flat

__all__ = ["anchor_checksums", "compare_fingerprints", "fingerprint"]

# Tensors of PEFT's adapters that add a product: LoRA, AdaLoRA, LoHa, LoKr and VeRA
_FACTORS = ("lora_A", "lora_B", "lora_E", "lora_embedding_", "hada_", "lokr_", "vera_lambda_")
_SAMPLES = 64  # values per tensor: one optimizer step changes practically all of them


def _sample(tensor: Tensor) -> bytes:
    """Up to 64 values of the tensor, evenly spaced, as bytes."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].cpu().contiguous()
    return values.view(torch.uint8).numpy().tobytes()


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes, dtypes and 64 evenly spaced values of every tensor of the state dict.

    Returns "v1-<names and shapes>-<dtypes>-<values>", each 16 hexadecimal digits: the same in every process and on
    every device, also through DistributedDataParallel and torch.compile. Cheap: reads 64 values per tensor, whatever
    its size (a sharded DTensor is gathered for that, one after the other). Not a checksum of the weights: it detects
    training, casting and other checkpoints, not a single changed value.

    PEFT's adapters count by their effect: a model with new adapters, whose product is zero whatever their random
    values, or with adapters switched off, has the fingerprint of the model without. Adapters in use count as values.

    Raises:
        ValueError: A tensor has no values (device "meta").
    """
    structure, dtypes, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    tensors = {plain_name(name): x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    for key, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ValueError(f"`model` must be on a real device. Found {key!r} on 'meta': load the weights first.")
    adapters = _adapters(model, tensors)
    for name, key in sorted((_name_without_adapters(k) if adapters else k, k) for k in tensors):
        whole, of_adapter = _whole(tensors[key]), key in adapters
        if of_adapter and not adapters[key]:
            continue
        (values if of_adapter else structure).update(f"{name}{tuple(whole.shape)};".encode())
        (values if of_adapter else dtypes).update(f"{whole.dtype};".encode())
        values.update(_sample(whole))
    return "-".join(["v1", *(h.hexdigest()[:16] for h in (structure, dtypes, values))])


def _adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Name of each tensor of PEFT's adapters -> True if it affects the model's outputs."""
    found: dict[str, bool] = {}
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for prefix, layer in modules:
        if not isinstance(getattr(type(layer), "disable_adapters", None), property):
            continue
        off = layer.disable_adapters or getattr(layer, "merged", False)
        by_adapter: dict[str, dict[str, Tensor]] = {}
        kinds = [*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ())]
        for kind in dict.fromkeys(kinds):
            start = plain_name(f"{prefix}.{kind}" if prefix else kind) + "."
            for name, tensor in tensors.items():
                if name.startswith(start):
                    by_adapter.setdefault(name.removeprefix(start).split(".")[0], {})[name] = tensor
        for adapter, own in by_adapter.items():
            used = adapter in layer.active_adapters and not off
            idle = used and _adds_zero(own)
            found |= {name: used and not (idle and "lora_magnitude_vector" not in name) for name in own}
    return found


def _adds_zero(adapter: Mapping[str, Tensor]) -> bool:
    """True if a factor of the product that it adds is zero, and so is the bias; DoRA's norms do not matter."""
    factors = {name: x for name, x in adapter.items() if any(part.startswith(_FACTORS) for part in name.split("."))}
    zero = {name: not bool(_whole(x).any()) for name, x in sorted(factors.items())}
    biases = [is_zero for name, is_zero in zero.items() if name.endswith(".bias")]
    return all(biases) and any(is_zero for name, is_zero in zero.items() if not name.endswith(".bias"))


def _name_without_adapters(name: str) -> str:
    """The tensor's name in the model before PEFT's wrapping."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def compare_fingerprints(cached: str, current: str) -> str | None:
    """The difference in words; None if there is none."""
    if cached == current:
        return None
    a, b = cached.split("-"), current.split("-")
    if len(a) != 4 or len(b) != 4 or a[0] != b[0]:
        return "the fingerprints were made by different versions and cannot be compared"
    if a[1] != b[1]:
        return "the model has other tensors than the one the cache was built with (another architecture, or adapters)"
    if a[2] != b[2]:
        return "the weights have another dtype than those the cache was built with"
    return "the model has other weights than the one the cache was built with"


def anchor_checksums(batch: Flat) -> list[str]:
    """Checksums of the anchors' categories, bytes, dtypes and shapes: 8 hexadecimal digits each."""
    sums = [zlib.crc32(category.encode("utf-8", "replace")) for category in batch.categories] or [0] * batch.count
    for name, x in sorted(batch.tensors.items()):
        values = x.detach().cpu().contiguous()
        shape = str((x.dtype, *x.shape[1:])).encode()
        rows = values.reshape(len(values), -1).view(torch.uint8).numpy() if values.numel() else [b""] * len(values)
        data: Iterable[Any] = rows
        if name in batch.lengths:
            ends = [0, *batch.lengths[name].cumsum(0).tolist()]
            data = [b"".join(map(bytes, rows[first:last])) for first, last in pairwise(ends)]
        sums = [zlib.crc32(anchor, zlib.crc32(shape, total)) for anchor, total in zip(data, sums, strict=True)]
    return [f"{total:08x}" for total in sums]
