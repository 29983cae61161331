"""lerobot's PI0FastPolicy as the anchors see it: action-token logits, prefix hidden states, and where they are valid.

A batch is what the policy's own preprocessor returns: `observation.images.*` in [0, 1], `observation.language.tokens`
and `.attention_mask`, and for logits `action.tokens` and `action.token_mask`. Cache it *after* the teacher's
processors: the prompt holds the discretised, normalised state, so other statistics ask another question.

Example:
    batches = (anchor_inputs(preprocessor(batch)) for batch in dataloader)
    cache = anchors.build(policy, batches, "anchors/", forward=action_logits, mask=action_mask)
    retention = anchors.LogitRetention(policy, cache, forward=action_logits)
"""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from torch import Tensor

__all__ = ["action_logits", "action_mask", "anchor_inputs", "prefix_spans", "run_prefix"]

TOKENS = "observation.language.tokens"
TOKENS_MASK = "observation.language.attention_mask"
ACTION_TOKENS = "action.tokens"
ACTION_MASK = "action.token_mask"


def anchor_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a preprocessed batch that the policy's network reads; states, targets and metadata stay out."""
    read = (TOKENS, TOKENS_MASK, ACTION_TOKENS, ACTION_MASK)
    return {
        key: value
        for key, value in batch.items()
        if isinstance(value, Tensor) and (key in read or key.startswith("observation.image"))
    }


def action_logits(policy: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of every action token given the ones before it (teacher forcing).

    The same computation as `policy.forward`, without its loss; no gradient checkpointing of its own. Entry i predicts
    `action.tokens[:, i + 1]`.

    Args:
        policy: A `lerobot.policies.pi0_fast.PI0FastPolicy`.
        batch: A preprocessed batch with action tokens of shape `[B, T]`.

    Returns:
        Logits of shape `[B, T - 1, vocabulary]` in the dtype of the model.

    Raises:
        KeyError: If the batch has no action tokens.
    """
    if ACTION_TOKENS not in batch:
        raise KeyError(
            f"The batch has no {ACTION_TOKENS!r}: pass what the policy's preprocessor makes of samples with actions. "
            f"Found keys {sorted(batch)}."
        )
    actions = batch[ACTION_TOKENS]
    hidden = _run(policy, batch, actions, batch[ACTION_MASK])
    head = policy.model.paligemma_with_expert.paligemma.lm_head
    logits: Tensor = head(hidden[:, -actions.shape[1] : -1])
    return logits


def action_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which of `action_logits` predict a real token: bool of shape `[B, T - 1]`."""
    return batch[ACTION_MASK][:, 1:].bool()


def run_prefix(policy: Any, batch: Mapping[str, Tensor]) -> None:
    """Runs images and prompt through the decoder, for hidden-state anchors; needs no action tokens.

    Action tokens are never attended to by the prefix, so its hidden states are those of the full training forward.
    """
    _run(policy, batch, None, None)


def prefix_spans(policy: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Valid positions of the prefix, in its order: all cameras, then the prompt.

    Returns:
        "image", "text" and "all": bool masks of shape `[B, image tokens + prompt tokens]`. An absent camera and prompt
        padding are False everywhere.
    """
    _, present = policy._preprocess_images(batch)
    vision = policy.model.paligemma_with_expert.paligemma.config.vision_config
    per_image = (vision.image_size // vision.patch_size) ** 2
    images = torch.cat([mask.bool()[:, None].expand(-1, per_image) for mask in present], dim=1)
    text = batch[TOKENS_MASK].bool()
    return {
        "image": torch.cat([images, torch.zeros_like(text)], dim=1),
        "text": torch.cat([torch.zeros_like(images), text], dim=1),
        "all": torch.cat([images, text], dim=1),
    }


def _run(policy: Any, batch: Mapping[str, Tensor], actions: Tensor | None, mask: Tensor | None) -> Tensor:
    """Images, prompt and, if given, action tokens through the decoder; returns its normalised last hidden states."""
    model = policy.model
    images, image_masks = policy._preprocess_images(batch)
    embeddings, valid, attention, _, _ = model.embed_prefix_fast(
        images, image_masks, batch[TOKENS], batch[TOKENS_MASK], actions, mask
    )
    backbone = model.paligemma_with_expert
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
