"""lerobot's PI0FastPolicy as the anchors see it: action-token logits, prefix hidden states, and their valid positions.

A batch comes from the policy's own preprocessor: `observation.images.*` in [0, 1], `observation.language.tokens` and
`.attention_mask`, and for logits `action.tokens` and `action.token_mask`. Cache it *after* the teacher's processors:
the prompt holds the discretised, normalised state, so other statistics make another prompt.

Example:
    batches = (anchor_inputs(preprocessor(batch)) for batch in dataloader)
    cache = anchors.build(policy, batches, "anchors/", anchors.Reading(action_logits, action_mask), class_dim=-1)
    retention = cache.retention(policy)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim.anchors.masks import IGNORED
from craft_optim.lerobot._paligemma import prefix_spans, run_paligemma
from craft_optim.lerobot._shared import TOKENS, TOKENS_MASK, only, policy_of

__all__ = [
    "action_inputs",
    "action_logits",
    "action_mask",
    "anchor_inputs",
    "generated_actions",
    "last_hidden",
    "prefix_inputs",
    "prefix_spans",
    "run_prefix",
]

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


def prefix_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of `run_prefix` in a preprocessed batch: the policy's cameras, whatever their keys, and the prompt."""
    return only(batch, (TOKENS, TOKENS_MASK, *policy.config.image_features))


def action_inputs(policy: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of `action_logits`: those of `prefix_inputs`, and the action tokens."""
    return prefix_inputs(policy, batch) | only(batch, (ACTION_TOKENS, ACTION_MASK))


def action_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of every action token given the ones before it (teacher forcing).

    The same computation as `policy.forward`, without its loss and without gradient checkpointing. Entry i predicts
    `action.tokens[:, i + 1]`.

    Args:
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
    policy, actions = policy_of(model), batch[ACTION_TOKENS]
    hidden = last_hidden(policy, batch, actions, batch[ACTION_MASK])
    head = policy.model.paligemma_with_expert.paligemma.lm_head
    logits: Tensor = head(hidden[:, -actions.shape[1] : -1])
    return logits


def action_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Mask of the `action_logits` that predict a real token: bool `[B, T - 1]`."""
    return batch[ACTION_MASK][:, 1:].bool()


def generated_actions(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The policy's own action tokens, decoded at temperature 0, instead of the demonstrated ones.

    For `anchors.Reading(action_logits, tokens=generated_actions)`: frames without actions are anchors, too.

    Args:
        batch: A preprocessed batch; action tokens in it are ignored.

    Returns:
        The batch with `action.tokens` and `action.token_mask`: the start token, then the decoded tokens up to and
        including the end-of-action marker. And the labels of `action_logits`, -100 after the marker. lerobot's decoding
        lets images and prompt see the start token, training does not: rarely a token is not the likeliest one in
        `action_logits`.
    """
    policy = policy_of(model)
    images, present = policy._preprocess_images(batch)
    decoded: Tensor = policy.model.sample_actions_fast_kv_cache(
        images, present, batch[TOKENS], batch[TOKENS_MASK], policy.config.max_decoding_steps, temperature=0.0
    )
    tokenizer = policy.model._paligemma_tokenizer
    ends = (decoded == tokenizer.convert_tokens_to_ids("|")).long()
    written = (ends.cumsum(1) - ends) == 0  # up to and including the first marker
    start = torch.full_like(decoded[:, :1], tokenizer.bos_token_id)
    mask = torch.cat([torch.ones_like(start, dtype=torch.bool), written], dim=1)
    actions = torch.where(mask, torch.cat([start, decoded], dim=1), 0)
    labels = torch.where(written, decoded, IGNORED)
    return {**batch, ACTION_TOKENS: actions, ACTION_MASK: mask}, labels


def run_prefix(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Runs images and prompt through the decoder, for hidden-state anchors; needs no action tokens.

    Action tokens are never attended to by the prefix, so its hidden states are those of the full training forward.
    """
    return last_hidden(policy_of(model), batch, None, None)


def last_hidden(policy: Any, batch: Mapping[str, Tensor], suffix: Tensor | None, mask: Tensor | None) -> Tensor:
    """Runs images, prompt and, if given, tokens after it through the decoder, with causal attention in the latter.

    Args:
        suffix: Token ids after the prompt, `[B, T]`: of actions in training, of any text elsewhere.
        mask: True at suffix tokens that are not padding, bool `[B, T]`.

    Returns:
        The normalised last hidden states of all positions.
    """
    images, present = policy._preprocess_images(batch)
    embeddings, valid, attention, _, _ = policy.model.embed_prefix_fast(
        images, present, batch[TOKENS], batch[TOKENS_MASK], suffix, mask
    )
    return run_paligemma(policy, embeddings, valid, attention)
