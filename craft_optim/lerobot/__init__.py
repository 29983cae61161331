"""What lerobot's policies need to be anchored; requires `pip install craft-optim[lerobot]` and Python 3.12."""

from craft_optim.lerobot import act, pi0, pi0_fast, smolvla
from craft_optim.lerobot.adapters import Adapter, adapter_for
from craft_optim.lerobot.datasets import anchor_batches, image_keys, prompts, spread_frames

__all__ = [
    "Adapter",
    "act",
    "adapter_for",
    "anchor_batches",
    "image_keys",
    "pi0",
    "pi0_fast",
    "prompts",
    "smolvla",
    "spread_frames",
]
