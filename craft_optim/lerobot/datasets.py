"""Anchor batches from a dataset: choice of frames, pictures and instructions."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from craft_optim._paths import local
from craft_optim.lerobot.adapters import Adapter
from craft_optim.lerobot.opening import open_dataset, readable

__all__ = ["anchor_batches", "camera_keys", "image_keys", "open_dataset", "prompts", "spread_frames"]

_SOURCE = ("episode_index", "frame_index")


def image_keys(dataset: Any) -> list[str]:
    """Keys of all cameras of a dataset, whatever their names.

    They are declared by the dataset (`meta.camera_keys`, or features of dtype "image" or "video"), or else the first
    sample's uint8 or floating tensors of three dimensions with 1 or 3 channels, first or last.

    Raises:
        ValueError: None is found.
    """
    keys = camera_keys(dataset)
    if not keys:
        raise ValueError(f"The dataset has no pictures. Found keys {sorted(dataset[0])}.")
    return keys


def camera_keys(dataset: Any) -> list[str]:
    """Result of `image_keys`, or an empty list."""
    meta = getattr(dataset, "meta", None)
    keys = list(getattr(meta, "camera_keys", None) or ())
    if not keys:
        features = getattr(meta, "features", None) or getattr(dataset, "features", None) or {}
        keys = [k for k, v in features.items() if isinstance(v, Mapping) and v.get("dtype") in ("image", "video")]
    if not keys:
        keys = [key for key, value in dataset[0].items() if _is_image(value)]
    return keys


def _is_image(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 3:
        return False
    kind = value.dtype == torch.uint8 or value.is_floating_point()
    return kind and (value.shape[0] in (1, 3) or value.shape[-1] in (1, 3))


def prompts(source: Any) -> list[str]:
    """Instructions of a dataset, each once, or of a file.

    Args:
        source: A dataset with `meta.tasks`, as in lerobot; any other whose samples have a "task", which are all read;
            or the path of a text file in UTF-8, one instruction per line; blank lines and lines that begin with "#" are
            skipped.

    Raises:
        ValueError: None is found.
    """
    if isinstance(source, str | os.PathLike):
        lines = [line.strip() for line in local(source).read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
    elif (tasks := getattr(getattr(source, "meta", None), "tasks", None)) is not None:
        found = [str(task) for task in tasks.sort_values("task_index").index]
    else:
        found = list(dict.fromkeys(source[i]["task"] for i in range(len(source))))
    if not found:
        raise ValueError(f"There are no instructions in {source!r}.")
    return found


def spread_frames(dataset: Any, count: int) -> list[int]:
    """Chooses `count` frames, the same at every call: equally many of each task, evenly over its episodes' frames.

    If a task has too few frames, the others get more.

    Args:
        dataset: A LeRobotDataset, or anything with a length; without `hf_dataset` its frames count as one task.

    Returns:
        Places in the dataset, in ascending order.

    Raises:
        ValueError: The dataset has fewer frames, or `count` is less than 1.
    """
    if not 1 <= count <= len(dataset):
        raise ValueError(f"`count` must be in [1, {len(dataset)}], the number of frames. Found count={count}.")
    table = getattr(dataset, "hf_dataset", None)
    columns = table.with_format(None) if table is not None and "task_index" in table.column_names else None
    task = np.zeros(len(dataset), dtype=np.int64) if columns is None else np.asarray(columns["task_index"])
    groups = sorted((np.flatnonzero(task == one) for one in np.unique(task)), key=len)
    chosen: list[int] = []
    for number, rows in enumerate(groups):  # the shortest first: its missing frames are shared among the rest
        share = min(len(rows), (count - len(chosen)) // (len(groups) - number))
        chosen += rows[((np.arange(share) + 0.5) * len(rows) / max(share, 1)).astype(np.int64)].tolist()
    return sorted(chosen)


def anchor_batches(
    dataset: Any,
    preprocessor: Any,
    adapter: Adapter,
    *,
    batch_size: int = 16,
    count: int | None = None,
    indices: Iterable[int] | None = None,
    prompts: Sequence[str] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """Batches of anchors for `Adapter.build` and `anchors.build`, read one at a time; their category is the task.

    They have "episode_index" and "frame_index", too, where the dataset does: `inspect` says where an anchor is from.

    Args:
        dataset: Dataset from `open_dataset`, or a LeRobotDataset with `delta_timestamps` that fit the policy. All
            cameras that it shares with the policy are used.
        preprocessor: The teacher's own preprocessor, with its training statistics: prompts and states depend on them.
        count: Number of frames, see `spread_frames`. None, with `indices` None: all.
        indices: Places of the frames, instead of `count`.
        prompts: Instructions instead of the frames' own, in turn.
        workers: Processes that read frames ahead; 0 for none.

    Raises:
        ValueError: Both `count` and `indices` are given, or a number is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be >= 1. Found batch_size={batch_size}.")
    if count is not None and indices is not None:
        raise ValueError(f"`count` and `indices` exclude each other: pass one. Found count={count} and indices.")
    if prompts is not None and (isinstance(prompts, str) or not prompts):
        raise ValueError(f"`prompts` must be a list of at least one instruction. Found {prompts!r}.")
    if indices is None:
        indices = range(len(dataset)) if count is None else spread_frames(dataset, count)
    rows = list(indices)
    pictures = camera_keys(dataset)

    def prepared() -> Iterator[dict[str, Any]]:
        done, samples = 0, _samples(dataset, rows, workers)
        while some := list(islice(samples, batch_size)):
            batch = default_collate(some)
            for key in pictures:
                if key in batch and batch[key].dtype == torch.uint8:
                    batch[key] = batch[key].float() / 255.0  # as lerobot-train does before its preprocessor
            if prompts is not None:
                batch["task"] = [prompts[(done + i) % len(prompts)] for i in range(len(some))]
            # The dataset's own instruction: preprocessors rewrite it
            told = batch.get("task")
            texts = isinstance(told, list | tuple) and all(isinstance(task, str) for task in told)
            tasks = {"category": list(told)} if texts else {}
            source = {key: batch[key] for key in _SOURCE if isinstance(batch.get(key), Tensor)}
            yield adapter.inputs(preprocessor(batch)) | source | tasks
            done += len(some)

    return _Batches(prepared(), math.ceil(len(rows) / batch_size))


class _Batches(Iterator[dict[str, Any]]):
    """Iterator with a known number of batches, for a bar with a known end."""

    def __init__(self, batches: Iterator[dict[str, Any]], number: int) -> None:
        self._batches, self._number = batches, number

    def __len__(self) -> int:
        return self._number

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)


class _Unreadable(str):
    """Message of another process about an unreadable frame; an exception would bring its traceback as text."""


class _Frames:
    """A dataset that reports unreadable frames in one line."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._name = getattr(dataset, "root", None) or getattr(dataset, "repo_id", None) or "the dataset"

    def __getitem__(self, row: int) -> Any:
        try:
            with readable(f"A frame of {self._name}"):
                return self._dataset[row]
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            return _Unreadable(error)


def _samples(dataset: Any, rows: Sequence[int], workers: int) -> Iterator[Any]:
    frames = _Frames(dataset)
    if not workers:
        yield from (frames[row] for row in rows)
        return
    loader: Iterable[Any] = DataLoader(frames, batch_size=None, sampler=rows, num_workers=workers)  # type: ignore[arg-type]
    for sample in loader:
        if isinstance(sample, _Unreadable):
            raise ValueError(str(sample))
        yield sample
