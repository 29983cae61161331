"""Sources of a policy's anchors: datasets or a file, checked against the policy before it is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.processor import RenameObservationsProcessorStep

from craft_optim._paths import local
from craft_optim._warn import warn
from craft_optim.anchors import AnchorCache
from craft_optim.anchors.manifest import MANIFEST
from craft_optim.lerobot._shared import STATE
from craft_optim.lerobot.datasets import camera_keys
from craft_optim.lerobot.datasets import prompts as read_prompts
from craft_optim.lerobot.frames_file import FramesFile, mean_state
from craft_optim.lerobot.opening import open_dataset

__all__ = ["OF_DATASET", "SOURCES", "AnchorFrames", "keep_without_actions", "open_frames", "require_count"]

# Arguments of `open_frames`: those of the dataset, and all
OF_DATASET = (
    "repo_id", "root", "episodes", "rename_map", "revision", "tolerance_s", "video_backend", "depth_output_unit",
)  # fmt: skip
SOURCES = (*OF_DATASET, "prompts", "keep")

# Outputs of a policy that can be kept without demonstrated actions, the default first; else the prefix
_WITHOUT_ACTIONS = {"pi0_fast": ("tokens", "prefix"), "act": ("actions",), "diffusion": ()}
_SEE_ALL = ("act", "diffusion")  # the others work without a camera
_READ_NO_TASK = ("act", "diffusion")


@dataclass(frozen=True)
class AnchorFrames:
    """Source of anchors for `anchor_batches`.

    Attributes:
        dataset: A LeRobotDataset, a result of `open_dataset`, or a `FramesFile`.
        prompts: Instructions instead of the frames' own, or None.
    """

    dataset: Any
    prompts: list[str] | None
    keep: str | None


def open_frames(
    config: Any,
    preprocessor: Any,
    *,
    prompts: str | os.PathLike[str] | None = None,
    keep: str | None = None,
    **dataset: Any,
) -> AnchorFrames:
    """Frames of datasets, named as for `open_dataset`, or of a .jsonl; needs no weights of the policy.

    Args:
        **dataset: Arguments of `open_dataset`.
        prompts: A .jsonl, read as a `FramesFile` instead of a dataset; or another file with instructions for the
            dataset's frames, one per line, in turn.
        keep: Output of the policy to keep. None: depends on the policy and the frames.

    Raises:
        ValueError: There is neither or both of a dataset and a .jsonl, one of them cannot be read, or inputs of the
            policy or actions for `keep` are missing in it.
    """
    if prompts is not None and Path(prompts).suffix == ".jsonl":
        if also := [name for name in OF_DATASET if dataset.get(name) not in (None, {})]:
            raise ValueError(f"`prompts`={prompts} has its own pictures: leave out `{also[0]}`.")
        keep = keep_without_actions(config.type, keep)
        return AnchorFrames(FramesFile(prompts, config, mean_state(preprocessor)), None, keep)
    opened, where = open_dataset(config, **dataset), str(dataset.get("root") or dataset.get("repo_id"))
    _check_observations(config, preprocessor, opened, where, renamed=bool(dataset.get("rename_map")))
    if prompts is not None and config.type in _READ_NO_TASK:
        raise ValueError(f"`prompts` are instructions, and {config.type} reads none: leave them out. Found {prompts}.")
    instructions = None if prompts is None else read_prompts(prompts)
    if instructions is None and config.type not in _READ_NO_TASK and not all(x.strip() for x in read_prompts(opened)):
        warn(
            f"{where} has frames without an instruction, and {config.type} reads one: give it as `prompts`. "
            "lerobot-eval records none for environments without a task_description."
        )
    return AnchorFrames(opened, instructions, keep)


def require_count(path: str | os.PathLike[str], count: int) -> None:
    """Raises ValueError if a folder holds a finished cache with another number of anchors than requested."""
    if (local(path) / MANIFEST).is_file() and (found := len(AnchorCache.open(path))) != count:
        raise ValueError(
            f"{path} holds a finished cache of {found} anchors, and {count} were asked for: take another folder, or "
            "build it anew (--overwrite of build-anchors, or remove it)."
        )


def keep_without_actions(policy: str, keep: str | None = None) -> str:
    """Output of a policy to keep at frames without demonstrated actions.

    Args:
        keep: Requested output. None: the first possible one.

    Raises:
        ValueError: The output needs demonstrated actions.
    """
    possible = _WITHOUT_ACTIONS.get(policy, ("prefix",))
    if not possible:
        raise ValueError(
            f"Nothing can be kept of {policy} without demonstrated actions: pass a dataset, such as a recording of "
            "lerobot-eval."
        )
    if keep is None:
        return possible[0]
    if keep not in possible:
        raise ValueError(
            f"Without demonstrated actions `keep` must be one of {possible} for {policy}. Found {keep!r}: it needs a "
            "dataset, such as a recording of lerobot-eval."
        )
    return keep


def _check_observations(config: Any, preprocessor: Any, dataset: Any, where: str, *, renamed: bool) -> None:
    """Raises if the dataset lacks the policy's inputs; the rule for cameras is lerobot-train's."""
    names: dict[str, str] = {}
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            names |= step.rename_map
    features = [names.get(key, key) for key in dataset.meta.features if key.startswith("observation.")]
    there = {names.get(key, key) for key in camera_keys(dataset)} if config.image_features else set()
    wanted = set(config.image_features)
    absent, unused = sorted(wanted - there), sorted(there - wanted)
    remedy = 'Say which is which with `rename_map`, such as {"observation.images.front": "observation.images.top"}.'
    if absent and not there:
        raise ValueError(
            f"{config.type} looks at the cameras {sorted(wanted)}, {where} has none, only {sorted(features)}."
        )
    if absent and (config.type in _SEE_ALL or not wanted & there or (unused and not renamed)):
        raise ValueError(
            f"{config.type} looks at the cameras {sorted(wanted)}, {where} has {sorted(there)}: {absent[0]!r} is not "
            f"among them. {remedy}"
        )
    states = [STATE] if config.robot_state_feature else []
    if config.env_state_feature:
        states.append("observation.environment_state")
    for key in states:
        if key not in features:
            raise ValueError(f"{config.type} reads {key!r}, {where} has {sorted(features)}. {remedy}")
