"""lerobot's SmolVLAPolicy as the anchors see it: velocities of actions, and prefix hidden states.

Its vision-language model is frozen by default, and prefix hidden states then reach no trainable parameter: keep the
velocities, which pass through the action expert. They are taken at the noise and the time that each anchor holds. The
prefix is all cameras, the prompt, and one token for the state, to which the others do not attend. A batch comes from
the policy's own preprocessor.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim.lerobot._shared import (
    ACTION,
    ACTION_IS_PAD,
    NOISE,
    STATE,
    TIME,
    TOKENS,
    TOKENS_MASK,
    action_spans,
    cameras,
    observed,
    only,
    policy_of,
    real_actions,
    spans_of,
    with_noise,
)

__all__ = ["action_inputs", "action_spans", "prefix_inputs", "prefix_spans", "run_actions", "run_prefix"]


def prefix_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of `run_prefix` in a preprocessed batch: the cameras present, the prompt, the state."""
    keys = list(policy.config.image_features)
    inputs = only(batch, (*keys, *(f"{key}_padding_mask" for key in keys), TOKENS, TOKENS_MASK, STATE))
    # Prompts are padded to the longest of their batch, and the state comes after them: positions must not depend on the
    # batch's other anchors.
    missing = policy.config.tokenizer_max_length - inputs[TOKENS].shape[1]
    return inputs | {key: F.pad(inputs[key], (0, max(0, missing))) for key in (TOKENS, TOKENS_MASK)}


def action_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of `run_actions`: those of the prefix, and the actions, noise and time of each anchor.

    Raises:
        ValueError: The batch has no chunk of actions for each anchor.
    """
    return with_noise(policy, prefix_inputs(policy, batch) | only(batch, (ACTION, ACTION_IS_PAD)))


def run_prefix(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs images, prompt and state through the vision-language model, for hidden-state anchors.

    The prefix does not attend to actions, so its hidden states are those of the training forward.
    """
    policy = policy_of(model)
    network = policy.model
    images, present = policy.prepare_images(batch)
    state = policy.prepare_state(policy._prepare_batch({**batch, STATE: batch[STATE].clone()}))  # in place, for ALOHA
    embeddings, valid, attention = network.embed_prefix(images, present, batch[TOKENS], batch[TOKENS_MASK], state=state)
    (hidden, _), _ = network.vlm_with_expert.forward(
        attention_mask=make_att_2d_masks(valid, attention),
        position_ids=torch.cumsum(valid, dim=1) - 1,
        past_key_values=None,
        inputs_embeds=[embeddings, None],
        use_cache=True,  # without, its cross-attention layers want the action expert's tokens
    )
    return cast(Tensor, hidden)


def run_actions(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs the training forward at the anchors' noise and time; `model.action_out_proj` gives the velocities.

    Hooks see the action dimensions that the anchors have, without the padding.
    """
    own = {key: batch[key].clone() for key in (STATE, ACTION)}  # for ALOHA the policy converts them in place
    policy = policy_of(model)
    with observed(policy.model.action_out_proj, real_actions(batch)):
        loss: Tensor = policy.forward({**batch, **own}, noise=batch[NOISE], time=batch[TIME])[0]
    return loss


def prefix_spans(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Valid positions of the prefix, in its order: all cameras, the prompt, the state.

    Returns:
        "image.<key>" for each camera, "image" for all of them, "text", "state" and "all": bool masks of shape `[B,
        prefix tokens]`. An absent camera and padding are False everywhere. Marks around images, if the policy has them,
        count in "all" only.
    """
    policy = policy_of(model)
    config = policy.model.vlm_with_expert.config
    images, present = policy.prepare_images(batch)
    parts = []
    for key, image, there in zip(cameras(policy, batch), images, present, strict=False):  # not all absent ones
        mark = torch.ones_like(there)[:, None]
        height, width = (side // config.vision_config.patch_size for side in image.shape[-2:])
        camera = (f"image.{key}", there[:, None].expand(-1, height * width // config.scale_factor**2))
        marked = policy.model.add_image_special_tokens
        parts += [("mark", mark.expand(-1, 2)), camera, ("mark", mark)] if marked else [camera]
    text = batch[TOKENS_MASK].to(present[0].device, torch.bool)
    parts += [("text", text), ("state", torch.ones_like(text[:, :1]))]
    length = sum(valid.shape[1] for _, valid in parts)
    parts.append(("padding", text.new_zeros(len(text), max(0, policy.model.prefix_length - length))))
    return spans_of(parts)
