"""What all runs share: the policy that knows many tasks, the frames of old and new tasks, and caches of anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metaworld_pi0_fast import OLD_TASKS, SKILLS
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import CAMERA_KEY, Frames, load_frames
from metaworld_pi0_fast.environment import instruction
from metaworld_pi0_fast.policy import load_policy, make_processors
from metaworld_pi0_fast.rollouts import run_episodes
from torch import Tensor

from craft_optim.anchors import AnchorCache, AnchorRetention
from craft_optim.lerobot.adapters import adapter_for, adapter_of

from . import continuous

__all__ = ["ANCHORED", "STRIDE", "Skills", "make_skills", "of_tasks"]

ANCHORED = {"all": OLD_TASKS, "half": OLD_TASKS[::2], "one": OLD_TASKS[:1]}
"""Old tasks whose demonstrations are anchors, by the name of the choice"""
HELD_OUT = 2  # episodes of each old task that are no anchors
STRIDE = 2  # every second frame is an anchor: neighbours are alike
OWN_SEED, OWN_GOALS = -500, 10  # of the rollouts that are anchors: goals of no demonstration and of no measurement


def make_skills(policy: str, work: Path, episodes: int | None = None, known: int | None = None) -> Skills:
    """The policy that is shipped, or the pi0 that is made in `work`.

    Args:
        policy: "pi0_fast" or "pi0".
        work: Folder of the caches.
        episodes: At most so many demonstrations of each task. None: all.
        known: Of the tasks that it knows, the first so many alone. None: all.
    """
    torch.set_num_threads(1)
    if policy == "pi0":
        folder = work / "pi0"
        made, processors = continuous.load(folder)
        return Skills(made, processors, folder, folder / "recordings", continuous.KNOWN[:known], episodes)
    source = SKILLS / "pretrained"
    shipped = load_policy(source, device="cpu")
    processors = make_processors(shipped, path=source)
    return Skills(shipped, processors, work, SKILLS / "demonstrations", OLD_TASKS[:known], episodes)


def of_tasks(tasks: Sequence[str], of_each: dict[str, PreparedFrames]) -> PreparedFrames:
    """The frames of these tasks as one."""
    return PreparedFrames.joined([of_each[task] for task in tasks])


@dataclass
class Skills:
    """A policy and what belongs to it; frames and caches are loaded or made when they are first asked for.

    Args:
        policy: One of lerobot's, in evaluation mode.
        processors: Its own.
        work: Folder of the caches.
        demonstrations: Folder of those of each task.
        old: The tasks that it knows.
        episodes: At most so many demonstrations of each task. None: all.
    """

    policy: Any
    processors: tuple[Any, Any]
    work: Path
    demonstrations: Path
    old: tuple[str, ...]
    episodes: int | None = None

    def frames(self, task: str, episodes: int | None = None) -> PreparedFrames:
        """The demonstrations of a task, or the first of them, of which none is held out."""
        count = episodes or self.episodes
        wanted = list(range(count)) if count else None
        loaded = load_frames(self.demonstrations / task, self.policy.config.chunk_size, episodes=wanted)
        return PreparedFrames(loaded, self.processors[0], heldout_episodes=0 if episodes else HELD_OUT)

    @cached_property
    def known(self) -> dict[str, PreparedFrames]:
        """Those of each old task."""
        return {task: self.frames(task) for task in self.old}

    @cached_property
    def own(self) -> PreparedFrames:
        """What the policy sees and does in rollouts of its own, on all old tasks, whether it succeeds or not."""
        parts = [_own_frames(self.policy, self.processors, task) for task in self.old]
        return PreparedFrames.joined([PreparedFrames(part, self.processors[0], heldout_episodes=0) for part in parts])

    def cache(self, name: str, keep: str | None = None) -> AnchorCache:
        """Anchors of the policy as it is shipped.

        Args:
            name: Of `ANCHORED`; "own"; or an old task, for its held-out frames.
            keep: What is kept, as `adapter_for` takes it.
        """
        if name == "own":
            frames, rows = self.own, self.own.train_indices
        elif name in self.old:
            frames = self.known[name]
            rows = frames.heldout_indices
        else:
            frames = of_tasks([task for task in ANCHORED[name] if task in self.old], self.known)
            rows = frames.train_indices[::STRIDE]
        return self.anchors(frames, rows, self.work / "anchors" / (keep or "first") / name, keep)

    def anchors(self, frames: PreparedFrames, rows: Tensor, path: Path, keep: str | None = None) -> AnchorCache:
        """A cache of these rows, of the policy as it is now; one that is there is not made again."""
        adapter = adapter_for(self.policy, keep)
        return adapter.build(self.policy, frames.anchor_batches(rows, adapter.inputs), path, model_id="many skills")

    def retention(
        self, cache: AnchorCache, seed: int = 0, batch_size: int = 16, strict: bool = True
    ) -> AnchorRetention:
        """The closure that holds the policy to a cache; unless `strict`, it may have moved since that was written."""
        adapter = adapter_of(self.policy, cache)
        return adapter.retention(self.policy, cache, batch_size=min(batch_size, len(cache)), seed=seed, strict=strict)


def _own_frames(policy: Any, processors: tuple[Any, Any], task: str) -> Frames:
    pictures, states, chunks = list[Any](), list[Any](), list[Any]()

    def watch(*seen: Any) -> None:
        for into, part in zip((pictures, states, chunks), seen, strict=True):
            into.append(torch.from_numpy(np.array(part)))

    run_episodes(policy, *processors, task, range(OWN_GOALS), seed=OWN_SEED, watch=watch)
    images, actions = torch.cat(pictures).permute(0, 3, 1, 2), torch.cat(chunks)
    return Frames(
        images={CAMERA_KEY: images},
        state=torch.cat(states),
        actions=actions,
        action_is_pad=torch.zeros(actions.shape[:2], dtype=torch.bool),
        tasks=[instruction(task)] * len(actions),
        episode=torch.zeros(len(actions), dtype=torch.int64),
        stats={},
    )
