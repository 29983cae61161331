"""A model of transformers without weights, and the shapes of its batches, from a config alone."""

from typing import Any

import torch
from torch import Tensor, nn

from craft_optim._paths import expanded

__all__ = ["batch_of_shapes", "model_without_weights"]

_TEXT = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_PICTURES = ("ForImageClassification",)


def model_without_weights(path: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Builds a config's model on the meta device, in seconds whatever its size.

    Args:
        path: Folder with a config.json, the file itself, or a hub id.
        dtype: Dtype of the parameters. None: the config's.

    Raises:
        ImportError: transformers is not installed.
        ValueError: The config names no model of transformers.
    """
    import transformers

    path = expanded(path)
    config = transformers.AutoConfig.from_pretrained(path)
    name = (getattr(config, "architectures", None) or ["none"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(
            f"The config must name a model of transformers in `architectures`. {path} has {name}: put the name of its "
            "class there, such as LlamaForCausalLM."
        )
    with torch.device("meta"):
        model: nn.Module = kind._from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
    return model


def batch_of_shapes(model: Any, size: int, length: int) -> dict[str, Tensor]:
    """A batch of the model's task with its labels, without padding: shapes and dtypes on the meta device.

    Pictures have the config's size, or 224 pixels.

    Args:
        model: Model from `model_without_weights`.
        size: Number of examples.
        length: Tokens per example.

    Raises:
        ValueError: The model's inputs are unknown here, or it takes fewer tokens.
    """

    def of(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.empty(size, *shape, dtype=dtype, device="meta")

    name, config = type(model).__name__, model.config
    if name.endswith(_TEXT):
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(most, int) and length > most:
            raise ValueError(f"--length must be <= {most}, the positions of {name}. Found {length}.")
        return {"input_ids": of(length), "labels": of() if name.endswith("ForSequenceClassification") else of(length)}
    if name.endswith(_PICTURES):
        side = getattr(config, "image_size", 224)  # convolutions take any size
        height, width = (side, side) if isinstance(side, int) else side
        pictures = of(getattr(config, "num_channels", 3), height, width, dtype=torch.float32)
        return {"pixel_values": pictures, "labels": of()}
    raise ValueError(
        f"A plan from a config knows models that end in {', '.join((*_TEXT, *_PICTURES))}. Found {name}: give a "
        "function that returns the model and a batch as --factory."
    )
