"""LeRobotDatasets and their episodes, opened under the names that a policy knows."""

import os
import re
from collections.abc import Mapping, Sequence
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

__all__ = ["dataset_folders", "open_dataset"]

MARK = os.path.join("meta", "info.json")  # what every LeRobotDataset has
# What lerobot-eval records are an environment's own names; its policies see these in their place
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
) -> Any:
    """A dataset as a policy reads it: with the actions that follow each frame, under the names that it knows.

    Names of observations in a simulator's recording (`lerobot-eval --eval.recording=true` writes "pixels" and
    "agent_pos") become those that lerobot gives them in rollouts.

    Args:
        repo_id: Hub id of a LeRobotDataset.
        root: Its folder, if it is local. Or a folder that holds several LeRobotDatasets, however deep below it, as
            lerobot-eval leaves them: they are read as one, in the order of their paths.
        episodes: Numbers of episodes; or text: "12" the first 12, "[0,3,5]" these, "40:", "-10:", "5:20" a part in
            Python's sense. Of several datasets they count on from one to the next. None: all.
        rename_map: Names of observations -> the policy's names for them, as lerobot's `--rename_map`.

    Returns:
        A LeRobotDataset; or, of several or under other names, what `anchor_batches`, `spread_frames`, `image_keys` and
        `prompts` take in the place of one.

    Raises:
        ValueError: There is no dataset or no such episode, the datasets in the folder do not fit together, or a name is
            none of the dataset's.

    Example:
        dataset = open_dataset(policy.config, root="outputs/eval/recordings", episodes="-10:")
    """
    root = None if root is None else local(root)
    found = _open_metadata(repo_id, root)
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
            opened.append(
                LeRobotDataset(meta.repo_id, root=folder, episodes=None if whole else own, delta_timestamps=deltas)
            )
    return opened[0] if len(metas) == 1 and not names else JoinedDatasets(opened, names)


def _open_metadata(repo_id: str | None, root: str | os.PathLike[str] | None) -> list[tuple[Any, Any]]:
    """The datasets' metadata, each with its folder, None for one of the hub; at least one has episodes."""
    if root is None and repo_id is None:
        raise ValueError("There is no dataset: pass `repo_id` or `root`.")
    folders = [] if root is None else dataset_folders(root)
    if not folders:
        if repo_id is None:
            raise ValueError(f"`root`={root} holds no LeRobotDataset: there is no {MARK} in it or below.")
        found = [(LeRobotDatasetMetadata(repo_id, root=root), root)]
    elif repo_id is not None and folders != [Path(root or "")]:
        raise ValueError(
            f"`root`={root} holds {len(folders)} LeRobotDatasets below it, the first {folders[0]}: pass it without "
            f"`repo_id` to read all, or the folder of one. Found repo_id={repo_id!r}."
        )
    else:
        found = [(LeRobotDatasetMetadata(repo_id or f"local/{x.resolve().name}", root=x), x) for x in folders]
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
    """The LeRobotDatasets in a folder: itself, or those below it, in the order of their paths, numbers as numbers."""
    found = []
    for folder, below, _ in os.walk(local(root)):
        if os.path.isfile(os.path.join(folder, MARK)):
            found.append(Path(folder))
            below.clear()
    return sorted(sorted(found), key=lambda path: [_number(part) for part in re.split(r"([0-9]+)", str(path))])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (0, part)


def _names(features: Mapping[str, Any], rename_map: Mapping[str, str], where: str) -> dict[str, str]:
    """Old -> new names of a dataset's features, those alone that change.

    Raises:
        ValueError: A name is none of the dataset's, or two would get the same.
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
    """lerobot's, which goes by the names that the policy knows."""
    old = {names.get(key, key): key for key in meta.features}
    found = resolve_delta_timestamps(config, SimpleNamespace(features=old, fps=meta.fps))
    return found and {old[key]: deltas for key, deltas in found.items()}
