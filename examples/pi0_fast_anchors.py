"""Anchors of the shipped pi0_fast for the command line: what it says about frames of the task that it knows.

craft-optim build-anchors anchors/ --factory=examples/pi0_fast_anchors.py:drawer
craft-optim inspect anchors/ --html=anchors.html --factory=examples/pi0_fast_anchors.py:drawer
"""

from typing import Any

import torch
from metaworld_pi0_fast import ASSETS, OLD_TASK
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import load_frames
from metaworld_pi0_fast.policy import load_policy, make_processors

from craft_optim.anchors import Reading
from craft_optim.lerobot.pi0_fast import action_logits, action_mask, anchor_inputs


def drawer(episodes: int = 8) -> tuple[Any, list[Any], dict[str, Any]]:
    """The policy, batches of frames, and further arguments of `craft_optim.anchors.build`."""
    policy = load_policy(ASSETS / "pretrained")
    frames = load_frames(ASSETS / "demonstrations" / OLD_TASK, policy.config.chunk_size, episodes=list(range(episodes)))
    prepared = PreparedFrames(frames, make_processors(policy, path=ASSETS / "pretrained")[0])
    batches = [anchor_inputs(prepared.train_batch(rows)) for rows in torch.split(prepared.train_indices, 32)]
    return policy, batches, {"reading": Reading(action_logits, action_mask, class_dim=-1), "model_id": "small pi0_fast"}
