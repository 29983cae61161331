"""Shapes of the gradients that the benchmarks are about, and lists of random tensors of such shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Pair", "elements", "gpt2", "pair", "paligemma", "same_size", "tensors"]

Shapes = Sequence[tuple[int, ...]]
# Of task and retention; functions that take a list of tensors or None take these, too.
Pair = tuple[list[Any], list[Any]]


def of_model(build: Callable[[], nn.Module]) -> Shapes:
    """Shapes of a model's parameters; nothing is allocated. A tied one counts once."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in build().parameters()]


def gpt2() -> Shapes:
    """GPT-2 with 124,439,808 parameters in 148 tensors; needs transformers, and no weights."""
    import transformers

    return of_model(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()))


def paligemma() -> Shapes:
    """The network inside pi0_fast: 2.92 billion parameters in 603 tensors; needs transformers, and no weights."""
    import transformers

    def build() -> nn.Module:
        text: dict[str, Any] = {
            "model_type": "gemma", "vocab_size": 257_152, "hidden_size": 2048, "num_hidden_layers": 18,
            "intermediate_size": 16_384, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        }  # fmt: skip
        vision: dict[str, Any] = {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27,
            "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
            "projection_dim": 2048, "vision_use_head": False,
        }  # fmt: skip
        config = transformers.PaliGemmaConfig(
            text_config=text, vision_config=vision, projection_dim=2048, hidden_size=2048, image_token_index=257_151
        )
        model: nn.Module = transformers.PaliGemmaForConditionalGeneration(config)
        return model

    return of_model(build)


def same_size(count: int, total: int) -> Shapes:
    """`count` vectors with `total` elements together, as equal as can be.

    Example:
        >>> same_size(3, 10)
        [(4,), (3,), (3,)]
    """
    return [(total // count + (i < total % count),) for i in range(count)]


def elements(tensors: Sequence[Tensor]) -> int:
    """How many there are in all tensors."""
    return sum(x.numel() for x in tensors)


def tensors(
    shapes: Shapes, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """One normal tensor of each shape."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]


def pair(shapes: Shapes, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """Task and retention gradients that conflict: their cosine is about -0.45."""
    task = tensors(shapes, device, dtype, seed=0)
    retention = tensors(shapes, device, dtype, seed=1)
    for r, t in zip(retention, task, strict=True):
        r.sub_(t, alpha=0.5)
    return task, retention
