"""lerobot's ACTPolicy as the anchors see it: the actions that it predicts.

The anchors are the second dimension of ACT's hidden states, but the first of its action head's output `[B, chunk,
action]`, the whole policy's function. A batch comes from the policy's own preprocessor; actions are not needed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from craft_optim.lerobot._shared import ACTION_IS_PAD, IMAGES, action_spans, in_eval_mode, observations, only, policy_of

__all__ = ["action_inputs", "action_spans", "run_actions"]


def action_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of a preprocessed batch that `run_actions` reads: cameras and states.

    Raises:
        ValueError: Some are missing.
    """
    return observations(policy, batch) | only(batch, (ACTION_IS_PAD,))


def run_actions(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs the policy as at inference: the latent is zero; the VAE's encoder, used in training only, does not run.

    The actions are the output of `model.action_head`.
    """
    policy = policy_of(model)
    network, cameras = policy.model, policy.config.image_features
    images = {IMAGES: [batch[key] for key in cameras]} if cameras else {}
    with in_eval_mode([network]):  # its own flag alone: in training it samples the latent
        actions: Tensor = network({**batch, **images})[0]
    return actions
