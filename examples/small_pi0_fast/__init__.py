"""In a process that loads this package, lerobot's pi0_fast is the demo's: 0.58 M parameters instead of 3 billion.

    PYTHONPATH=examples lerobot-train --small.discover_packages_path=small_pi0_fast --policy.path=outputs/pretrained ...

lerobot's own commands then run on a CPU, offline. `unpack` makes the folder for --policy.path. Three things of it are
replaced: the sizes that it has in its code; its loading, which ties output layer and embedding, here apart; and the
processor that forgets, when it is saved, which tokenizers it has, and would look for others on the hub.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.processor.tokenizer_processor import ActionTokenizerProcessorStep
from metaworld_pi0_fast import ASSETS
from metaworld_pi0_fast.policy import ACTION_TOKENIZER, TEXT_TOKENIZER, Backbone, small_backbone
from safetensors.torch import load_file
from transformers import AutoTokenizer

__all__ = ["PRETRAINED", "unpack"]

PRETRAINED = ASSETS / "pretrained"


def unpack(folder: Path) -> Path:
    """Copies the shipped policy so that lerobot itself can read it: tokenizers by their full paths.

    Args:
        folder: Where to; must not exist yet.

    Returns:
        The folder.
    """
    shutil.copytree(PRETRAINED, folder)
    text, action = (str((folder / name).resolve()) for name in (TEXT_TOKENIZER, ACTION_TOKENIZER))
    for file in folder.glob("*.json"):
        content = file.read_text(encoding="utf-8")
        content = content.replace(json.dumps(TEXT_TOKENIZER), json.dumps(text))
        file.write_text(content.replace(json.dumps(ACTION_TOKENIZER), json.dumps(action)), encoding="utf-8")
    processors = folder / "policy_preprocessor.json"
    pipeline = json.loads(processors.read_text(encoding="utf-8"))
    for step in pipeline["steps"]:
        if step.get("registry_name") == "action_tokenizer_processor":
            step["config"]["paligemma_tokenizer_name"] = text
    processors.write_text(json.dumps(pipeline, indent=2), encoding="utf-8")
    return folder


def _replace() -> None:
    sizes = Backbone(**json.loads((PRETRAINED / "small_backbone.json").read_text(encoding="utf-8")))
    build, get_config = PI0FastPolicy.__init__, ActionTokenizerProcessorStep.get_config

    def __init__(self: Any, config: Any, **rest: Any) -> None:
        with small_backbone(sizes, len(AutoTokenizer.from_pretrained(config.text_tokenizer_name))):
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
