"""Images: floating ones that came from bytes, stored as bytes again if that loses nothing.

Most pipelines turn bytes k = 0..255 into floats by one of a few formulas. `encode` tries them and keeps the first whose
decoding gives back every bit of the input; otherwise the tensor stays as it is.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FORMULAS", "Encoding", "decode", "encode", "encode_alike"]

Encoding = tuple[str, torch.dtype]  # formula, and dtype of the images

# name: (bytes as float32 -> values, in place; rough inverse). Mathematically equal formulas round differently, and only
# one of them matches a given pipeline, so each has its own entry.
FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "k/255": (lambda k: k.div_(255.0), lambda x: x * 255.0),
    "k/255*2-1": (lambda k: k.div_(255.0).mul_(2.0).sub_(1.0), lambda x: (x + 1.0) * 127.5),
    "(k/255-0.5)/0.5": (lambda k: k.div_(255.0).sub_(0.5).div_(0.5), lambda x: (x + 1.0) * 127.5),
    "k*(1/255)": (lambda k: k.mul_(1.0 / 255.0), lambda x: x * 255.0),
    "(k*(1/255)-0.5)/0.5": (lambda k: k.mul_(1.0 / 255.0).sub_(0.5).div_(0.5), lambda x: (x + 1.0) * 127.5),
    "(k-127.5)/127.5": (lambda k: k.sub_(127.5).div_(127.5), lambda x: (x + 1.0) * 127.5),
    "k/127.5-1": (lambda k: k.div_(127.5).sub_(1.0), lambda x: (x + 1.0) * 127.5),
    "k": (lambda k: k, lambda x: x),
}

_IN_CACHE = 1 << 16  # values to compute at a time

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def decode(codes: Tensor, formula: str, dtype: torch.dtype) -> Tensor:
    """Bytes -> floats: `formula` in float32 as a CPU computes it, rounded to `dtype`; the same bits on all devices.

    On the CPU it takes some images at a time, so that they stay in the processor's cache; elsewhere it reads a table of
    256 values, because accelerators divide by multiplying with a rounded reciprocal.
    """
    function = FORMULAS[formula][0]
    if codes.device.type != "cpu":
        return _table(formula, dtype, codes.device)[codes.int()]
    if dtype != torch.float32 or codes.ndim < 2:
        return function(codes.float()).to(dtype)
    out, some = torch.empty(codes.shape, dtype=dtype), max(1, _IN_CACHE * len(codes) // max(1, codes.numel()))
    for values, part in zip(torch.split(out, some), torch.split(codes, some), strict=True):
        function(values.copy_(part))
    return out


@lru_cache(maxsize=16)
def _table(formula: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of the 256 bytes."""
    return decode(torch.arange(256, dtype=torch.uint8), formula, dtype).to(device)


def _codes(images: Tensor, formula: str) -> Tensor | None:
    """Bytes that decode to exactly these floats, or None."""
    # nan_to_num: casting NaN to uint8 is undefined; the comparison then rejects it
    codes = FORMULAS[formula][1](images.float()).nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)
    bits = _BITS[images.dtype]
    return codes if torch.equal(decode(codes, formula, images.dtype).view(bits), images.view(bits)) else None


def encode(images: Tensor, formulas: Iterable[str] = tuple(FORMULAS)) -> tuple[Tensor, str] | None:
    """Floats -> (uint8 codes, formula) if decoding reproduces every bit, else None.

    Takes CPU tensors. Costs a few passes over the data for the formula that fits, little for the others.
    """
    if images.dtype not in _BITS or images.numel() == 0:
        return None
    images = images.contiguous()
    probe = images.reshape(-1)[:: max(1, images.numel() // 1024)].contiguous()
    for formula in formulas:
        if _codes(probe, formula) is not None and (codes := _codes(images, formula)) is not None:
            return codes, formula
    return None


def encode_alike(parts: Iterable[Tensor]) -> tuple[list[Tensor], str] | None:
    """Encodes parts with the first formula that fits all: a single image, such as a black one, may fit several."""
    parts = list(parts)
    for formula in FORMULAS:
        codes = [encoded[0] for part in parts if (encoded := encode(part, (formula,))) is not None]
        if len(codes) == len(parts):
            return codes, formula
    return None
