"""Checks of a training run, before its policy and its data are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import NormalizationMode
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import CHECKPOINTS_DIR

from craft_optim._warn import warn
from craft_optim.anchors import AnchorCache
from craft_optim.anchors.manifest import MANIFEST, PROGRESS
from craft_optim.episodes import parse_episodes
from craft_optim.lerobot.frames import OF_DATASET
from craft_optim.lerobot.opening import MARK, dataset_folders
from craft_optim.lerobot.settings import PREFIX, AnchorSettings, CraftSettings, SettingsError

__all__ = [
    "check_quantiles",
    "check_run",
    "check_source",
    "check_task",
    "find_cache",
    "warn_of_few",
    "warn_of_no_effect",
]

_SOURCES = f"{PREFIX}anchors.repo_id or {PREFIX}anchors.root (a LeRobotDataset), {PREFIX}anchors.prompts (a .jsonl)"
# Quantiles that a normalisation divides by
_QUANTILES = {NormalizationMode.QUANTILES: ("q01", "q99"), NormalizationMode.QUANTILE10: ("q10", "q90")}
_NO_WIDTH = 1e-6
_FEW = 64  # with this many the held-out drift in docs/choosing.md is 19 times epsilon


def check_run(cfg: Any, settings: CraftSettings, saved: Mapping[str, Any] | None) -> None:
    """Raises SettingsError unless the run trains a policy, and its anchors are defined.

    Args:
        cfg: lerobot's TrainPipelineConfig, validated.
        saved: Retention's record in the checkpoint that the run resumes; None if there is none.
    """
    if cfg.is_reward_model_training:
        raise SettingsError("craft constrains policies, and this run trains a reward model: leave the flag out.")
    if cfg.resume:
        at, home = Path(cfg.checkpoint_path).absolute(), Path(cfg.output_dir).absolute()
        inside = at.is_relative_to(home) or at.resolve().is_relative_to(home.resolve())  # folders may be links
        if not inside and (home / CHECKPOINTS_DIR).is_dir():
            raise SettingsError(
                f"The checkpoint {cfg.checkpoint_path} is not in the folder that this run would go on in, "
                f"{cfg.output_dir}, where there is a run: its checkpoints and the rows of its log would be replaced. "
                f"Pass --output_dir={at.parents[1]}, or a new folder."
            )
        if saved is None and settings.anchors.path is None:
            raise SettingsError(
                f"The checkpoint {cfg.checkpoint_path} was made without craft: it does not say where anchors of the "
                "pretrained policy are, and of a policy that has been trained they cannot be made. Make them of the "
                f"pretrained one, `craft-optim build-anchors FOLDER --policy.path=PRETRAINED "
                f"--dataset.repo_id=OLD_TASK`, and pass {PREFIX}anchors.path=FOLDER."
            )
        return
    if cfg.policy.pretrained_path is None:
        raise SettingsError(
            "craft keeps what a pretrained policy can do, and this one begins with random weights: pass --policy.path."
        )


def check_source(anchors: AnchorSettings) -> None:
    """Raises SettingsError unless a new run's anchors or their local source exist; does not ask the hub."""
    if not anchors.has_source:
        if anchors.path is None:
            raise SettingsError(
                "craft needs examples of what the policy must keep, usually of the tasks that it can do now: pass "
                f"{_SOURCES}, or {PREFIX}anchors.path (a cache)."
            )
        find_cache(anchors.path)
    elif anchors.path is not None and anchors.path.is_file():
        raise SettingsError(f"{PREFIX}anchors.path must be a folder. Found {anchors.path}, which is a file.")
    if anchors.prompts is not None and not anchors.prompts.is_file():
        raise SettingsError(f"{PREFIX}anchors.prompts must be a file. Found {anchors.prompts}, which is none.")
    also = [name for name in OF_DATASET if getattr(anchors, name) not in (None, {})]
    if anchors.is_file and also:
        raise SettingsError(
            f"{PREFIX}anchors.prompts={anchors.prompts} has pictures of its own: leave out {PREFIX}anchors.{also[0]}."
        )
    if anchors.root is not None and anchors.repo_id is None and not dataset_folders(anchors.root):
        there = "there is no such folder" if not anchors.root.is_dir() else f"there is no {MARK} in it or below"
        raise SettingsError(f"{PREFIX}anchors.root must hold a LeRobotDataset. Found {anchors.root}: {there}.")


def find_cache(folder: Path, begun_with: str | None = None, *, trained: bool = False) -> AnchorCache:
    """The finished cache in a folder.

    Args:
        begun_with: Fingerprint of the cache's teacher, if known.
        trained: True if the policy has been trained: its anchors cannot be built any more.

    Raises:
        SettingsError: There is none, or it has another teacher.
        AnchorCacheError: The cache is damaged.
    """
    if trained and not folder.is_dir():
        raise SettingsError(
            f"There are no anchors in {folder}. They cannot be made anew of a policy that has been trained: pass "
            f"{PREFIX}anchors.path=FOLDER, where they are now, or make them of the pretrained policy with "
            "`craft-optim build-anchors`."
        )
    if not (folder / MANIFEST).is_file():
        build = "" if trained else f"; or, to build one there, name its source, too: {_SOURCES}"
        if (folder / PROGRESS).is_file():
            raise SettingsError(
                f"{PREFIX}anchors.path must be a finished cache. Found {folder}, which is half built: run the command "
                f"that built it again, it goes on where it stopped{build}."
            )
        found = "has none in it" if folder.is_dir() else "is no folder"
        raise SettingsError(
            f"{PREFIX}anchors.path must be a cache of anchors, as `craft-optim build-anchors` makes one. Found "
            f"{folder}, which {found}: correct the path{build}."
        )
    cache = AnchorCache.open(folder)
    if begun_with is not None and cache.fingerprint != begun_with:
        raise SettingsError(
            f"The anchors in {folder} are not those that this run began with: their teacher's fingerprint is "
            f"{cache.fingerprint}, the checkpoint says {begun_with}. Pass {PREFIX}anchors.path=FOLDER, where they are."
        )
    return cache


def warn_of_few(anchors: int, batch: int) -> None:
    """Warns of too few anchors, which hold little but themselves.

    Args:
        anchors: Number of anchors to train on.
        batch: Number of anchors per step, on all processes together.
    """
    if anchors >= max(_FEW, batch):
        return
    less = f", less than the {batch} of one step" if anchors < batch else ""
    warn(
        f"There are {anchors} anchors{less}. So few hold little but themselves: on other frames of the old task the "
        f"policy may drift as if there were none. Take hundreds ({PREFIX}anchors.count, {PREFIX}anchors.episodes), and "
        "watch the held-out drift."
    )


def warn_of_no_effect(begun_with: AnchorSettings, now: AnchorSettings) -> None:
    """Warns of settings that would make other anchors in a resumed run, which keeps its anchors."""
    changed = [x.name for x in fields(now) if x.name != "path" and getattr(begun_with, x.name) != getattr(now, x.name)]
    if changed:
        names = ", ".join(f"{PREFIX}anchors.{name}" for name in changed)
        warn(f"The run goes on with the anchors that it began with: {names} changes nothing any more.")


def check_task(cfg: Any, anchors: AnchorSettings) -> None:
    """Warns if the policy is trained on frames that are its anchors."""
    data = cfg.dataset
    same_root = anchors.root is not None and data.root is not None and _same_folder(anchors.root, data.root)
    same_name = anchors.repo_id is not None and anchors.repo_id == data.repo_id and anchors.root is None is data.root
    if not (same_root or same_name) or not _share_episodes(anchors.episodes, data.episodes):
        return
    warn(
        f"The anchors are frames of the dataset that the policy is trained on, {data.root or data.repo_id}: there the "
        "constraint holds it to what it did before, and keeps it from learning. Take anchors of what it must keep: "
        f"another dataset ({PREFIX}anchors.repo_id, {PREFIX}anchors.root) or other episodes of this one "
        f"({PREFIX}anchors.episodes). If these are old episodes that you replay among the new ones, all is well."
    )


def _same_folder(one: Path, other: Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _share_episodes(anchors: str | None, trained: Sequence[int] | None) -> bool:
    """True if both surely share episodes; slices counted from the end are unknown yet."""
    if anchors is None or trained is None:
        return True
    wanted = parse_episodes(anchors)
    if isinstance(wanted, int):
        wanted = slice(wanted)
    if isinstance(wanted, slice):
        if min(wanted.start or 0, wanted.stop or 0, wanted.step or 1) < 0:
            return False
        wanted = list(range(max(trained) + 1)[wanted])
    return bool(set(wanted) & set(trained))


def check_quantiles(preprocessor: Any) -> None:
    """Warns of dimensions that a policy's normalisation divides by almost zero.

    lerobot's quantiles of a dataset are means over its episodes' quantiles. For values that are constant within
    episodes but differ between them, all quantiles may be one number, which does not measure the width.
    """
    for step in preprocessor.steps:
        if not isinstance(step, NormalizerProcessorStep):
            continue
        for key, feature in step.features.items():
            low, high = _QUANTILES.get(step.norm_map.get(feature.type), (None, None))
            stats = (step.stats or {}).get(key, {})
            if low is None or not {low, high, "min", "max"} <= stats.keys():
                continue
            least, q_low, q_high, most = (
                torch.as_tensor(stats[name]).double().flatten() for name in ("min", low, high, "max")
            )
            width = (q_high - q_low).abs()
            flat = (width < _NO_WIDTH) & (most - least > 100.0 * width)  # not if all values are that small
            if flat.any():
                places = flat.nonzero().flatten().tolist()
                warn(
                    f"{key!r} is normalised by its quantiles {low} and {high}, which are the same number in dimensions "
                    f"{places}, although its values are not: there the policy sees, or is taught, numbers divided by "
                    "1e-8. lerobot averages quantiles over episodes, and these dimensions hardly move within one: "
                    "leave them out, or correct the quantiles in the dataset's meta/stats.json."
                )
