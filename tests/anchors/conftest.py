"""Small models made on the spot, and their batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Noisy(nn.Module):
    """A classifier with everything that a retention pass must hold still."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(16, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.body(x).unsqueeze(1).expand(-1, 3, -1)
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


@pytest.fixture
def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def noisy() -> Noisy:
    model = Noisy()
    for _ in range(20):  # statistics that are not the defaults
        model(torch.randn(32, 6) * 2 + 1)
    model.calls = 0
    return model


@pytest.fixture
def points() -> Tensor:
    return torch.randn(50, 6)


@pytest.fixture
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return _with_norms(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=60,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
                attention_dropout=0.3,
            )
        )
    )


@pytest.fixture
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return _with_norms(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=2, n_positions=64)
        )
    )


@pytest.fixture
def vlm() -> nn.Module:
    """A PaliGemma of 4 image tokens (id 59)."""
    transformers = pytest.importorskip("transformers")
    text = {
        "model_type": "gemma",
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 32,
        "vision_use_head": False,
    }
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=59, projection_dim=32, hidden_size=32
    )
    return _with_norms(transformers.PaliGemmaForConditionalGeneration(config))


def _with_norms(model: nn.Module) -> nn.Module:
    """Norm weights away from one, so that a tap on the wrong side of a norm shows."""
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@pytest.fixture
def token_batches() -> Callable[..., list[dict[str, Any]]]:
    """Batches of (size, length), their ends padded here and there."""

    def make(*shapes: tuple[int, int]) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(1)
        batches = []
        for size, length in shapes:
            ids = torch.randint(1, 59, (size, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[::2, -2:] = 0
            batches.append({"input_ids": ids * mask, "attention_mask": mask})
        return batches

    return make


@pytest.fixture
def image_text_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(3):
        ids = torch.randint(1, 59, (4, 9), generator=generator)
        ids[:, :4] = 59
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=generator) / 255.0
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "token_type_ids": torch.zeros_like(ids),
                "pixel_values": pixels * 2.0 - 1.0,
            }
        )
    return batches
