"""A dataset whose statistics are those of two, so that a policy that learns one keeps its units for the other."""

import shutil
from pathlib import Path

__all__ = ["copy_with_joint_statistics"]


def copy_with_joint_statistics(dataset: Path, other: Path, to: Path) -> None:
    """Copies a LeRobotDataset; lerobot-train takes its normalisation from the statistics in it.

    Plain lerobot-train gives a checkpoint the new dataset's normalisation, under which the old task's frames look
    different: it would fail there for that reason alone. `--craft.statistics=pretrained` is the remedy of craft-optim;
    so that all methods have the same one, the new dataset has the statistics here that the policy was trained with.

    Args:
        dataset: What to copy.
        other: The dataset that its statistics are joined with.
        to: Where to; must not exist yet.
    """
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.io_utils import write_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    stats = [LeRobotDatasetMetadata(f"local/{folder.name}", root=folder).stats for folder in (other, dataset)]
    shutil.copytree(dataset, to)
    write_stats(aggregate_stats(stats), to)
