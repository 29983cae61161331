"""Images: floating ones that came from bytes, stored as bytes again if that loses nothing.

Most pipelines turn bytes k = 0..255 into floats by one of a few formulas. `encode` tries them and keeps the first whose
decoding gives back every bit of the input; otherwise the tensor stays as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FORMULAS", "Encoding", "decode", "encode", "encode_alike", "is_image"]

Encoding = tuple[str, torch.dtype]  # formula, and dtype of the images

_Formula = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

# Mean and standard deviation of red, green and blue
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _of_channels(values: Tensor, x: Tensor) -> Tensor:
    """Three values that broadcast over the channels of images, which come third from the end, else last."""
    return values[:, None, None] if x.ndim >= 3 and x.shape[-3] == 3 else values


def _has_channels(x: Tensor) -> bool:
    return x.ndim >= 3 and 3 in (x.shape[-3], x.shape[-1])


def _normalised(stats: tuple[Sequence[float], Sequence[float]], scale: float = 1.0, eps: float = 0.0) -> _Formula:
    """(k / 255 - mean) / (std + eps), in this order; or (k - scale mean) / (scale std)."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device="cpu") * scale for values in stats)
    std = std + eps
    unit = 255.0 / scale

    def forth(k: Tensor) -> Tensor:
        k = k if unit == 1.0 else k.div_(unit)
        return k.sub_(_of_channels(mean, k)).div_(_of_channels(std, k))

    def back(x: Tensor) -> Tensor:
        return (x * _of_channels(std, x) + _of_channels(mean, x)) * unit

    return forth, back


# Those with other numbers for each channel: of torchvision; of lerobot; of the fast processors of transformers
_BY_CHANNEL: dict[str, _Formula] = {
    "ImageNet (k/255-mean)/std": _normalised(_IMAGENET),
    "ImageNet (k/255-mean)/(std+1e-8)": _normalised(_IMAGENET, eps=1e-8),
    "ImageNet (k-255*mean)/(255*std)": _normalised(_IMAGENET, scale=255.0),
    "CLIP (k/255-mean)/std": _normalised(_CLIP),
    "CLIP (k-255*mean)/(255*std)": _normalised(_CLIP, scale=255.0),
}

# name: (bytes as float32 -> values, in place; rough inverse). Mathematically equal formulas round differently, and only
# one of them matches a given pipeline, so each has its own entry.
FORMULAS: dict[str, _Formula] = {
    "k/255": (lambda k: k.div_(255.0), lambda x: x * 255.0),
    "k/255*2-1": (lambda k: k.div_(255.0).mul_(2.0).sub_(1.0), lambda x: (x + 1.0) * 127.5),
    "(k/255-0.5)/0.5": (lambda k: k.div_(255.0).sub_(0.5).div_(0.5), lambda x: (x + 1.0) * 127.5),
    "k*(1/255)": (lambda k: k.mul_(1.0 / 255.0), lambda x: x * 255.0),
    "(k*(1/255)-0.5)/0.5": (lambda k: k.mul_(1.0 / 255.0).sub_(0.5).div_(0.5), lambda x: (x + 1.0) * 127.5),
    "(k-127.5)/127.5": (lambda k: k.sub_(127.5).div_(127.5), lambda x: (x + 1.0) * 127.5),
    "k/127.5-1": (lambda k: k.div_(127.5).sub_(1.0), lambda x: (x + 1.0) * 127.5),
    "k": (lambda k: k, lambda x: x),
    **_BY_CHANNEL,
}

_IN_CACHE = 1 << 16  # values to compute at a time

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def is_image(x: Tensor) -> bool:
    """True for what may be floating images of several anchors."""
    return x.is_floating_point() and x.ndim >= 4


def decode(codes: Tensor, formula: str, dtype: torch.dtype) -> Tensor:
    """Bytes -> floats: `formula` in float32 as a CPU computes it, rounded to `dtype`; the same bits on all devices.

    On the CPU it takes some images at a time, so that they stay in the processor's cache; elsewhere it reads a table of
    256 values, because accelerators divide by multiplying with a rounded reciprocal.
    """
    function = FORMULAS[formula][0]
    if codes.device.type != "cpu":
        table = _table(formula, dtype, codes.device)
        if formula not in _BY_CHANNEL:
            return table[codes.int()]
        return table[_of_channels(torch.arange(3, device=codes.device), codes), codes.int()]
    if dtype != torch.float32 or codes.ndim < 2:
        return function(codes.float()).to(dtype)
    if codes.ndim == 3 and formula in _BY_CHANNEL:  # its parts would be channels
        return decode(codes[None], formula, dtype)[0]
    out, some = torch.empty(codes.shape, dtype=dtype), max(1, _IN_CACHE * len(codes) // max(1, codes.numel()))
    for values, part in zip(torch.split(out, some), torch.split(codes, some), strict=True):
        function(values.copy_(part))
    return out


@lru_cache(maxsize=16)
def _table(formula: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values of the 256 bytes; by channel `[3, 256]`."""
    codes = torch.arange(256, dtype=torch.uint8)
    if formula not in _BY_CHANNEL:
        return decode(codes, formula, dtype).to(device)
    return decode(codes.expand(3, 1, 256), formula, dtype).squeeze(1).to(device)


def _codes(images: Tensor, formula: str) -> Tensor | None:
    """Bytes that decode to exactly these floats, or None."""
    if formula in _BY_CHANNEL and not _has_channels(images):
        return None
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
    flat = images.reshape(-1)[:: max(1, images.numel() // 1024)].contiguous()
    rows = images[:1]
    if images.ndim >= 3:
        rows = rows[..., :: max(1, rows.numel() // 1024 // images.shape[-1]), :].contiguous()
    for formula in formulas:
        probe = rows if formula in _BY_CHANNEL else flat
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
