"""Bytes instead of floats, only where every bit comes back."""

import pytest
import torch
from torch import Tensor

from craft_optim.anchors import images

BYTES = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)

PIPELINES = {
    "to_tensor": lambda k: k.float().div(255),
    "normalise half": lambda k: k.float().div(255).sub(0.5).div(0.5),
    "minus one to one": lambda k: k.float() / 255 * 2 - 1,
    "rescale factor in float64": lambda k: (k.double() * 0.00392156862745098).float(),
    "centred": lambda k: (k.float() - 127.5) / 127.5,
    "tensorflow": lambda k: k.float() / 127.5 - 1.0,
    "as they are": lambda k: k.float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_common_pipelines_come_back_bit_for_bit(pipeline: str, dtype: torch.dtype) -> None:
    floats = PIPELINES[pipeline](BYTES).to(dtype)
    encoded = images.encode(floats)
    assert encoded is not None
    codes, formula = encoded
    assert codes.dtype == torch.uint8
    decoded = images.decode(codes, formula, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, floats)


def test_every_formula_finds_itself() -> None:
    for formula in images.FORMULAS:
        floats = images.decode(BYTES, formula, torch.float32)
        encoded = images.encode(floats)
        assert encoded is not None
        assert torch.equal(images.decode(*encoded, torch.float32), floats)


def one_off(value: float, like: Tensor) -> Tensor:
    changed = like.clone()
    changed[0, 1, 3, 5] = value
    return changed


UNIT = PIPELINES["to_tensor"](BYTES)


@pytest.mark.parametrize(
    "floats",
    [
        torch.rand(2, 3, 8, 8),
        one_off(float(torch.nextafter(UNIT[0, 1, 3, 5], torch.tensor(1.0))), UNIT),
        one_off(torch.nan, UNIT),
        one_off(torch.inf, UNIT),
        one_off(-0.0, torch.zeros_like(UNIT)),
        (UNIT - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.229,
        BYTES,
        torch.zeros(0, 3, 4, 4),
    ],
)
def test_anything_else_is_left_alone(floats: Tensor) -> None:
    assert images.encode(floats) is None


def test_parts_share_a_formula() -> None:
    black, picture = torch.zeros(1, 3, 16, 16), images.decode(BYTES, "k", torch.float32)
    alone = images.encode(black)
    assert alone is not None
    assert alone[1] != "k"  # a black image fits the first formula that is tried
    alike = images.encode_alike([black, picture])
    assert alike is not None
    assert alike[1] == "k"
    for codes, part in zip(alike[0], [black, picture], strict=True):
        assert torch.equal(images.decode(codes, "k", torch.float32), part)
    assert images.encode_alike([black, torch.rand(1, 3, 4, 4)]) is None
