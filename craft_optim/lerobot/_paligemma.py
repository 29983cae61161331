"""The PaliGemma half of lerobot's pi0 family: images and prompt, without an action expert."""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from torch import Tensor, nn

from craft_optim.lerobot._shared import TOKENS_MASK, cameras, policy_of, spans_of

__all__ = ["prefix_spans", "run_paligemma"]


def prefix_spans(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Valid positions of the prefix of the pi0 family, in its order: all cameras, then the prompt.

    Returns:
        "image.<key>" for each of the policy's cameras, "image" for all of them, "text" and "all": bool masks of shape
        `[B, image tokens + prompt tokens]`. An absent camera and prompt padding are False everywhere.
    """
    policy = policy_of(model)
    _, present = policy._preprocess_images(batch)
    vision = policy.model.paligemma_with_expert.paligemma.config.vision_config
    per_image = (vision.image_size // vision.patch_size) ** 2
    parts = [
        (f"image.{key}", there[:, None].expand(-1, per_image))
        for key, there in zip(cameras(policy, batch), present, strict=True)
    ]
    return spans_of([*parts, ("text", batch[TOKENS_MASK].to(present[0].device, torch.bool))])


def run_paligemma(policy: Any, embeddings: Tensor, valid: Tensor, attention: Tensor) -> Tensor:
    """Runs embedded tokens through the PaliGemma decoder of the pi0 family, without the action expert.

    Args:
        valid: True at real tokens, bool `[B, T]`.
        attention: Attention mask, bool `[B, T, T]`.

    Returns:
        The normalised last hidden states, `[B, T, D]`.
    """
    backbone = policy.model.paligemma_with_expert
    # Vision and embedding layers stay in float32 in lerobot's bfloat16 models.
    embeddings = embeddings.to(backbone.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype)
    (hidden, _), _ = backbone.forward(
        attention_mask=prepare_attention_masks_4d(attention, dtype=embeddings.dtype),
        position_ids=torch.cumsum(valid, dim=1) - 1,
        past_key_values=None,
        inputs_embeds=[embeddings, None],
        use_cache=False,
        adarms_cond=[None, None],
    )
    output: Tensor = hidden
    return output
