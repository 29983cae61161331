"""Shapes: a lerobot policy without weights, and its batches' shapes, from a config alone, for a plan."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from lerobot.policies import get_policy_class
from torch import Tensor

from craft_optim.lerobot._shared import ACTION, ACTION_IS_PAD, ENVIRONMENT_STATE, STATE, TOKENS, TOKENS_MASK
from craft_optim.lerobot.adapters import Adapter
from craft_optim.lerobot.pi0 import mean_loss
from craft_optim.lerobot.pi0_fast import ACTION_MASK, ACTION_TOKENS

__all__ = ["batch_of_shapes", "plan_settings", "policy_without_weights"]

_KNOWN = ("act", "pi0", "pi05", "pi0_fast")
_NETWORK = {"pi0_fast": "lerobot.policies.pi0_fast.modeling_pi0_fast"}


def policy_without_weights(config: Any) -> Any:
    """Builds a config's policy on the meta device, in seconds whatever its size.

    pi0_fast's two tokenizers, which training's forwards do not use, are not downloaded: their names in lerobot's module
    are replaced meanwhile. ACT's backbone is not loaded.

    Args:
        config: A lerobot config. Its device is "meta" afterwards.

    Raises:
        ValueError: The policy's batches are not known here.
    """
    if config.type not in _KNOWN:
        raise ValueError(
            f"A plan from a config knows lerobot's policies {', '.join(_KNOWN)}. Found {config.type}: give a function "
            "that returns the policy and a batch as --factory."
        )
    config.device = "meta"
    if hasattr(config, "pretrained_backbone_weights"):
        config.pretrained_backbone_weights = None
    with torch.device("meta"), _without_tokenizers(_NETWORK.get(config.type)):
        return get_policy_class(config.type)(config)


@contextmanager
def _without_tokenizers(module: str | None) -> Iterator[None]:
    if module is None:
        yield
        return
    network = importlib.import_module(module)
    nothing = mock.MagicMock(name="no tokenizer")
    with mock.patch.object(network, "AutoTokenizer", nothing), mock.patch.object(network, "AutoProcessor", nothing):
        yield


def plan_settings(adapter: Adapter) -> dict[str, Any]:
    """Arguments of `plan` for a policy with this adapter: its loss, and its forward on anchors."""
    return {
        "reading": replace(adapter.reading, output="classes" if adapter.kind == "logits" else None),
        "layers": adapter.layers,
        "loss": mean_loss if adapter.policy in ("pi0", "pi05") else lambda model, given: model(given)[0],
    }


def batch_of_shapes(config: Any, size: int) -> dict[str, Tensor]:
    """A batch as from the policy's preprocessor: shapes and dtypes on the meta device.

    Prompts and action tokens have the config's largest length, pictures the size of the policy's cameras.

    Args:
        config: The config, as for `policy_without_weights`.
        size: Number of frames.
    """

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, *shape, dtype=dtype, device="meta")

    batch = {key: of(*feature.shape) for key, feature in config.image_features.items()}
    if config.type != "act":
        prompt = config.tokenizer_max_length
        batch |= {TOKENS: of(prompt, dtype=torch.long), TOKENS_MASK: of(prompt, dtype=torch.bool)}
    if config.type == "pi0_fast":
        actions = config.max_action_tokens
        return batch | {
            ACTION_TOKENS: of(actions, dtype=torch.long),
            ACTION_MASK: of(actions, dtype=torch.bool),
        }
    for key, state in ((STATE, config.robot_state_feature), (ENVIRONMENT_STATE, config.env_state_feature)):
        batch |= {key: of(*state.shape)} if state else {}
    chunk = config.chunk_size
    return batch | {ACTION: of(chunk, *config.action_feature.shape), ACTION_IS_PAD: of(chunk, dtype=torch.bool)}
