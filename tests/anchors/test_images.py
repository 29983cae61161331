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


IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CLIP = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stats", [IMAGENET, CLIP])
def test_pictures_normalised_by_channel_come_back(stats: tuple[Tensor, Tensor], last: bool, dtype: torch.dtype) -> None:
    mean, std = (x.view(3, 1, 1) for x in stats)
    k = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 200, 1).float()  # every byte in every channel
    pipelines = {
        "torchvision": k.div(255).sub(mean).div(std),
        "fast processors": (k - mean * 255.0) / (std * 255.0),
    }
    if stats is IMAGENET:
        pipelines["lerobot"] = (k / 255.0 - mean) / (std + 1e-8)
    for name, floats in pipelines.items():
        whole = (floats.movedim(1, -1) if last else floats).to(dtype)
        encoded = images.encode(whole)
        assert encoded is not None, name
        for some in (slice(None), slice(0, 1)):  # as they are read, and one of them
            assert torch.equal(images.decode(encoded[0][some], encoded[1], dtype), whole[some]), name
        assert torch.equal(images.decode(encoded[0][0], encoded[1], dtype), whole[0]), name
        assert images.encode(whole.flip(-1 if last else 1)) is None, "blue is not red"


def test_a_table_by_channel_is_the_formula() -> None:
    k = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    formula = "ImageNet (k/255-mean)/std"
    for codes in (k, k.movedim(2, -1)):
        table = images._table(formula, torch.float32, torch.device("cpu"))
        looked_up = table[images._of_channels(torch.arange(3), codes), codes.int()]
        assert torch.equal(looked_up, images.decode(codes, formula, torch.float32))


def test_what_has_no_three_channels_is_left_alone() -> None:
    assert images.encode((UNIT[:, :2] - 0.485) / 0.229) is None
    assert images.encode(((UNIT - 0.485) / 0.229).reshape(1, 1, 24, 32)) is None


@pytest.mark.parametrize("name", ["torchvision", "transformers", "lerobot"])
def test_pipelines_of_libraries_are_known(name: str) -> None:
    """What they really compute, bit for bit."""
    picture = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(3, 16, 16)
    if name == "torchvision":
        transforms = pytest.importorskip("torchvision.transforms")
        floats = transforms.Normalize(*map(torch.Tensor.tolist, IMAGENET))(picture / 255)[None]
    elif name == "transformers":
        processors = pytest.importorskip("transformers.models.convnext.image_processing_convnext")
        pytest.importorskip("torchvision")
        mean, std = (x.tolist() for x in IMAGENET)
        processor = processors.ConvNextImageProcessor(do_resize=False, image_mean=mean, image_std=std)
        floats = processor(picture, return_tensors="pt")["pixel_values"]
    else:
        pytest.importorskip("lerobot")
        floats = _by_lerobot(picture[None] / 255)
    encoded = images.encode(floats)
    assert encoded is not None
    assert encoded[1].startswith("ImageNet")
    assert torch.equal(encoded[0], picture[None])
    assert torch.equal(images.decode(*encoded, floats.dtype), floats)


def _by_lerobot(pictures: Tensor) -> Tensor:
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor.normalize_processor import NormalizerProcessorStep

    stats = {"picture": {name: x.view(3, 1, 1) for name, x in zip(("mean", "std"), IMAGENET, strict=True)}}
    features = {"picture": PolicyFeature(FeatureType.VISUAL, tuple(pictures.shape[1:]))}
    step = NormalizerProcessorStep(features, {FeatureType.VISUAL: NormalizationMode.MEAN_STD}, stats=stats)
    found: Tensor = step._normalize_observation({"picture": pictures}, inverse=False)["picture"]
    return found
