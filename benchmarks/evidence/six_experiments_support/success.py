"""Success of checkpoints in the simulator. lerobot-eval renders too slowly on CPUs; these rollouts share a picture."""

import json
from collections.abc import Sequence
from pathlib import Path

from metaworld_pi0_fast.policy import load_policy, make_processors
from metaworld_pi0_fast.rollouts import RolloutPool
from safetensors.torch import load_file

__all__ = ["measure_success"]


def measure_success(
    pool: RolloutPool, shipped: Path, checkpoint: Path, tasks: Sequence[str], rollouts: int, file: Path
) -> None:
    """Runs a checkpoint on both tasks, and writes task -> a list of true and false.

    Args:
        pool: Worker processes.
        shipped: The shipped policy, whose sizes the checkpoint has.
        checkpoint: Of lerobot-train; its own processors are used.
        tasks: MetaWorld's names.
        rollouts: Per task, on goals that no demonstration shows.
        file: JSON.
    """
    policy = load_policy(shipped)
    policy.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    processors = make_processors(policy, path=checkpoint)
    found = {task: pool.run(policy, processors, task, episodes=rollouts).successes for task in tasks}
    file.write_text(json.dumps({task: list(map(bool, each)) for task, each in found.items()}) + "\n", encoding="utf-8")
