"""Anchors of a training run: built from the pretrained policy before the first step, some held out; or opened.

The frames pass through the *pretrained* policy's own processors: prompts and states are normalised as in its training,
whatever the new dataset's statistics are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.utils.utils import inside_slurm
from torch import nn

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.sampling import spread
from craft_optim.lerobot._shared import policy_of
from craft_optim.lerobot.adapters import Adapter, adapter_for, adapter_of
from craft_optim.lerobot.datasets import anchor_batches, spread_frames
from craft_optim.lerobot.frames import SOURCES, AnchorFrames, open_frames, require_count
from craft_optim.lerobot.pretrained import load_preprocessor
from craft_optim.lerobot.settings import AnchorSettings
from craft_optim.lerobot.sharded import is_sharded, within_wrapper

__all__ = [
    "Part",
    "RunAnchors",
    "build_anchors",
    "counts_of",
    "heldout_folder",
    "open_anchors",
    "open_source",
    "split_count",
    "split_episodes",
]


@dataclass(frozen=True)
class RunAnchors:
    """Anchors of a run.

    Attributes:
        adapter: Adapter of the policy.
        cache: Anchors that are trained on.
        heldout: Held-out anchors of the same kind; None if there are none.
    """

    adapter: Adapter
    cache: AnchorCache
    heldout: AnchorCache | None


class Part:
    """Part of a dataset, as a dataset.

    Args:
        dataset: Dataset for `anchor_batches`, with the columns of `hf_dataset`.
        rows: Places in the dataset.
    """

    def __init__(self, dataset: Any, rows: Sequence[int]) -> None:
        self.meta, self.hf_dataset = dataset.meta, dataset.hf_dataset.select(rows)
        self.root = getattr(dataset, "root", None)
        self._dataset, self._rows = dataset, list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._rows[index]]


def heldout_folder(folder: Path) -> Path:
    """Folder of a cache's held-out anchors, beside the cache."""
    return folder.with_name(f"{folder.name}-heldout")


def split_episodes(dataset: Any, share: float) -> tuple[Part, Part | None]:
    """Splits frames to train on and to hold out, from different episodes; the same at every call.

    Args:
        dataset: Dataset with the column "episode_index" in its `hf_dataset`.
        share: Share of the episodes to hold out, rounded up, evenly spaced; at least one is not held out.

    Returns:
        Both parts; the second is None if `share` is 0 or there is only one episode.
    """
    of_frame = np.asarray(dataset.hf_dataset.with_format(None)["episode_index"])
    episodes = np.unique(of_frame)
    count = min(math.ceil(share * len(episodes)), len(episodes) - 1)
    if count == 0:
        return Part(dataset, range(len(dataset))), None
    out = np.isin(of_frame, episodes[spread(len(episodes), count)])
    return Part(dataset, np.flatnonzero(~out).tolist()), Part(dataset, np.flatnonzero(out).tolist())


def split_count(count: int | None, share: float, train: int, held: int) -> tuple[int, int]:
    """Numbers of frames for anchors and for held-out ones, `count` together; None: all.

    Args:
        share: Share to hold out, rounded; at least one frame, if there is one and another to train on.
        train: Frames of the episodes to train on; at least one.
        held: Frames of the held-out episodes.

    Example:
        >>> split_count(128, 0.1, 3600, 400), split_count(128, 0.1, 3600, 0), split_count(None, 0.1, 3600, 400)
        ((115, 13), (128, 0), (3600, 400))
    """
    count = train + held if count is None else min(count, train + held)
    out = min(held, max(round(share * count), 1), count - 1)
    kept = min(count - out, train)
    return kept, min(held, count - kept)


def open_source(settings: AnchorSettings, cfg: Any) -> AnchorFrames:
    """The frames that the settings name, checked against the policy; they are read as the training's are.

    Args:
        settings: Settings with a source.
        cfg: lerobot's TrainPipelineConfig, validated.

    Raises:
        ValueError: The dataset, the episodes or the names of cameras do not fit the policy, or cannot be read.
    """
    config, data = cfg.policy, cfg.dataset
    given = {name: getattr(settings, name) for name in SOURCES}
    if not settings.is_file:
        training = {
            "tolerance_s": cfg.tolerance_s,
            "video_backend": data.video_backend,
            "depth_output_unit": data.depth_output_unit,
        }
        if settings.root is None and settings.repo_id == data.repo_id:
            training["revision"] = data.revision
        given |= {name: value for name, value in training.items() if given[name] is None}
    revision = getattr(config, "pretrained_revision", None)
    prepare = load_preprocessor(config, str(config.pretrained_path), config.device, revision)
    return open_frames(config, prepare, **given)


def counts_of(settings: AnchorSettings, source: AnchorFrames) -> tuple[int, int]:
    """Numbers of a source's frames for anchors, and for held-out ones."""
    train, held = split_episodes(source.dataset, settings.heldout)
    return split_count(settings.count, settings.heldout, len(train), 0 if held is None else len(held))


def build_anchors(
    model: nn.Module,
    settings: AnchorSettings,
    source: AnchorFrames,
    folder: Path,
    *,
    pretrained: str,
    device: torch.device,
    autocast: torch.dtype | None,
) -> RunAnchors:
    """Builds both caches, or continues half-built ones. Collective if there are several processes.

    Args:
        model: The policy, with the pretrained weights.
        source: Frames from `open_source` for these settings.
        folder: Folder of the cache; the held-out cache is written beside it.
        pretrained: Folder or hub id of the policy's checkpoint, for its preprocessor.
        device: Device of the policy.
        autocast: Dtype that training runs under; None for none.

    Raises:
        ValueError: The frames cannot be read, the settings do not fit the policy, or a folder holds a cache of another
            number of anchors.
    """
    policy = policy_of(model)
    prepare = load_preprocessor(policy, pretrained, str(device), getattr(policy.config, "pretrained_revision", None))
    adapter = _reaching_all(adapter_for(model, source.keep), model)
    if settings.layers is not None:
        adapter = replace(adapter, layers=tuple(int(x) if x.lstrip("-").isdecimal() else x for x in settings.layers))
    train, held = split_episodes(source.dataset, settings.heldout)
    counts = counts_of(settings, source)

    def build(part: Part, count: int, path: Path, units_of: AnchorCache | None = None) -> AnchorCache:
        require_count(path, count)
        rows = spread_frames(part, count)
        batches = anchor_batches(
            part,
            prepare,
            adapter,
            batch_size=settings.batch_size,
            indices=rows,
            prompts=source.prompts,
            workers=settings.workers,
        )
        dtype = getattr(torch, settings.dtype)
        reading = replace(adapter.reading, autocast=autocast)
        how = {"reading": reading, "top_k": settings.top_k, "dtype": dtype, "units_of": units_of}
        progress = None if inside_slurm() else True
        return adapter.build(model, batches, path, model_id=pretrained, progress=progress, **how)

    cache, heldout = build(train, counts[0], folder), None
    if held is not None and counts[1]:
        # In the units of the anchors, as the run measures it
        heldout = build(held, counts[1], heldout_folder(folder), units_of=cache)
    return RunAnchors(adapter, cache, heldout)


def open_anchors(model: nn.Module, cache: AnchorCache) -> RunAnchors:
    """Opens a run's anchors from an existing cache and the held-out one beside it.

    Args:
        model: The policy.
    """
    held = heldout_folder(cache.path)
    return RunAnchors(
        _reaching_all(adapter_of(model, cache), model), cache, AnchorCache.open(held) if held.is_dir() else None
    )


def _reaching_all(adapter: Adapter, model: nn.Module) -> Adapter:
    if not is_sharded(model):
        return adapter
    assert adapter.reading.forward is not None
    return replace(adapter, reading=replace(adapter.reading, forward=within_wrapper(adapter.reading.forward)))
