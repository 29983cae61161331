"""In a process that loads this package, lerobot's pi0_fast has the sizes of `small_backbone.json`.

    PYTHONPATH=examples lerobot-train --small.discover_packages_path=small_pi0_fast --policy.path=outputs/pretrained ...

lerobot's own commands then run on a CPU, offline; `metaworld_pi0_fast.unpacked` makes the folder for --policy.path.
That file lies beside the folder of the tokenizers; the demo's makes 0.58 M parameters of 3 billion.

Three things of it are replaced: the sizes that it has in its code; its loading, which ties output layer and embedding,
here apart; and the processor that forgets, when it is saved, which tokenizers it has, and would look for others.
"""

import json
from pathlib import Path
from typing import Any

from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.processor.tokenizer_processor import ActionTokenizerProcessorStep
from metaworld_pi0_fast.policy import Backbone, small_backbone
from metaworld_pi0_fast.unpacked import PRETRAINED, unpack
from safetensors.torch import load_file
from transformers import AutoTokenizer

__all__ = ["PRETRAINED", "unpack"]


def _replace() -> None:
    build, get_config = PI0FastPolicy.__init__, ActionTokenizerProcessorStep.get_config

    def __init__(self: Any, config: Any, **rest: Any) -> None:
        text = Path(config.text_tokenizer_name)
        sizes = json.loads((text.parents[1] / "small_backbone.json").read_text(encoding="utf-8"))
        with small_backbone(Backbone(**sizes), len(AutoTokenizer.from_pretrained(text))):
            build(self, config, **rest)

    def from_pretrained(cls: Any, /, pretrained_name_or_path: Any, *, config: Any, **_: Any) -> Any:
        policy = cls(config)
        policy.load_state_dict(load_file(Path(pretrained_name_or_path) / "model.safetensors"), strict=True)
        return policy.to(config.device).eval()

    def complete_config(self: Any) -> dict[str, Any]:
        forgotten = ("paligemma_tokenizer_name", "fast_skip_tokens")
        return {**get_config(self), **{name: getattr(self, name) for name in forgotten}}

    PI0FastPolicy.__init__ = __init__
    PI0FastPolicy.from_pretrained = classmethod(from_pretrained)
    ActionTokenizerProcessorStep.get_config = complete_config


_replace()
