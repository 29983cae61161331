"""A small pi0, whose actions are continuous, and which knows three tasks: made here the first time, in a quarter hour.

lerobot fixes the sizes of pi0 in its code. As for pi0_fast, they are replaced while the policy is built, and only then.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from metaworld_pi0_fast import SKILLS
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import load_frames, open_dataset, record
from metaworld_pi0_fast.environment import ACTION_NAMES, STATE_NAMES
from metaworld_pi0_fast.make_assets import fit
from metaworld_pi0_fast.policy import TEXT_TOKENIZER, Backbone, features, shrink
from safetensors.torch import load_file, save_file

__all__ = ["KNOWN", "LEARNT", "load"]

KNOWN = ("drawer-open-v3", "faucet-open-v3", "window-open-v3")
"""The tasks that it knows"""

LEARNT = ("faucet-close-v3", "window-close-v3")
"""Those that it can learn"""

CHUNK, PROMPT = 10, 24  # actions at a time; tokens of a prompt
VLM = Backbone(width=128, depth=4, mlp=320, vision_width=80, vision_mlp=224)
EXPERT_WIDTH, EXPERT_MLP = 64, 192
STEPS, RATE, EPISODES = 6000, 1e-3, 40


def load(work: Path, steps: int = STEPS) -> tuple[Any, tuple[Any, Any]]:
    """The policy and its processors, from `work`, where it is trained the first time.

    Args:
        work: Folder of recordings and weights.
        steps: Of training, the first time.
    """
    from lerobot.datasets.compute_stats import aggregate_stats

    for task in (*KNOWN, *LEARNT):
        if not (work / "recordings" / task).is_dir():
            aside = work / "recordings" / f"{task}.part"
            record(task, aside, EPISODES)
            aside.rename(work / "recordings" / task)
    sources = {task: work / "recordings" / task for task in (*KNOWN, *LEARNT)}
    policy = _new()
    processors = _processors(policy, aggregate_stats([open_dataset(source).meta.stats for source in sources.values()]))
    file = work / "pi0.safetensors"
    if not file.is_file():
        torch.manual_seed(0)
        known = [PreparedFrames(load_frames(sources[task], CHUNK), processors[0]) for task in KNOWN]
        fit(policy, PreparedFrames.joined(known), steps=steps, batch_size=16, lr=RATE, ema=0.995, seed=0)
        save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, file)
    policy.load_state_dict(load_file(file))
    return policy.eval(), processors


def _new() -> Any:
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from transformers import AutoTokenizer

    module = import_module("lerobot.policies.pi0.modeling_pi0")
    vocabulary = len(AutoTokenizer.from_pretrained(SKILLS / "pretrained" / TEXT_TOKENIZER))
    full_vlm, full_expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def vlm(config: Any) -> Any:
        shrink(config, VLM, vocabulary)
        return full_vlm(config)

    def expert(config: Any) -> Any:
        config.vocab_size, config.pad_token_id = 8, 0  # it has no words
        return full_expert(config)

    def sizes(variant: str) -> Any:
        # Eight heads: lerobot writes that number into its attention
        width, mlp = (VLM.width, VLM.mlp) if variant == "gemma_2b" else (EXPERT_WIDTH, EXPERT_MLP)
        return module.GemmaConfig(width, VLM.depth, mlp, 8, 1, 16)

    config = PI0Config(
        device="cpu",
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=len(STATE_NAMES),
        max_action_dim=len(ACTION_NAMES),
        image_resolution=(VLM.image, VLM.image),
        tokenizer_max_length=PROMPT,
        push_to_hub=False,
        **features(),
    )
    small: dict[str, Any] = {
        "PaliGemmaForConditionalGenerationWithPiGemma": vlm,
        "PiGemmaForCausalLM": expert,
        "get_gemma_config": sizes,
    }
    with mock.patch.multiple(module, **small):
        return module.PI0Policy(config)


def _processors(policy: Any, stats: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """lerobot's own, with the tokenizer of the shipped policy in the place of the hub's."""
    from lerobot.policies.factory import make_pre_post_processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SKILLS / "pretrained" / TEXT_TOKENIZER)
    with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
        made: tuple[Any, Any] = make_pre_post_processors(policy_cfg=policy.config, dataset_stats=stats)
    return made
