"""Anchors of lerobot's policies; requires `pip install craft-optim[lerobot]` and Python 3.12."""

from craft_optim.lerobot import _noise, act, diffusion, pi0, pi0_fast, smolvla
from craft_optim.lerobot._statistics import freeze_statistics
from craft_optim.lerobot.adapters import Adapter, adapter_for
from craft_optim.lerobot.datasets import anchor_batches, image_keys, open_dataset, prompts, spread_frames
from craft_optim.lerobot.frames import AnchorFrames, open_frames
from craft_optim.lerobot.pretrained import load_config, load_policy, load_preprocessor

_noise.shorten()

__all__ = [
    "Adapter",
    "AnchorFrames",
    "act",
    "adapter_for",
    "anchor_batches",
    "diffusion",
    "freeze_statistics",
    "image_keys",
    "load_config",
    "load_policy",
    "load_preprocessor",
    "open_dataset",
    "open_frames",
    "pi0",
    "pi0_fast",
    "prompts",
    "smolvla",
    "spread_frames",
]
