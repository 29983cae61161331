"""Shared parts of the adapters: batch keys, fixed noise, masks over a prefix, views for hooks."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from craft_optim.anchors.passes import isolated_rng

__all__ = [
    "ACTION",
    "ACTION_IS_PAD",
    "ENVIRONMENT_STATE",
    "IMAGES",
    "NOISE",
    "STATE",
    "TIME",
    "TOKENS",
    "TOKENS_MASK",
    "action_spans",
    "cameras",
    "find_policy",
    "in_eval_mode",
    "observations",
    "observed",
    "only",
    "policy_of",
    "real_actions",
    "spans_of",
    "speaks",
    "with_noise",
]

STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
IMAGES = "observation.images"  # key of the stacked cameras in policies that stack them
TOKENS = "observation.language.tokens"
TOKENS_MASK = "observation.language.attention_mask"
ACTION = "action"
ACTION_IS_PAD = "action_is_pad"
NOISE = "anchor.noise"
TIME = "anchor.time"


def speaks() -> bool:
    """True in the one process per machine that logs."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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


def observations(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The cameras and states of a batch that the policy is configured for.

    Raises:
        ValueError: Some are missing.
    """
    config = policy.config
    wanted = list(config.image_features)
    wanted += [STATE] if config.robot_state_feature else []
    wanted += [ENVIRONMENT_STATE] if config.env_state_feature else []
    found = only(batch, wanted)
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(
            f"An anchor of {policy.name} needs {missing}. Found {sorted(batch)}: give the dataset's cameras and states "
            "the names that the policy has for them."
        )
    return found


def cameras(policy: Any, batch: Mapping[str, Any]) -> list[str]:
    """The policy's cameras in the order in which its network sees them: those of the batch, then the absent ones."""
    keys = list(policy.config.image_features)
    return sorted(keys, key=lambda key: key not in batch)


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Sets the eval flag of these modules within the block, but not of their submodules."""
    turned = [module for module in modules if module.training]
    for module in turned:
        module.training = False
    try:
        yield
    finally:
        for module in turned:
            module.training = True


def with_noise(
    policy: Any,
    inputs: dict[str, Tensor],
    chunk: int | None = None,
    draw: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Inputs of a policy that denoises actions, with one training noise and time for each anchor.

    They are drawn once and stored, because the teacher's prediction is meaningless at another noise. The anchor's data
    other than pictures is the seed: a frame has the same noise in every batch, on every machine.

    Args:
        inputs: Batch with actions `[B, chunk, action]`.
        chunk: Number of actions. None: `policy.config.chunk_size`.
        draw: Function that draws noise `[1, chunk, ...]` and time `[1]` from the CPU's random numbers. None: that of
            flow matching, `policy.model.sample_noise` and `.sample_time`.

    Returns:
        The inputs with "anchor.noise" `[B, chunk, ...]` and "anchor.time" `[B]`.

    Raises:
        ValueError: There are no actions, or not a chunk of them for each anchor.
    """
    cpu = torch.device("cpu")
    chunk = policy.config.chunk_size if chunk is None else chunk

    def flow() -> tuple[Tensor, Tensor]:
        noise = policy.model.sample_noise((1, chunk, policy.config.max_action_dim), cpu)
        return noise, policy.model.sample_time(1, cpu)

    without, draw = "" if draw else ", or keep='prefix'", draw or flow
    actions = inputs.get(ACTION)
    if actions is None or actions.ndim != 3 or actions.shape[1] != chunk:
        found = f"none among {sorted(inputs)}" if actions is None else f"shape {tuple(actions.shape)}"
        raise ValueError(
            f"An anchor of {policy.name} needs its next {chunk} actions, {ACTION!r} of shape [B, {chunk}, action]. "
            f"Found {found}: open the dataset with delta_timestamps=resolve_delta_timestamps(policy.config, "
            f"dataset.meta){without}."
        )
    # Of a plan's shapes there is no data: any noise has the shape
    small = [x.detach().cpu() for _, x in sorted(inputs.items()) if x.ndim < 4 and not x.is_meta]
    drawn = []
    for row in range(len(actions)):
        held = hashlib.blake2b(digest_size=8)
        for x in small:
            held.update(x[row].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        with isolated_rng(cpu, int.from_bytes(held.digest(), "big") >> 1):
            drawn.append(draw())
    noise, time = (torch.cat(parts).to(actions.device) for parts in zip(*drawn, strict=True))
    return inputs | {NOISE: noise, TIME: time}


def action_spans(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Span of the actions within the episode: "all", bool `[B, chunk]`; empty if the batch has no such mask."""
    return {"all": ~batch[ACTION_IS_PAD].bool()} if ACTION_IS_PAD in batch else {}


def spans_of(parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Masks over a prefix from those of its parts.

    Args:
        parts: Names and valid positions, bool `[B, n]`, in the order of the prefix. Names "image.<key>" are cameras.

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


@contextmanager
def observed(module: nn.Module, view: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Shows `view(output)` to earlier hooks of the module within the block; its callers get the output.

    Args:
        view: Function that slices: it must save no tensor for the backward, because activation checkpointing repeats
            forwards without it.
    """
    whole: list[Tensor] = []

    def show(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole[:] = [output]
        return view(output)

    def restore(module: nn.Module, args: Any, shown: Tensor) -> Tensor:
        return whole.pop()

    # The first and the last of the module's hooks
    handles = module.register_forward_hook(show, prepend=True), module.register_forward_hook(restore)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_actions(batch: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Makes a slice of velocities `[B, chunk, max_action_dim]`: the action dimensions of the anchors.

    The others are padding, which no loss of lerobot reads: they are free to move.
    """
    width = batch[ACTION].shape[-1]
    return lambda velocities: velocities[..., :width]
