"""Anchors without a robot: a file with an instruction and pictures per line, read like a dataset of frames.

    {"task": "open the drawer", "image_path": "img/0.png"}
    {"task": "push the button", "images": {"observation.images.top": "img/1.png"}, "state": [0.1, 0.2]}

Paths are relative to the file. If a policy looks at several moments, the picture stands for all, as at the beginning of
an episode. The default state is the mean in the checkpoint's statistics: the middle of the training data.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from lerobot.processor import NormalizerProcessorStep
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor  # type: ignore[import-untyped]

from craft_optim._paths import expanded, local
from craft_optim.lerobot._shared import STATE
from craft_optim.lerobot.joined import about_dataset

__all__ = ["FramesFile", "mean_state"]

_KEYS = {"task", "images", "image_path", "state", "action"}
# Modes that PIL converts to RGB bytes without a relevant loss
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True)
class _Line:
    where: str
    task: str
    pictures: Mapping[str, Path]
    state: Tensor | None


class FramesFile:
    """Frames of a file, for `anchor_batches` and `spread_frames` like a dataset's.

    All lines and the pictures' headers are checked at once; pictures are read when needed.

    Attributes:
        meta: Metadata with `features` (the cameras), `camera_keys` and `tasks`, as in a LeRobotDataset.
        hf_dataset: Table with the columns "task_index" and "episode_index"; each line is an episode.

    Args:
        path: The file, in UTF-8; each line that is not blank is a JSON object. "task" is the instruction, "images" has
            a path for some or all of the policy's cameras, the same ones in every line; "image_path" is the picture of
            the only camera; "state" is optional; "action" is not used.
        config: Config of the policy.
        state: State of lines without one, `[state]`; see `mean_state`.

    Raises:
        ValueError: The file is empty, or a line cannot be a frame of this policy; the message has the line, what was
            found and what to do.
        OSError: The file or a picture is missing.
    """

    def __init__(self, path: str | os.PathLike[str], config: Any, state: Tensor | None = None) -> None:
        self._config, path = config, local(path)
        folder = path.parent
        if config.env_state_feature is not None:
            raise ValueError(
                f"{config.type} reads the state of its environment, which {path} cannot hold: use a dataset."
            )
        numbered = [(f"{path}, line {i}", text) for i, text in enumerate(_text(path).split("\n"), 1)]
        self._lines = [_line(text, where, folder, config, state) for where, text in numbered if text.strip()]
        if not self._lines:
            raise ValueError(f"{path} is empty: write a JSON object per line, with task and images or image_path.")
        first = self._lines[0]
        self._sizes = {key: _size(file, f"{first.where}: {key}") for key, file in first.pictures.items()}
        for line in self._lines[1:]:
            if line.pictures.keys() != first.pictures.keys():
                raise ValueError(
                    f"{line.where}: every line must have the same cameras, {sorted(first.pictures)} as the first. "
                    f"Found {sorted(line.pictures)}."
                )
            for key, file in line.pictures.items():
                if (size := _size(file, f"{line.where}: {key}")) != self._sizes[key]:
                    raise ValueError(
                        f"{line.where}: every picture of {key} must have the first one's size, "
                        f"{' x '.join(map(str, self._sizes[key]))}. Found {' x '.join(map(str, size))} in {file}."
                    )
        tasks = {task: number for number, task in enumerate(dict.fromkeys(line.task for line in self._lines))}
        features = {key: {"dtype": "image", "shape": (h, w, 3)} for key, (w, h) in self._sizes.items()}
        self.meta = about_dataset(features, tasks)
        rows = {"task_index": [tasks[line.task] for line in self._lines], "episode_index": list(range(len(self)))}
        self.hf_dataset = Dataset.from_dict(rows)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        line, moments = self._lines[index], self._config.observation_delta_indices
        sample = {key: _read(file, f"{line.where}: {key}") for key, file in line.pictures.items()}
        if moments is not None and len(moments) > 1:  # a single moment of a video has no time dimension, either
            sample = {key: torch.stack([picture] * len(moments)) for key, picture in sample.items()}
        if line.state is not None:
            sample[STATE] = line.state if moments is None else torch.stack([line.state] * len(moments))
        return sample | {"task": line.task}


def mean_state(preprocessor: Any) -> Tensor | None:
    """Mean of the robot's state, `[state]`, in the statistics of a policy's preprocessor; None if they have none."""
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep) and "mean" in (step.stats or {}).get(STATE, {}):
            return torch.as_tensor(step.stats[STATE]["mean"], dtype=torch.float32).cpu()
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such.") from error


def _line(text: str, where: str, folder: Path, config: Any, state: Tensor | None) -> _Line:
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON object ({error}): write one object per line.") from error
    if not isinstance(read, dict):
        raise ValueError(f'{where} must be a JSON object such as {{"task": ..., "images": ...}}. Found {text[:80]}.')
    if unknown := sorted(read.keys() - _KEYS):
        raise ValueError(f"{where}: keys must be among {sorted(_KEYS)}. Found {unknown[0]!r}.")
    task = read.get("task")
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"{where}: task must be an instruction, a text that is not empty. Found {task!r}.")
    pictures = {key: folder / expanded(file) for key, file in _pictures(read, where, config).items()}
    return _Line(where, task, pictures, _state(read.get("state"), where, config, state))


def _pictures(read: Mapping[str, Any], where: str, config: Any) -> dict[str, str]:
    """Paths in a line, by the policy's cameras."""
    empty = [f"observation.images.empty_camera_{i}" for i in range(getattr(config, "empty_cameras", 0))]
    known = [key for key in config.image_features if key not in empty]
    if ("images" in read) == ("image_path" in read):
        raise ValueError(f"{where}: pass images or image_path, one of them. Found {sorted(read)}.")
    if "image_path" in read:
        if len(known) != 1:
            raise ValueError(
                f"{where}: image_path is for policies with one camera, this one has {known}: write "
                f'"images": {{{known[0] if known else "camera"!r}: path, ...}} instead.'
            )
        images: Any = {known[0]: read["image_path"]}
    else:
        images = read["images"]
    if not isinstance(images, dict) or not images or not all(isinstance(x, str) and x for x in images.values()):
        raise ValueError(f"{where}: images must have a path for each camera of {known}. Found {images!r}.")
    if unknown := [key for key in images if key not in known]:
        raise ValueError(f"{where}: the policy has the cameras {known}. Found {unknown[0]!r}.")
    absent = [key for key in known if key not in images]
    if absent and config.type in ("act", "diffusion"):
        raise ValueError(f"{where}: {config.type} needs a picture of every camera, {known}, has none of {absent[0]!r}.")
    return dict(images)


def _state(found: Any, where: str, config: Any, otherwise: Tensor | None) -> Tensor | None:
    feature = config.robot_state_feature
    if feature is None:
        if found is not None:
            raise ValueError(f"{where}: {config.type} reads no state: leave it out. Found {found!r}.")
        return None
    if found is None:
        if otherwise is None:
            raise ValueError(
                f"{where} has no state, and the checkpoint no statistics of which the mean could stand for it: write "
                f"the robot's state, {feature.shape[0]} numbers."
            )
        return otherwise
    numbers = isinstance(found, list) and all(type(x) in (int, float) and abs(x) < 1e30 for x in found)
    if not numbers or len(found) != feature.shape[0]:
        raise ValueError(f"{where}: state must be a list of {feature.shape[0]} finite numbers. Found {found!r}.")
    return torch.tensor(found, dtype=torch.float32)


def _size(file: Path, where: str) -> tuple[int, int]:
    """Width and height from the picture's header alone."""
    try:
        with Image.open(file) as image:
            turned = image.format == "JPEG" and image.getexif().get(_ORIENTATION, 1) != 1
            mode, size = image.mode, image.size
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: there is no file {file}. Paths are relative to the .jsonl.") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {file} is no picture that can be read ({error}).") from error
    if mode not in _MODES:
        raise ValueError(f"{where}: pictures must have 8 bits per colour. Found mode {mode!r} in {file}: convert it.")
    if turned:
        raise ValueError(f"{where}: {file} is stored turned, with a note on how to show it: save it upright.")
    return size


def _read(file: Path, where: str) -> Tensor:
    """The picture `[3, height, width]` in [0, 1]."""
    try:
        with Image.open(file) as image:
            pixels: Tensor = to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{where}: {file} cannot be read ({error}): copy it anew.") from error
    return pixels
