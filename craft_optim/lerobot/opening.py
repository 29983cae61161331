"""LeRobotDatasets and their episodes, opened under the names that a policy knows."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_optim._paths import local
from craft_optim._warn import warn
from craft_optim.episodes import chosen_episodes
from craft_optim.lerobot.joined import JoinedDatasets

__all__ = ["MARK", "dataset_folders", "open_dataset", "readable"]

MARK = os.path.join("meta", "info.json")  # in every LeRobotDataset
# Choices of lerobot, which checks them at the first frame or never
_CHOICES = {"video_backend": ("torchcodec", "pyav", "video_reader"), "depth_output_unit": ("m", "mm")}
# Names of observations: lerobot-eval records an environment's own, its policies see these
_OF_ENVIRONMENTS = {
    "pixels": "observation.image",
    "agent_pos": "observation.state",
    "environment_state": "observation.environment_state",
}


def open_dataset(
    config: Any,
    *,
    repo_id: str | None = None,
    root: str | os.PathLike[str] | None = None,
    episodes: str | Sequence[int] | None = None,
    rename_map: Mapping[str, str] | None = None,
    revision: str | None = None,
    tolerance_s: float | None = None,
    video_backend: str | None = None,
    depth_output_unit: str | None = None,
) -> Any:
    """Opens a dataset as a policy reads it: with the actions after each frame, under the policy's names.

    Names of observations in a simulator's recording (`lerobot-eval --eval.recording=true` writes "pixels" and
    "agent_pos") become those that lerobot gives them in rollouts.

    Args:
        repo_id: Hub id of a LeRobotDataset.
        root: Folder of a local dataset; or a folder with several LeRobotDatasets at any depth, as lerobot-eval writes:
            they are read as one, in the order of their paths.
        episodes: Numbers of episodes; or text: "12" for the first 12, "[0,3,5]" for a list, "40:", "-10:", "5:20" for a
            slice as in Python. Numbers continue from one dataset to the next. None: all.
        rename_map: Name of an observation -> the policy's name for it, as lerobot's `--rename_map`.
        revision: Branch, tag or commit of a dataset on the hub. None: lerobot's choice, here and below.
        tolerance_s: Largest difference of a frame's time stamp from the video's, in seconds; 1e-4 in lerobot.
        video_backend: Reader of videos, "torchcodec" or "pyav".
        depth_output_unit: Unit of depth cameras, "m" or "mm".

    Returns:
        A LeRobotDataset; or, for several or renamed ones, an object that `anchor_batches`, `spread_frames`,
        `image_keys` and `prompts` take instead.

    Raises:
        ValueError: There is no dataset or no such episode, it cannot be read, the datasets in the folder do not fit
            together, a name is not in the dataset, or a value is none of those above.

    Example:
        dataset = open_dataset(policy.config, root="outputs/eval/recordings", episodes="-10:")
    """
    reading = _reading(tolerance_s=tolerance_s, video_backend=video_backend, depth_output_unit=depth_output_unit)
    root = None if root is None else local(root)
    found = _open_metadata(repo_id, root, revision)
    where, metas = str(root or repo_id), [meta for meta, _ in found]
    names = _names(metas[0].features, rename_map or {}, where)
    numbers = chosen_episodes(episodes, sum(meta.total_episodes for meta in metas), where)
    opened, before = [], 0
    for meta, folder in found:
        own = [number - before for number in numbers if before <= number < before + meta.total_episodes]
        before += meta.total_episodes
        if own:
            whole = len(own) == meta.total_episodes
            deltas = _delta_timestamps(config, meta, names)
            which = {"episodes": None if whole else own, "delta_timestamps": deltas, "revision": revision}
            with readable(str(folder or meta.repo_id)):
                opened.append(LeRobotDataset(meta.repo_id, root=folder, **which, **reading))
    return opened[0] if len(metas) == 1 and not names else JoinedDatasets(opened, names)


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns any error within the block into a ValueError of one line that names the unreadable object.

    lerobot reads a dataset's parts as it goes along, so a broken one may end in any error. Errors of the hub and of
    missing files are clear themselves.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if type(error).__name__ in ("ValueError", "HFValidationError") and "\n" not in str(error):
            raise
        said = " ".join(str(error).split())
        remedy = "its metadata, tables and videos may not belong together, or a file is damaged"
        if type(error).__name__ == "FrameTimestampError":
            said = said.partition(". ")[0]
            remedy = (
                "where time stamps lie beside the video's by no more than that, pass a larger `tolerance_s`, as to "
                "lerobot-train"
            )
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {said[:600]}): {remedy}.") from error


def _reading(**settings: Any) -> dict[str, Any]:
    """lerobot's arguments for reading frames, without those that are None.

    Raises:
        ValueError: lerobot does not have the value.
    """
    for name, choices in _CHOICES.items():
        if settings[name] not in (None, *choices):
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Found {name}={settings[name]!r}.")
    tolerance = settings["tolerance_s"]
    if tolerance is not None and not 0.0 < tolerance < math.inf:
        raise ValueError(f"`tolerance_s` must be seconds > 0. Found tolerance_s={tolerance!r}.")
    return {name: value for name, value in settings.items() if value is not None}


def _open_metadata(
    repo_id: str | None, root: str | os.PathLike[str] | None, revision: str | None
) -> list[tuple[Any, Any]]:
    """The datasets' metadata, each with its folder, or None on the hub; at least one has episodes."""
    if root is None and repo_id is None:
        raise ValueError("There is no dataset: pass `repo_id` or `root`.")
    folders = [] if root is None else dataset_folders(root)
    if not folders:
        if repo_id is None:
            raise ValueError(f"`root`={root} holds no LeRobotDataset: there is no {MARK} in it or below.")
        with readable(repo_id):
            found = [(LeRobotDatasetMetadata(repo_id, root=root, revision=revision), root)]
    elif revision is not None:
        raise ValueError(f"`revision` is of datasets of the hub, and `root`={root} is here. Found {revision!r}.")
    elif repo_id is not None and folders != [Path(root or "")]:
        raise ValueError(
            f"`root`={root} holds {len(folders)} LeRobotDatasets below it, the first {folders[0]}: pass it without "
            f"`repo_id` to read all, or the folder of one. Found repo_id={repo_id!r}."
        )
    else:
        found = []
        for folder in folders:
            with readable(str(folder)):
                name = repo_id or f"local/{folder.resolve().name}"
                found.append((LeRobotDatasetMetadata(name, root=folder), folder))
    empty = [str(meta.root) for meta, _ in found if not meta.total_episodes]
    if len(empty) == len(found):
        raise ValueError(
            f"{root or repo_id} has no episodes. lerobot-eval records the ones that end: an environment that is cut "
            "off at its last step must say so (truncated)."
        )
    if empty:
        warn(
            f"{len(empty)} of {len(found)} datasets in {root} have no episodes and are left out, the first {empty[0]}."
        )
    return found


def dataset_folders(root: str | os.PathLike[str]) -> list[Path]:
    """LeRobotDatasets in a folder: itself, or those below it, in the order of their paths, numbers as numbers."""
    found = []
    for folder, below, _ in os.walk(local(root)):
        if os.path.isfile(os.path.join(folder, MARK)):
            found.append(Path(folder))
            below.clear()
    return sorted(sorted(found), key=lambda path: [_number(part) for part in re.split(r"([0-9]+)", str(path))])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (0, part)


def _names(features: Mapping[str, Any], rename_map: Mapping[str, str], where: str) -> dict[str, str]:
    """Old name -> new name of the dataset's features that are renamed.

    Raises:
        ValueError: A name is not in the dataset, or two new names are equal.
    """
    bridged = {
        key: _OF_ENVIRONMENTS[key] if key in _OF_ENVIRONMENTS and _OF_ENVIRONMENTS[key] not in features else key
        for key in features
    }
    known = sorted(name for name in bridged.values() if name.startswith("observation."))
    unknown = [name for name in rename_map if name not in known]
    if unknown:
        raise ValueError(f"`rename_map` must have names of observations in {where}: {known}. Found {unknown[0]!r}.")
    new = {key: rename_map.get(name, name) for key, name in bridged.items()}
    twice = [name for name in new.values() if list(new.values()).count(name) > 1]
    if twice:
        raise ValueError(f"`rename_map` must give each observation a name of its own. Found {twice[0]!r} for two.")
    return {key: name for key, name in new.items() if key != name}


def _delta_timestamps(config: Any, meta: Any, names: Mapping[str, str]) -> dict[str, list[float]] | None:
    """lerobot's time stamps, under the policy's names."""
    old = {names.get(key, key): key for key in meta.features}
    found = resolve_delta_timestamps(config, SimpleNamespace(features=old, fps=meta.fps))
    return found and {old[key]: deltas for key, deltas in found.items()}
