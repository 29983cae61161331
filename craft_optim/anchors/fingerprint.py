"""Short names for a model's weights and for anchors, to tell whether a cache belongs to them."""

import hashlib
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .names import plain_name

__all__ = ["anchor_checksums", "compare_fingerprints", "fingerprint"]

_SAMPLES = 64  # values per tensor: one optimizer step changes practically all of them


def _sample(tensor: Tensor) -> bytes:
    """Up to 64 values of the tensor, evenly spaced, as bytes."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 0:
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].cpu().contiguous()
    return values.view(torch.uint8).numpy().tobytes()


def fingerprint(model: nn.Module) -> str:
    """Names, shapes, dtypes and 64 evenly spaced values of every tensor of the state dict, hashed.

    Returns "v1-<names and shapes>-<dtypes>-<values>", each 16 hexadecimal digits: the same in every process and on
    every device, also through DistributedDataParallel and torch.compile. Cheap: reads 64 values per tensor, whatever
    its size (a sharded DTensor is gathered for that, one after the other). Not a checksum of the weights: it detects
    training, casting and other checkpoints, not a single changed value.

    Raises:
        ValueError: A tensor has no data (device "meta").
    """
    structure, dtypes, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted((plain_name(k), v) for k, v in model.state_dict().items() if isinstance(v, Tensor)):
        if tensor.device.type == "meta":
            raise ValueError(f"`model` must be on a real device. Found {name!r} on 'meta': load the weights first.")
        gather = getattr(tensor, "full_tensor", None)
        if gather is not None:
            tensor = gather()
        structure.update(f"{name}{tuple(tensor.shape)};".encode())
        dtypes.update(f"{tensor.dtype};".encode())
        values.update(_sample(tensor))
    return "-".join(["v1", *(h.hexdigest()[:16] for h in (structure, dtypes, values))])


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


def anchor_checksums(batch: Mapping[str, Tensor]) -> list[str]:
    """8 hexadecimal digits for each anchor, of its bytes, dtypes and shapes.

    Args:
        batch: Tensors by name, first dimension the anchors.
    """
    sums = [0] * len(next(iter(batch.values())))
    for _, x in sorted(batch.items()):
        values = x.detach().cpu().contiguous()
        shape = str((x.dtype, *x.shape[1:])).encode()
        data = values.reshape(len(values), -1).view(torch.uint8).numpy() if values.numel() else [b""] * len(values)
        sums = [zlib.crc32(anchor, zlib.crc32(shape, total)) for anchor, total in zip(data, sums, strict=True)]
    return [f"{total:08x}" for total in sums]
