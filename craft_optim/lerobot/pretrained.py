"""Loads a lerobot policy and its preprocessor from a checkpoint, and verifies the weights."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from safetensors import SafetensorError, safe_open
from torch import nn

from craft_optim._paths import expanded
from craft_optim.adapter_checkpoints import base_of_adapters, with_adapters

__all__ = ["load_config", "load_policy", "load_preprocessor"]

WEIGHTS = "model.safetensors"


def load_policy(path: str, device: str) -> Any:
    """Loads the policy in a folder or on the hub by its own `from_pretrained`, in eval mode.

    A checkpoint of `lerobot-train --peft...` holds adapters only: they are merged into the policy that they belong to,
    so that modules have the names of the policy without adapters.

    Raises:
        ImportError: The checkpoint holds adapters, and peft is not installed.
        ValueError: The weights cannot be read, lerobot fell back to untrained ones, or the adapters do not fit their
            policy.
    """
    path = expanded(path)
    config = load_config(path)
    config.device = device
    try:
        policy = _with_adapters(config, path) if config.use_peft else _plain(config, path)
    except SafetensorError as error:
        raise ValueError(f"The weights of {path} cannot be read ({error}): copy them anew.") from error
    return policy.eval()


def load_config(path: str) -> Any:
    """Config of a checkpoint's policy, such as its inputs and chunk length, without its weights.

    Raises:
        ValueError: The path is neither a folder nor a hub id.
        OSError: The checkpoint does not exist.
    """
    path = expanded(path)
    try:
        return PreTrainedConfig.from_pretrained(path)
    except HFValidationError as error:
        raise ValueError(f"There is no folder {path!r}, and it is no hub id, such as you/policy.") from error


def load_preprocessor(policy: Any, path: str, device: str, revision: str | None = None) -> Any:
    """The preprocessor in a checkpoint of this policy, with its training statistics; it takes a batch.

    Args:
        policy: Policy from `load_policy`, or its config.
        revision: Branch, tag or commit of a checkpoint on the hub.
    """
    overrides: dict[str, dict[str, Any]] = {"device_processor": {"device": device}}
    config = getattr(policy, "config", policy)
    if config.type == "pi0_fast":
        # lerobot saves neither for the action tokenizer, and would take the defaults
        overrides["action_tokenizer_processor"] = {
            "paligemma_tokenizer_name": config.text_tokenizer_name,
            "fast_skip_tokens": config.fast_skip_tokens,
        }
    return make_pre_post_processors(
        config, pretrained_path=expanded(path), pretrained_revision=revision, preprocessor_overrides=overrides
    )[0]


def _plain(config: Any, path: str, revision: str | None = None) -> Any:
    policy = get_policy_class(config.type).from_pretrained(path, config=config, revision=revision)
    _check_weights(policy, path, revision)
    return policy


def _check_weights(policy: nn.Module, path: str, revision: str | None) -> None:
    """Raises unless most of a sample of tensors equal the file's: lerobot's pi0 family ignores an unreadable file."""
    from huggingface_hub import hf_hub_download

    file = Path(path) / WEIGHTS if Path(path).is_dir() else Path(hf_hub_download(path, WEIGHTS, revision=revision))
    own = policy.state_dict()
    with safe_open(file, framework="pt") as saved:
        keys = [key for key in sorted(saved.keys()) if key in own or f"model.{key}" in own]
        same = []
        for key in keys[:: max(1, len(keys) // 16)]:
            theirs, ours = saved.get_tensor(key), own[key if key in own else f"model.{key}"].cpu()
            same.append(theirs.shape == ours.shape and torch.equal(theirs.to(ours.dtype), ours))
    if 2 * sum(same) <= len(same):
        raise ValueError(
            f"The policy does not have the weights in {file}: lerobot could not load them, and went on without. Its "
            "messages above say why; a checkpoint of another version or size is the usual reason."
        )


def _with_adapters(config: Any, path: str) -> Any:
    """Policy of a checkpoint that holds adapters only, with these merged."""
    policy = _plain(config, *base_of_adapters(path))
    trained = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    model = with_adapters(policy, path)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"Adapters as in {path} ({type(model.base_model).__name__}) cannot be merged into the policy: give a "
            "function that loads it as --factory."
        )
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():  # PEFT froze them
        parameter.requires_grad_(trained[name])
    merged.config.use_peft = False  # it is a whole policy now
    return merged
