"""lerobot's DiffusionPolicy as the anchors see it: the predictions of its network.

The prediction, of the noise or of the actions (`config.prediction_type`), is the U-Net's output `[B, horizon, action]`
and the whole policy's function. It is taken at the noise and the denoising step that each anchor holds. A batch comes
from the policy's own preprocessor; the second dimension of observations is the last `n_obs_steps` frames.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim.lerobot._shared import (
    ACTION,
    ACTION_IS_PAD,
    IMAGES,
    NOISE,
    TIME,
    action_spans,
    in_eval_mode,
    observations,
    only,
    policy_of,
    with_noise,
)

__all__ = ["action_inputs", "action_spans", "run_actions"]


def action_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of a preprocessed batch that `run_actions` reads, and the noise and denoising step of each anchor.

    The mask of padded actions is kept if the policy's loss leaves these out (`do_mask_loss_for_padding`); otherwise it
    has learned them like the others, and they are held like the others.

    Raises:
        ValueError: Cameras, states or actions that the policy reads are missing.
    """
    config, steps = policy.config, policy.diffusion.noise_scheduler.config.num_train_timesteps
    read = (ACTION, ACTION_IS_PAD) if config.do_mask_loss_for_padding else (ACTION,)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(1, config.horizon, config.action_feature.shape[0]), torch.randint(steps, (1,))

    inputs = with_noise(policy, _observed_frames(policy, batch) | only(batch, read), config.horizon, draw)
    if inputs[ACTION].shape != inputs[NOISE].shape:
        found, expected = inputs[ACTION].shape[-1], inputs[NOISE].shape[-1]
        raise ValueError(f"{ACTION!r} must have the policy's {expected} dimensions. Found {found}: another robot's?")
    return inputs


def _observed_frames(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Cameras `[B, n_obs_steps, C, H, W]` and states `[B, n_obs_steps, D]`.

    Raises:
        ValueError: Some are missing, or have another number of frames.
    """
    inputs, steps = observations(policy, batch), policy.config.n_obs_steps
    for key, x in inputs.items():
        if key in policy.config.image_features and steps == 1 and x.ndim == 4:
            x = inputs[key] = x.unsqueeze(1)  # as the policy does
        expected = 5 if key in policy.config.image_features else 3
        if x.ndim != expected or x.shape[1] != steps:
            raise ValueError(
                f"An anchor of {policy.name} needs its last {steps} observations, {key!r} of shape [B, {steps}, ...] "
                f"with {expected} dimensions. Found shape {tuple(x.shape)}: open the dataset with "
                "delta_timestamps=resolve_delta_timestamps(policy.config, dataset.meta)."
            )
    return inputs


def run_actions(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Runs the training forward at the anchors' own noise and step; predictions are the output of `diffusion.unet`.

    Pictures are cropped in the middle, as at inference.
    """
    policy = policy_of(model)
    network, cameras = policy.diffusion, policy.config.image_features
    images = {IMAGES: torch.stack([batch[key] for key in cameras], dim=-4)} if cameras else {}
    # Their own flags alone: in training they crop at random
    with in_eval_mode(module for module in network.modules() if hasattr(module, "maybe_random_crop")):
        seen = network._prepare_global_conditioning({**batch, **images})
    noisy = network.noise_scheduler.add_noise(batch[ACTION], batch[NOISE], batch[TIME])
    network.unet(noisy, batch[TIME], global_cond=seen)
