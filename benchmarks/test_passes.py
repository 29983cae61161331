"""What a retention pass saves by leaving out what it does not compare: forward and backward, on a small PaliGemma."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorRetention, HiddenRetention, LogitRetention, Reading, build, forwards

Compare = Callable[..., None]

TOWER = "model.vision_tower"
IMAGE_TOKEN, VOCABULARY, IMAGE, PROMPT, ANSWER = 8191, 8192, 64, 24, 8


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """6 layers of vision (112 px, 64 image tokens), 4 of language, width 192; the vision tower does not train."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4}
    text = {"model_type": "gemma", **sizes, "vocab_size": VOCABULARY, "num_hidden_layers": 4, "num_key_value_heads": 1}
    vision = {
        "model_type": "siglip_vision_model", **sizes, "num_hidden_layers": 6, "image_size": 112, "patch_size": 14,
        "projection_dim": 192, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config={**text, "head_dim": 48}, vision_config=vision, image_token_index=IMAGE_TOKEN, projection_dim=192,
        hidden_size=192,
    )  # fmt: skip
    made: nn.Module = transformers.PaliGemmaForConditionalGeneration(config)
    made.get_submodule(TOWER).requires_grad_(False)
    return made


def batches() -> list[dict[str, Tensor]]:
    """64 anchors: a picture, a prompt, and an answer whose logits count."""
    generator, made = torch.Generator().manual_seed(1), []
    for _ in range(4):
        text = torch.randint(1, IMAGE_TOKEN, (16, PROMPT + ANSWER), generator=generator)
        ids = torch.cat([torch.full((16, IMAGE), IMAGE_TOKEN), text], dim=1)
        types = torch.zeros_like(ids)
        types[:, -ANSWER:] = 1
        pixels = torch.randint(0, 256, (16, 3, 112, 112), generator=generator) / 255.0
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": types,
                "pixel_values": pixels,
                "labels": torch.where(types.bool(), ids, -100),
            }
        )
    return made


def one_pass(retention: AnchorRetention) -> Callable[[], None]:
    def run() -> None:
        retention.model.zero_grad()
        retention().backward()  # type: ignore[no-untyped-call]

    run()  # finds out what can be left out
    return run


def logits(model: nn.Module, path: Path, *, head: bool, tower: bool) -> Callable[[], None]:
    """A pass with the whole head or the part that is compared, and with the vision tower run or replayed."""
    reading = Reading(mask="labels", frozen=() if tower else (TOWER,))
    cache = build(model, batches(), path / f"{head}{tower}", reading, top_k=16, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        if head:
            patch.setattr(forwards, "linear_head", lambda *args, **kwargs: None)
            patch.setattr(forwards, "head_agrees", lambda *args, **kwargs: False)
        return one_pass(LogitRetention(model, cache, 16))


@pytest.mark.benchmark(group="retention pass")
@pytest.mark.parametrize(
    ("left_out", "settings"),
    [
        ("head at the answer", {"head": False, "tower": True}),
        ("frozen vision tower replayed", {"head": True, "tower": False}),
        ("both", {"head": False, "tower": False}),
    ],
)
def test_logits(compare: Compare, model: nn.Module, tmp_path: Path, left_out: str, settings: dict[str, Any]) -> None:
    compare(f"logits pass, {left_out} / everything", logits(model, tmp_path, **settings),
            logits(model, tmp_path, head=True, tower=True))  # fmt: skip


@pytest.mark.benchmark(group="retention pass")
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_hidden_states(compare: Compare, model: nn.Module, tmp_path: Path, layer: int) -> None:
    cache = build(model, batches(), tmp_path / "hidden", output=None, layers=[layer], progress=False)
    compare(
        f"hidden states of layer {layer} of 4 / logits pass with everything",
        one_pass(HiddenRetention(model, cache, 16)),
        logits(model, tmp_path, head=True, tower=True),
    )
