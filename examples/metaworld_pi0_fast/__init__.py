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

SKILLS = ASSETS / "skills"
"""A larger policy that knows seven tasks, and fewer demonstrations of each, in the same three places."""

OLD_TASKS = (
    OLD_TASK,
    "faucet-open-v3",
    "window-open-v3",
    "handle-press-v3",
    "plate-slide-v3",
    "coffee-button-v3",
    "button-press-v3",
)
"""The tasks that the policy of `SKILLS` knows."""

NEW_TASKS = (NEW_TASK, "faucet-close-v3", "window-close-v3", "drawer-close-v3", "handle-pull-v3")
"""Tasks that it can learn. The first has a scene of its own; of the others an old task has a scene that looks alike."""
