"""Several LeRobotDatasets read as one, with renamed features: a folder of recordings as a dataset."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from datasets import Dataset  # type: ignore[import-untyped]

__all__ = ["JoinedDatasets", "about_dataset"]

PADDING = "_is_pad"


def about_dataset(features: Mapping[str, Any], tasks: Mapping[str, int]) -> SimpleNamespace:
    """Makes the part of a LeRobotDataset's `meta` that is read.

    Args:
        features: Name -> {"dtype": ..., "shape": ...}.
        tasks: Instruction -> its number.
    """
    cameras = [key for key, value in features.items() if value["dtype"] in ("image", "video")]
    table = pd.DataFrame({"task_index": list(tasks.values())}, index=list(tasks))
    return SimpleNamespace(features=dict(features), camera_keys=cameras, tasks=table)


class JoinedDatasets:
    """Datasets one after the other; equal words are the same task.

    Attributes:
        meta: Metadata with `features`, `camera_keys` and `tasks`, as in a LeRobotDataset, under the new names.
        hf_dataset: Table with the columns "task_index" and "episode_index" of all frames.

    Args:
        datasets: LeRobotDatasets, at least one; their features have the same names and shapes.
        names: Old name -> new name of each feature.

    Raises:
        ValueError: The features of two datasets differ.
    """

    def __init__(self, datasets: Sequence[Any], names: Mapping[str, str] | None = None) -> None:
        _check_alike(datasets)
        self._datasets, self._ends = list(datasets), list(accumulate(len(one) for one in datasets))
        names = names or {}
        self._names = {**names, **{f"{old}{PADDING}": f"{new}{PADDING}" for old, new in names.items()}}
        task, episode, before = [], [], 0
        tasks: dict[str, int] = {}
        for one in datasets:
            own = one.meta.tasks.sort_values("task_index").index
            number = np.array([tasks.setdefault(str(name), len(tasks)) for name in own])
            columns = one.hf_dataset.with_format("numpy")
            task.append(number[np.asarray(columns["task_index"])])
            episode.append(np.unique(np.asarray(columns["episode_index"]), return_inverse=True)[1] + before)
            before += one.num_episodes
        self._task, self._episode = np.concatenate(task), np.concatenate(episode)
        self.hf_dataset = Dataset.from_dict({"task_index": self._task, "episode_index": self._episode})
        features = {self._names.get(key, key): value for key, value in datasets[0].meta.features.items()}
        self.meta = about_dataset(features, tasks)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self) - 1}]. Found {index}.")
        which = bisect_right(self._ends, index)
        sample = self._datasets[which][index - (self._ends[which - 1] if which else 0)]
        sample = {self._names.get(key, key): value for key, value in sample.items()}
        own = {"index": index, "task_index": self._task[index], "episode_index": self._episode[index]}
        return sample | {key: sample[key].new_tensor(value) for key, value in own.items()}


def _check_alike(datasets: Sequence[Any]) -> None:
    """Raises unless samples of all datasets can share a batch."""
    first = datasets[0]
    shapes = {key: tuple(value["shape"]) for key, value in first.meta.features.items()}
    for other in datasets[1:]:
        found = {key: tuple(value["shape"]) for key, value in other.meta.features.items()}
        unlike = sorted(key for key in shapes | found if shapes.get(key) != found.get(key))
        if unlike:
            key = unlike[0]
            raise ValueError(
                f"{first.root} and {other.root} cannot be read as one dataset: {key!r} is {shapes.get(key, 'absent')} "
                f"in the first, {found.get(key, 'absent')} in the second. Build a cache of each."
            )
