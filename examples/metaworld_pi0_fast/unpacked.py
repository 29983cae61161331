"""The shipped policy in a folder that lerobot's own commands can read."""

import json
import shutil
from pathlib import Path

from metaworld_pi0_fast import ASSETS
from metaworld_pi0_fast.policy import ACTION_TOKENIZER, TEXT_TOKENIZER

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
