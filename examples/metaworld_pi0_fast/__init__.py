"""A small, real pi0-FAST policy in MetaWorld: the data, the model and the simulator of `pi0_fast_craft.py`.

- `environment`: a MetaWorld task as the policy sees it (a 64-pixel picture, 4 state numbers), and OpenGL.
- `demonstrations`: scripted-expert episodes recorded as a LeRobotDataset; any LeRobotDataset read into
    memory.
- `batches`: those frames after the policy's own preprocessor, cached, ready for a training step.
- `tokenizers`, `fast_tokenizer`: the local text tokenizer and the local FAST action tokenizer.
- `policy`: lerobot's `PI0FastPolicy` with less than a million parameters; saved, loaded, wired up.
- `rollouts`: how often a policy solves a task, measured in the simulator, several episodes at a time.
- `make_assets`: the script that made everything under `assets/`.

None of these is imported here, so that whoever lacks MetaWorld can still load the data and the policy.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
"""What ships with the example: `demonstrations/<task>`, `pretrained` and `assets.json`."""

OLD_TASK = "drawer-open-v3"
"""The task that the shipped policy knows."""

NEW_TASK = "button-press-topdown-v3"
"""The task that it learns in the example."""
