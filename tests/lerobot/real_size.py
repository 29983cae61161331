"""pi0_fast as it is configured by default, but for few and narrow layers; and a dataset of a robot for it.

Three cameras of 224 pixels, a prompt of 200 tokens, chunks of 50 actions, up to 256 action tokens, 257,152 classes.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from metaworld_pi0_fast.policy import Backbone, make_processors, small_backbone
from metaworld_pi0_fast.tokenizers import FAST_SKIP_TOKENS, fit_fast_tokenizer, fit_text_tokenizer

CAMERAS = [f"observation.images.{name}" for name in ("top", "wrist", "side")]
CLASSES, ACTION_TOKENS, SIDE, CHUNK, STATE, ACTION = 257_152, 1024, 224, 50, 8, 7
BACKBONE = Backbone(width=32, depth=2, mlp=64, heads=2, vision_width=32, vision_depth=1, vision_mlp=64, vision_heads=2,
                    patch=14, image=SIDE)  # fmt: skip


def record(folder: Path, task: str, seed: int, frames: int = 64) -> Path:
    """Two episodes of a motion that takes most action tokens; pictures are of one colour: others encode slowly."""
    features = {name: {"dtype": "image", "shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
                for name in CAMERAS}  # fmt: skip
    for name, size in (("observation.state", STATE), ("action", ACTION)):
        features[name] = {"dtype": "float32", "shape": (size,), "names": [str(i) for i in range(size)]}
    data = LeRobotDataset.create("local/arm", fps=30, features=features, root=folder, use_videos=False)
    generator = np.random.default_rng(seed)
    for _ in range(2):
        noise = generator.normal(size=(frames, STATE + ACTION))
        path = (np.cumsum(noise, 0) + 2.0 * noise).astype("float32")
        for place in range(frames):
            pictures = {name: np.full((SIDE, SIDE, 3), 16 * (i + 1) + place, "uint8") for i, name in enumerate(CAMERAS)}
            state, action = path[place, :STATE], path[place, STATE:]
            data.add_frame({**pictures, "observation.state": state, "action": action, "task": task})
        data.save_episode()
    data.finalize()
    return folder


def checkpoint(folder: Path, data: Path) -> Path:
    """An untrained policy that lerobot can load, with the statistics of a dataset."""
    read = LeRobotDataset("local/arm", root=data)
    actions = np.stack(read.hf_dataset.with_format("numpy")["action"])
    low, high = actions.min(0), actions.max(0)
    scaled = 2.0 * (actions - low) / (high - low) - 1.0
    chunks = np.stack([scaled[at : at + CHUNK] for at in range(len(scaled) - CHUNK)])
    text, fast = folder / "tokenizers" / "text", folder / "tokenizers" / "fast"
    fit_fast_tokenizer(fast, chunks, scale=10.0, vocab_size=ACTION_TOKENS)
    tasks = list(read.meta.tasks.index)
    words = len(fit_text_tokenizer(text, tasks, 0))
    assert len(fit_text_tokenizer(text, tasks, CLASSES - words)) == CLASSES
    config = PI0FastConfig(
        device="cpu",
        fast_skip_tokens=FAST_SKIP_TOKENS,
        text_tokenizer_name=str(text),
        action_tokenizer_name=str(fast),
        push_to_hub=False,
        input_features={name: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for name in CAMERAS}
        | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
    )
    torch.manual_seed(0)
    with small_backbone(BACKBONE, CLASSES) as module:
        policy = module.PI0FastPolicy(config)
    processors = make_processors(policy, read.meta.stats)
    for made in (policy, *processors):
        made.save_pretrained(folder)
    (folder / "small_backbone.json").write_text(json.dumps(asdict(BACKBONE)))
    # lerobot 0.6.1 does not save which text tokenizer the action tokens are written in
    saved = folder / "policy_preprocessor.json"
    pipeline = json.loads(saved.read_text())
    for step in pipeline["steps"]:
        if step.get("registry_name") == "action_tokenizer_processor":
            step["config"]["paligemma_tokenizer_name"] = str(text)
    saved.write_text(json.dumps(pipeline))
    return folder
