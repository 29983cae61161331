"""The anchors of a training run: built of the pretrained policy before the first step, with some held out; or opened.

The frames pass through the *pretrained* policy's own processors: its prompts and states are normalised as it was
trained with, whatever the new dataset's statistics are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.sampling import spread
from craft_optim.lerobot._shared import policy_of
from craft_optim.lerobot.adapters import Adapter, adapter_for, adapter_of
from craft_optim.lerobot.datasets import anchor_batches, spread_frames
from craft_optim.lerobot.frames import SOURCES, open_frames
from craft_optim.lerobot.pretrained import load_preprocessor
from craft_optim.lerobot.settings import PREFIX, AnchorSettings, SettingsError
from craft_optim.lerobot.sharded import is_sharded, within_wrapper

__all__ = ["Part", "RunAnchors", "build_anchors", "heldout_folder", "open_anchors", "split_episodes"]


@dataclass(frozen=True)
class RunAnchors:
    """The anchors of a run.

    Attributes:
        adapter: How the policy is anchored.
        cache: The anchors that it is trained on.
        heldout: Others, of the same kind, that it is not; None if there are none.
    """

    adapter: Adapter
    cache: AnchorCache
    heldout: AnchorCache | None


class Part:
    """Part of a dataset, as a dataset.

    Args:
        dataset: As `anchor_batches` takes it, with the columns of `hf_dataset`.
        rows: Places in it.
    """

    def __init__(self, dataset: Any, rows: Sequence[int]) -> None:
        self.meta, self.hf_dataset = dataset.meta, dataset.hf_dataset.select(rows)
        self._dataset, self._rows = dataset, list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._rows[index]]


def heldout_folder(folder: Path) -> Path:
    """Folder of a cache's held-out anchors: beside it."""
    return folder.with_name(f"{folder.name}-heldout")


def split_episodes(dataset: Any, share: float) -> tuple[Part, Part | None]:
    """Frames to train on and frames to hold out, of different episodes; the same at every call.

    Args:
        dataset: With the column "episode_index" in its `hf_dataset`.
        share: Share of the episodes to hold out, rounded up, evenly apart; at least one stays.

    Returns:
        Both parts; None for the second if `share` is 0 or there is one episode only.
    """
    of_frame = np.asarray(dataset.hf_dataset.with_format(None)["episode_index"])
    episodes = np.unique(of_frame)
    count = min(math.ceil(share * len(episodes)), len(episodes) - 1)
    if count == 0:
        return Part(dataset, range(len(dataset))), None
    out = np.isin(of_frame, episodes[spread(len(episodes), count)])
    return Part(dataset, np.flatnonzero(~out).tolist()), Part(dataset, np.flatnonzero(out).tolist())


def build_anchors(
    model: nn.Module,
    settings: AnchorSettings,
    folder: Path,
    *,
    pretrained: str,
    device: torch.device,
    autocast: torch.dtype | None,
    heldout_count: int,
) -> RunAnchors:
    """Builds both caches, or goes on with half-built ones. Collective where there are several processes.

    Args:
        model: The policy, with the weights that it is not to forget.
        settings: With a source.
        folder: Folder of the cache; the held-out one goes beside it.
        pretrained: Folder or hub id of the checkpoint that the policy comes from, for its preprocessor.
        device: Device of the policy.
        autocast: Dtype that training runs under; None for none.
        heldout_count: At most so many held-out frames are kept.

    Raises:
        ValueError: The dataset, the episodes, the names of cameras or the settings do not fit the policy.
    """
    policy = policy_of(model)
    prepare = load_preprocessor(policy, pretrained, str(device))
    found = open_frames(policy.config, prepare, **{name: getattr(settings, name) for name in SOURCES})
    adapter = _reaching_all(adapter_for(model, found.keep), model)
    if settings.layers is not None:
        adapter = replace(adapter, layers=tuple(int(x) if x.lstrip("-").isdecimal() else x for x in settings.layers))
    train, held = split_episodes(found.dataset, settings.heldout)
    more = {"top_k": settings.top_k} if settings.top_k is not None else {}

    def build(part: Part, count: int | None, path: Path) -> AnchorCache:
        rows = range(len(part)) if count is None else spread_frames(part, min(count, len(part)))
        batches = anchor_batches(
            part,
            prepare,
            adapter,
            batch_size=settings.batch_size,
            indices=rows,
            prompts=found.prompts,
            workers=settings.workers,
        )
        dtype = getattr(torch, settings.dtype)
        reading = replace(adapter.reading, autocast=autocast)
        return adapter.build(model, batches, path, reading=reading, model_id=pretrained, dtype=dtype, **more)

    heldout = None
    if held is not None:
        heldout = build(held, heldout_count, heldout_folder(folder))
    return RunAnchors(adapter, build(train, settings.count, folder), heldout)


def open_anchors(model: nn.Module, folder: Path, fingerprint: str | None = None) -> RunAnchors:
    """Opens caches that are there.

    Args:
        model: The policy.
        folder: Folder of the cache.
        fingerprint: Fingerprint of its teacher, if it is known.

    Raises:
        SettingsError: There is no cache, or it is another teacher's.
    """
    if not folder.is_dir():
        raise SettingsError(
            f"There are no anchors in {folder}. They cannot be made anew of a policy that has been trained: pass "
            f"{PREFIX}anchors.path=FOLDER, where they are now, or make them of the pretrained policy with "
            "`craft-optim build-anchors`."
        )
    cache = AnchorCache.open(folder)
    if fingerprint is not None and cache.fingerprint != fingerprint:
        raise SettingsError(
            f"The anchors in {folder} are not those that this run began with: their teacher's fingerprint is "
            f"{cache.fingerprint}, the checkpoint says {fingerprint}. Pass {PREFIX}anchors.path=FOLDER, where they are."
        )
    held = heldout_folder(folder)
    return RunAnchors(
        _reaching_all(adapter_of(model, cache), model), cache, AnchorCache.open(held) if held.is_dir() else None
    )


def _reaching_all(adapter: Adapter, model: nn.Module) -> Adapter:
    if not is_sharded(model):
        return adapter
    assert adapter.reading.forward is not None
    return replace(adapter, reading=replace(adapter.reading, forward=within_wrapper(adapter.reading.forward)))
