"""lerobot's PI0Policy and PI05Policy as the anchors see them: prefix hidden states, and velocities of actions.

The prefix (all cameras, then the prompt) runs through PaliGemma alone and needs neither noise nor time. The velocity
that the action expert predicts is the whole policy's function; it is taken at the noise and the time that each anchor
holds. A batch comes from the policy's own preprocessor.
"""

from collections.abc import Mapping
from typing import Any

from lerobot.policies.common.vla_utils import make_att_2d_masks
from torch import Tensor, nn

from craft_optim.lerobot._paligemma import prefix_spans, run_paligemma
from craft_optim.lerobot._shared import (
    ACTION,
    ACTION_IS_PAD,
    NOISE,
    STATE,
    TIME,
    TOKENS,
    TOKENS_MASK,
    action_spans,
    observed,
    only,
    policy_of,
    real_actions,
    with_noise,
)

__all__ = ["action_inputs", "action_spans", "mean_loss", "prefix_inputs", "prefix_spans", "run_actions", "run_prefix"]


def prefix_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of a preprocessed batch that `run_prefix` reads: the cameras present, and the prompt."""
    return only(batch, (TOKENS, TOKENS_MASK, *policy.config.image_features))


def action_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of `run_actions`: the prefix; actions, noise and time of each anchor; for pi0 the state.

    Raises:
        ValueError: The batch has no chunk of actions for each anchor.
    """
    read = (ACTION, ACTION_IS_PAD) if policy.name == "pi05" else (ACTION, ACTION_IS_PAD, STATE)
    return with_noise(policy, prefix_inputs(policy, batch) | only(batch, read))


def run_prefix(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs images and prompt through PaliGemma, for hidden-state anchors.

    The prefix attends neither to the state nor to actions, so its hidden states are those of the training forward.
    """
    policy = policy_of(model)
    images, present = policy._preprocess_images(batch)
    embeddings, valid, attention = policy.model.embed_prefix(images, present, batch[TOKENS], batch[TOKENS_MASK])
    return run_paligemma(policy, embeddings, valid, make_att_2d_masks(valid, attention))


def run_actions(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs the training forward at the anchors' noise and time; `model.action_out_proj` gives the velocities.

    Hooks see the action dimensions that the anchors have, without the padding.
    """
    policy = policy_of(model)
    with observed(policy.model.action_out_proj, real_actions(batch)):
        return _losses(policy, batch, batch[NOISE], batch[TIME])


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The policy's training loss, for a plan: its own forward reads values as well, for a log, and a plan has none."""
    policy, actions = policy_of(model), batch[ACTION]
    size, chunk, device = len(actions), actions.shape[1], actions.device
    noise = policy.model.sample_noise((size, chunk, policy.config.max_action_dim), device)
    return _losses(policy, batch, noise, policy.model.sample_time(size, device)).mean()


def _losses(policy: Any, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor) -> Tensor:
    images, present = policy._preprocess_images(batch)
    state = () if policy.name == "pi05" else (policy.prepare_state(batch),)
    actions = policy.prepare_action(batch)
    losses: Tensor = policy.model.forward(
        images, present, batch[TOKENS], batch[TOKENS_MASK], *state, actions, noise, time
    )
    return losses
