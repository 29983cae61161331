"""Demonstrations: the scripted expert recorded as a LeRobotDataset; any LeRobotDataset read into memory."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .environment import (
    ACTION_NAMES,
    FPS,
    IMAGE_SIZE,
    STATE_NAMES,
    Camera,
    Environment,
    Goals,
    expert,
    instruction,
)

VIDEO_BACKEND = "pyav"
"""PyAV brings its own FFmpeg; lerobot's first choice, torchcodec, needs the system's."""

CAMERA_KEY = "observation.image"
STATE_KEY = "observation.state"
ACTION_KEY = "action"

RECORDING_SEED = 0
"""Goals of the demonstrations. Rollouts must use another seed."""


class Pushes:
    """Random shoves that carry the hand off the expert's path.

    A policy that has only seen perfect episodes does not know how to come back from its own small errors.
    Here the expert's action is what is recorded, but now and then something else is executed for a few
    steps, so that the data hold the way back: the idea of DART (Laskey et al., 2017,
    https://arxiv.org/abs/1703.09327), with bursts in place of white noise, which the arm would average
    out.

    Args:
        rng: Source of randomness.
        rate: Probability that a shove begins at a step.
        length: Steps that one shove lasts, at most.
        strength: Standard deviation of the shove, per axis, in units of the action.
    """

    def __init__(self, rng: np.random.Generator, rate: float = 0.04, length: int = 8, strength: float = 0.8) -> None:
        self.rng, self.rate, self.length, self.strength = rng, rate, length, strength
        self._left = 0
        self._push = np.zeros(4, dtype=np.float32)

    def __call__(self, action: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The action to execute in place of `action`."""
        if self._left == 0 and self.rng.random() < self.rate:
            self._left = int(self.rng.integers(3, self.length + 1))
            self._push[:3] = self.rng.normal(0.0, self.strength, 3)
        if self._left == 0:
            return action
        self._left -= 1
        return action + self._push


def record(
    task: str,
    root: Path,
    episodes: int = 25,
    seed: int = RECORDING_SEED,
    max_steps: int = 200,
    after_success: int = 5,
    skip: int = 0,
) -> Any:
    """Records successful episodes of MetaWorld's scripted expert as a LeRobotDataset v3.

    Every episode has a goal of its own; every second one is disturbed by `Pushes`. The actions on record are
    always the expert's.

    Args:
        task: A MetaWorld task name.
        root: Folder of the dataset; replaced when it exists.
        episodes: Episodes to keep.
        seed: Seed of the goals and of the pushes.
        max_steps: An episode that has not succeeded by then is thrown away, and the next goal is tried.
        after_success: Steps recorded after the task is solved, so that the data say how to end.
        skip: So many successful episodes are left out first: what is recorded are those that follow them.

    Returns:
        The finished `LeRobotDataset`.
    """
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shutil.rmtree(root, ignore_errors=True)
    goals = Goals(task, seed)
    environment = Environment(goals)
    camera = Camera(environment)
    rng = np.random.default_rng(seed)
    dataset = LeRobotDataset.create(
        repo_id=f"local/{task}",
        fps=FPS,
        root=root,
        robot_type="sawyer",
        video_backend=VIDEO_BACKEND,
        features={
            CAMERA_KEY: {
                "dtype": "video",
                "shape": (IMAGE_SIZE, IMAGE_SIZE, 3),
                "names": ["height", "width", "channels"],
            },
            STATE_KEY: {"dtype": "float32", "shape": (len(STATE_NAMES),), "names": list(STATE_NAMES)},
            ACTION_KEY: {"dtype": "float32", "shape": (len(ACTION_NAMES),), "names": list(ACTION_NAMES)},
        },
        # Nearly lossless, colours at full resolution: what matters here is a few pixels wide.
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv444p", crf=8, g=10),
    )
    kept, goal = -skip, 0
    with tqdm(total=episodes, desc=f"recording {task}", unit="episode") as progress:
        while kept < episodes:
            if goal >= len(goals):
                raise RuntimeError(
                    f"Only {max(kept, 0)} of `episodes`={episodes} succeeded, on {len(goals)} goals of seed {seed}. "
                    "Ask for fewer episodes, or allow more `max_steps`."
                )
            environment.reset(goal)
            policy, shove = expert(task), Pushes(rng)
            disturbed = (skip + kept) % 2 == 1
            remaining = after_success
            for _ in range(max_steps):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    action = np.clip(policy.get_action(environment.observation), -1.0, 1.0).astype(np.float32)
                if kept >= 0:
                    dataset.add_frame(
                        {
                            CAMERA_KEY: camera.picture(environment),
                            STATE_KEY: environment.state,
                            ACTION_KEY: action,
                            "task": instruction(task),
                        }
                    )
                environment.step(shove(action) if disturbed else action)
                remaining -= environment.success
                if remaining < 0:
                    break
            goal += 1
            if environment.success:
                if kept >= 0:
                    dataset.save_episode()
                    progress.update()
                kept += 1
            elif kept >= 0:
                dataset.clear_episode_buffer()
    dataset.finalize()
    camera.close()
    return dataset


@dataclass
class Frames:
    """A whole dataset in memory, one row per frame.

    Attributes:
        images: Camera key -> uint8 tensor of shape `(n, 3, height, width)`.
        state: float32, shape `(n, state)`.
        actions: The action at this frame and the ones that follow, float32, shape `(n, chunk, action)`.
            Beyond the end of an episode its last action is repeated.
        action_is_pad: Where the actions are such repetitions, bool, shape `(n, chunk)`.
        tasks: The instruction of each frame.
        episode: Number of the episode of each frame, int64, shape `(n,)`.
        stats: The dataset's statistics, as lerobot computed them.
    """

    images: dict[str, Tensor]
    state: Tensor
    actions: Tensor
    action_is_pad: Tensor
    tasks: list[str]
    episode: Tensor
    stats: dict[str, dict[str, Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.state)


def open_dataset(source: str | Path, episodes: Sequence[int] | None = None) -> Any:
    """Opens a LeRobotDataset: a local folder when there is one at `source`, else the hub's of that name.

    Args:
        source: Folder or hub id.
        episodes: Episodes to open (and to download); all when `None`.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    path = Path(source)
    wanted = None if episodes is None else list(episodes)
    if (path / "meta" / "info.json").is_file():
        return LeRobotDataset(f"local/{path.name}", root=path, episodes=wanted, video_backend=VIDEO_BACKEND)
    if path.exists():
        raise FileNotFoundError(
            f"`source`={str(source)!r} exists but is no LeRobotDataset: it has no meta/info.json. "
            "Pass the folder that holds `data`, `meta` and `videos`."
        )
    return LeRobotDataset(str(source), episodes=wanted, video_backend=VIDEO_BACKEND)


def load_frames(source: Any, chunk_size: int, episodes: Sequence[int] | None = None) -> Frames:
    """Reads a LeRobotDataset into memory, decoding every picture once.

    Args:
        source: A local folder, the id of a hub dataset, or an open `LeRobotDataset`.
        chunk_size: Actions per frame; the policy's `config.chunk_size`.
        episodes: Episodes to read; all when `None`.

    Returns:
        The frames. Memory: 3 bytes per pixel, so 12 kB per frame and camera at 64 pixels.
    """
    dataset = open_dataset(source, episodes) if isinstance(source, str | Path) else source
    meta = dataset.meta
    table = dataset.hf_dataset.with_format(None)
    episode_of_row = np.asarray(table["episode_index"])
    wanted = np.unique(episode_of_row).tolist() if episodes is None else list(episodes)
    state_of_row = torch.tensor(np.asarray(table[STATE_KEY]), dtype=torch.float32)
    action_of_row = torch.tensor(np.asarray(table[ACTION_KEY]), dtype=torch.float32)
    task_of_row = np.asarray(table["task_index"])
    text = {int(row.task_index): str(name) for name, row in meta.tasks.iterrows()}

    images: dict[str, list[Tensor]] = {key: [] for key in meta.camera_keys}
    states, actions, pads, tasks, numbers = [], [], [], [], []
    for episode in tqdm(wanted, desc=f"reading {meta.repo_id}", unit="episode", leave=False):
        rows = np.flatnonzero(episode_of_row == episode)
        length = len(rows)
        if length == 0:
            raise ValueError(
                f"`episodes` holds {episode}, which is not loaded from {meta.repo_id}. Found episodes "
                f"{sorted(set(episode_of_row.tolist()))}."
            )
        steps = torch.arange(length)[:, None] + torch.arange(chunk_size)
        states.append(state_of_row[rows])
        actions.append(action_of_row[rows][steps.clamp(max=length - 1)])
        pads.append(steps >= length)
        tasks += [text[int(index)] for index in task_of_row[rows]]
        numbers.append(torch.full((length,), episode))
        for key in meta.camera_keys:
            images[key].append(_episode_images(dataset, key, episode, rows))
    return Frames(
        images={key: torch.cat(parts) for key, parts in images.items()},
        state=torch.cat(states),
        actions=torch.cat(actions),
        action_is_pad=torch.cat(pads),
        tasks=tasks,
        episode=torch.cat(numbers),
        stats=meta.stats,
    )


def _episode_images(dataset: Any, key: str, episode: int, rows: npt.NDArray[np.int64]) -> Tensor:
    """All pictures of one camera and one episode, uint8, shape `(n, 3, height, width)`."""
    meta = dataset.meta
    if key not in meta.video_keys:
        return torch.stack([(dataset[int(row)][key] * 255).round().to(torch.uint8) for row in rows])
    from lerobot.datasets.video_utils import decode_video_frames

    # One call per episode: the decoder then runs through the file once, instead of seeking for every frame.
    start = meta.episodes[episode][f"videos/{key}/from_timestamp"]
    timestamps = [start + index / meta.fps for index in range(len(rows))]
    path = Path(dataset.root) / meta.get_video_file_path(episode, key)
    images: Tensor = decode_video_frames(path, timestamps, 0.5 / meta.fps, backend=VIDEO_BACKEND, return_uint8=True)
    return images
