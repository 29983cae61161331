"""What the adapters of several policies share: batch keys, noise that stays the same, masks over a prefix."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from craft_optim.anchors.passes import isolated_rng

__all__ = [
    "ACTION",
    "ACTION_IS_PAD",
    "NOISE",
    "STATE",
    "TIME",
    "TOKENS",
    "TOKENS_MASK",
    "action_spans",
    "cameras",
    "find_policy",
    "only",
    "policy_of",
    "spans_of",
    "with_noise",
]

STATE = "observation.state"
TOKENS = "observation.language.tokens"
TOKENS_MASK = "observation.language.attention_mask"
ACTION = "action"
ACTION_IS_PAD = "action_is_pad"
NOISE = "anchor.noise"
TIME = "anchor.time"


def find_policy(model: nn.Module) -> tuple[str, Any] | None:
    """Name and module of the lerobot policy within its wrappers (DDP, torch.compile, PEFT); None if there is none."""
    return next(((name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedPolicy)), None)


def policy_of(model: nn.Module) -> Any:
    """The lerobot policy within its wrappers.

    Raises:
        ValueError: There is none.
    """
    found = find_policy(model)
    if found is None:
        raise ValueError(f"`model` must be a lerobot policy, wrapped or not. Found {type(model).__name__}.")
    return found[1]


def only(batch: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a batch that have one of these keys, in the batch's order."""
    wanted = set(keys)
    return {key: value for key, value in batch.items() if key in wanted and isinstance(value, Tensor)}


def cameras(policy: Any, batch: Mapping[str, Any]) -> list[str]:
    """The policy's cameras in the order in which its network sees them: those of the batch, then the absent ones."""
    keys = list(policy.config.image_features)
    return sorted(keys, key=lambda key: key not in batch)


def with_noise(policy: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of a flow-matching policy, and for each anchor one noise and one time of its training distribution.

    They are drawn once and stored, because the teacher's velocity means nothing at another noise. The seed is what the
    anchor holds besides pictures: the same frame has the same noise in every batch, on every machine.

    Args:
        policy: With `model.sample_noise` and `model.sample_time`.
        inputs: With actions `[B, chunk, action]`.

    Returns:
        The inputs with "anchor.noise" `[B, chunk, max_action_dim]` and "anchor.time" `[B]`, float32.

    Raises:
        ValueError: There are no actions, or not a chunk of them for each anchor.
    """
    actions, chunk = inputs.get(ACTION), policy.config.chunk_size
    if actions is None or actions.ndim != 3 or actions.shape[1] != chunk:
        found = f"none among {sorted(inputs)}" if actions is None else f"shape {tuple(actions.shape)}"
        raise ValueError(
            f"An anchor of {policy.name} needs its next {chunk} actions, {ACTION!r} of shape [B, {chunk}, action]. "
            f"Found {found}: open the dataset with delta_timestamps=resolve_delta_timestamps(policy.config, "
            "dataset.meta), or keep='prefix'."
        )
    small = [x.detach().cpu() for _, x in sorted(inputs.items()) if x.ndim < 4]
    cpu = torch.device("cpu")
    noise, time = [], []
    for row in range(len(actions)):
        held = hashlib.blake2b(digest_size=8)
        for x in small:
            held.update(x[row].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        with isolated_rng(cpu, int.from_bytes(held.digest(), "big") >> 1):
            noise.append(policy.model.sample_noise((1, chunk, policy.config.max_action_dim), cpu))
            time.append(policy.model.sample_time(1, cpu))
    return inputs | {NOISE: torch.cat(noise).to(actions.device), TIME: torch.cat(time).to(actions.device)}


def action_spans(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The actions that the episode still holds: "all", bool `[B, chunk]`; empty where the batch does not say."""
    return {"all": ~batch[ACTION_IS_PAD].bool()} if ACTION_IS_PAD in batch else {}


def spans_of(parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Masks over a prefix from those of its parts.

    Args:
        parts: Names and valid positions, bool `[B, n]`, in the prefix' order. Names "image.<key>" are cameras.

    Returns:
        For each name, for "image" (all cameras) and for "all", a bool mask `[B, T]`, T the sum of the parts' n.
    """
    named = [(name, valid.bool()) for name, valid in parts]
    everything = torch.cat([valid for _, valid in named], dim=1)
    owners = [name for name, valid in named for _ in range(valid.shape[1])]

    def positions_of(*names: str) -> Tensor:
        return everything & torch.tensor([owner in names for owner in owners], device=everything.device)

    names = dict.fromkeys(owners)
    images = [name for name in names if name.startswith("image.")]
    return {name: positions_of(name) for name in names} | {"image": positions_of(*images), "all": everything}
