"""A small pi0, whose actions are continuous, and which knows three tasks: made here the first time, in a quarter hour.

lerobot fixes the sizes of pi0 in its code. As for pi0_fast, they are replaced while the policy is built, and only then.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from metaworld_pi0_fast import SKILLS
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import CAMERA_KEY, load_frames, record
from metaworld_pi0_fast.environment import ACTION_NAMES, IMAGE_SIZE, STATE_NAMES
from metaworld_pi0_fast.make_assets import fit
from metaworld_pi0_fast.policy import TEXT_TOKENIZER
from safetensors.torch import load_file, save_file

__all__ = ["KNOWN", "LEARNT", "load"]

KNOWN = ("drawer-open-v3", "faucet-open-v3", "window-open-v3")
"""The tasks that it knows"""

LEARNT = ("faucet-close-v3", "window-close-v3")
"""Those that it can learn"""

CHUNK, PROMPT = 10, 24  # actions at a time; tokens of a prompt
WIDTH, EXPERT, DEPTH, VISION, PATCH = 128, 64, 4, 80, 16
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
    frames = {task: load_frames(work / "recordings" / task, CHUNK) for task in (*KNOWN, *LEARNT)}
    policy = _new()
    processors = _processors(policy, aggregate_stats([part.stats for part in frames.values()]))
    file = work / "pi0.safetensors"
    if not file.is_file():
        torch.manual_seed(0)
        data = PreparedFrames.joined([PreparedFrames(frames[task], processors[0]) for task in KNOWN])
        fit(policy, data, steps=steps, batch_size=16, lr=RATE, ema=0.995, seed=0)
        save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, file)
    policy.load_state_dict(load_file(file))
    return policy.eval(), processors


def _new() -> Any:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from transformers import AutoTokenizer

    module = import_module("lerobot.policies.pi0.modeling_pi0")
    vocabulary = len(AutoTokenizer.from_pretrained(SKILLS / "pretrained" / TEXT_TOKENIZER))
    full = {
        name: getattr(module, name) for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    }

    def vlm(config: Any) -> Any:
        text, vision = config.text_config, config.vision_config
        text.vocab_size = config._vocab_size = vocabulary
        config.image_token_index = config.image_token_id = vocabulary - 1
        text.pad_token_id = 0
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads = VISION, 2, 4
        vision.intermediate_size, vision.patch_size, vision.image_size = 224, PATCH, IMAGE_SIZE
        vision.num_image_tokens = (IMAGE_SIZE // PATCH) ** 2
        vision.projection_dim = config.projection_dim = config.hidden_size = WIDTH
        return full["PaliGemmaForConditionalGenerationWithPiGemma"](config)

    def expert(config: Any) -> Any:
        config.vocab_size, config.pad_token_id = 8, 0  # it has no words
        return full["PiGemmaForCausalLM"](config)

    def sizes(variant: str) -> Any:
        # Eight heads: lerobot writes that number into its attention
        width, mlp = (WIDTH, 320) if variant == "gemma_2b" else (EXPERT, 192)
        return module.GemmaConfig(width, DEPTH, mlp, 8, 1, 16)

    config = PI0Config(
        device="cpu",
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=len(STATE_NAMES),
        max_action_dim=len(ACTION_NAMES),
        image_resolution=(IMAGE_SIZE, IMAGE_SIZE),
        tokenizer_max_length=PROMPT,
        push_to_hub=False,
        input_features={
            CAMERA_KEY: PolicyFeature(FeatureType.VISUAL, (3, IMAGE_SIZE, IMAGE_SIZE)),
            "observation.state": PolicyFeature(FeatureType.STATE, (len(STATE_NAMES),)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(ACTION_NAMES),))},
    )
    with ExitStack() as stack:
        for name, small in {"PiGemmaForCausalLM": expert, "PaliGemmaForConditionalGenerationWithPiGemma": vlm}.items():
            stack.enter_context(mock.patch.object(module, name, small))
        stack.enter_context(mock.patch.object(module, "get_gemma_config", sizes))
        return module.PI0Policy(config)


def _processors(policy: Any, stats: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """lerobot's own, with the tokenizer of the shipped policy in the place of the hub's."""
    from lerobot.policies.factory import make_pre_post_processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SKILLS / "pretrained" / TEXT_TOKENIZER)
    with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
        made: tuple[Any, Any] = make_pre_post_processors(policy_cfg=policy.config, dataset_stats=stats)
    return made
