"""Settings of a training run with retention: a file, flags `--craft.<name>=<value>`, or both."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import draccus
import yaml
from draccus.utils import DraccusException

from craft_optim._paths import local
from craft_optim._step.rules import Rules
from craft_optim.anchors.kept import TopK, top_k_of
from craft_optim.dual import Controller, make_controller
from craft_optim.episodes import parse_episodes
from craft_optim.schedules import Cosine, Exponential, Linear, Schedule, as_schedule

__all__ = [
    "PREFIX",
    "AnchorSettings",
    "CraftSettings",
    "SettingsError",
    "anchors_per_pass",
    "own_flags",
    "read_settings",
    "setting_names",
    "under_our_names",
    "without_flags",
]

PREFIX = "--craft."
# Descriptions of valid values by type
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list[str]: "a list, such as [8, 16]",
    dict[str, str]: 'names for names, such as {"observation.image": "observation.images.top"}',
}
# Fields that the run sets
_FROM_LEROBOT = ("total_steps",)
_SCHEDULES: dict[str, Any] = {"linear": Linear, "cosine": Cosine, "exponential": Exponential}


# By what is kept, by docs/vla_benchmark.md. Logits: at 0.05 the new task was learned less and none of the old ones kept
# better. Actions: at 0.05 an old task fell to 0.5 and at 0.1 to 0, with none of the new one gained. Hidden states of a
# prefix: where the old task was kept in the demo.
_EPSILON = {"logits": 0.1, "tokens": 0.1, "actions": 0.01, "prefix": 0.005}


class SettingsError(ValueError):
    """A setting is invalid; the message has its name and the remedy."""


def anchors_per_pass(batch_size: int) -> int:
    """Anchors per pass and process without a setting: `min(batch_size, max(batch_size // 2, 8))`.

    By docs/vla_benchmark.md: at batches of 16, half as many anchors keep about as much and cost less. Never more than
    the batch, which may be all that memory holds.
    """
    return min(batch_size, max(batch_size // 2, 8))


@dataclass(frozen=True)
class AnchorSettings:
    """Examples of what the policy must keep.

    Attributes:
        path: Folder of the cache, opened if it exists, else built. None: `craft/anchors` in the output folder.
        repo_id: LeRobotDataset with the anchors, such as the old task's.
        root: Folder of a local dataset, or of several, such as the recordings of lerobot-eval.
        episodes: Episodes to use: "12" the first twelve, "[0, 3]" a list, "40:" or "-10:" a slice as in Python. None:
            all.
        prompts: A .txt with instructions for the frames, or a .jsonl with instructions and pictures instead of a
            dataset.
        rename_map: Name of a dataset's observation -> the policy's name, where they differ.
        revision: Branch, tag or commit of a dataset on the hub. None: the training's, if that is the same dataset.
        tolerance_s: Largest difference of a frame's time stamp from the video's, in seconds. None, here and in the next
            two: the training's.
        video_backend: Reader of videos, "torchcodec" or "pyav".
        depth_output_unit: Unit of depth cameras, "m" or "mm".
        count: Largest number of frames in all, including held-out ones, spread over tasks and episodes. None: all.
        keep: Output to keep: "logits", "tokens", "actions" or "prefix", see `craft_optim.lerobot.adapters`. None:
            depends on the policy.
        layers: Hidden states to keep instead of the adapter's; numbers or names of modules.
        top_k: Number of likeliest classes to keep; "all"; or "auto": all up to 4,096 classes, else 64.
        dtype: Dtype on disk: "float16", "bfloat16" or "float32".
        batch_size: Frames per forward of the teacher.
        workers: Processes that read frames ahead while the cache is built.
        heldout: Share of the episodes, and of `count`, to hold out: drift on these frames is reported beside the
            anchors'. 0: none.
    """

    path: Path | None = None
    repo_id: str | None = None
    root: Path | None = None
    episodes: str | None = None
    prompts: Path | None = None
    rename_map: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    tolerance_s: float | None = None
    video_backend: str | None = None
    depth_output_unit: str | None = None
    count: int | None = 1024  # with three cameras of 640 x 480 an anchor of pi0_fast is 2.8 MB, most of it pictures
    keep: str | None = None
    layers: list[str] | None = None
    top_k: TopK = "auto"
    dtype: str = "float16"
    batch_size: int = 16
    workers: int = 0
    heldout: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Path):
                object.__setattr__(self, name, local(value))

    @property
    def has_source(self) -> bool:
        """True if these settings name a source of anchors, besides a finished cache."""
        return bool(self.repo_id or self.root or self.is_file)

    @property
    def is_file(self) -> bool:
        """True if the frames come from a .jsonl."""
        return self.prompts is not None and self.prompts.suffix == ".jsonl"

    def check(self) -> None:
        """Raises SettingsError for settings that are wrong whatever the policy and the dataset."""
        if not 0.0 <= self.heldout < 1.0:
            raise SettingsError(f"{PREFIX}anchors.heldout must be in [0, 1). Found {self.heldout}.")
        if self.layers is not None and self.keep != "prefix":
            raise SettingsError(
                f"{PREFIX}anchors.layers needs {PREFIX}anchors.keep=prefix: logits and actions are what comes out of "
                f"the last layer. Found keep={self.keep}."
            )
        if self.top_k != "auto" and self.keep not in (None, "logits"):
            raise SettingsError(f"{PREFIX}anchors.top_k needs {PREFIX}anchors.keep=logits. Found keep={self.keep}.")
        with under_our_names({"top_k": "anchors.top_k"}):
            top_k_of(self.top_k)
        if self.episodes is not None:
            with under_our_names({"episodes": "anchors.episodes"}):
                parse_episodes(self.episodes)


@dataclass(frozen=True)
class CraftSettings(Rules):
    """Settings of one run: the fields of `craft_optim.Rules`, except `total_steps` (lerobot's `steps`); and these.

    Attributes:
        epsilon: The allowed drift; the end of a schedule. In nats for logits and tokens, in shares of the teacher's
            variance for actions and hidden states. None: 0.1 for logits and tokens, 0.01 for actions, 0.005 for hidden
            states of a prefix.
        epsilon_of: Frames whose drift epsilon bounds: "anchors" or "heldout", see `craft_optim.Constraint`.
        epsilon_schedule: Schedule of epsilon: "linear", "cosine" or "exponential". None: a constant.
        epsilon_start: Epsilon at the start of a schedule.
        epsilon_steps: Length of a schedule in steps. None: half of the training.
        dual: Controller of lambda: "pi", "ascent", "nupi" or "augmented_lagrangian".
        lambda_init: lambda at the start. None, here and in the next two: the controller's default.
        lambda_lr: Gain of the integral or ascent term.
        lambda_max: Upper bound of lambda; "pi" has none but `rho`.
        max_grad_norm: Cap on the norm of the merged gradient. None: the clipping of the policy's optimizer.
        batch_size: Anchors per step and process. None: half of the training's batch size, at least 8, and at
            most all of it.
        loss: Distance of hidden states and actions: "mse", "cosine" or "l1".
        statistics: Normalisation in training and in the checkpoint: the new "dataset"'s, as without this package, or
            the "pretrained" policy's, so that one checkpoint serves old and new tasks.
        drift_every: Steps between measurements of drift on anchors and held-out frames; also measured at the end. None:
            as often as lerobot saves. 0: only at the end.
        drift_anchors: Number of each to measure on, evenly spaced.
        anchors: The anchors, see `AnchorSettings`.
    """

    epsilon: float | None = None
    epsilon_of: str = "anchors"
    epsilon_schedule: str | None = None
    epsilon_start: float | None = None
    epsilon_steps: int | None = None
    dual: str = "pi"
    lambda_init: float | None = None
    lambda_lr: float | None = None
    lambda_max: float | None = None
    batch_size: int | None = None
    loss: str = "mse"
    statistics: str = "dataset"
    drift_every: int | None = None
    drift_anchors: int = 256
    anchors: AnchorSettings = field(default_factory=AnchorSettings)

    def check(self) -> None:
        """Raises SettingsError for settings that are wrong whatever the policy and the dataset."""
        choices: dict[str, tuple[object, ...]] = {
            "epsilon_of": ("anchors", "heldout"),
            "epsilon_schedule": (None, *_SCHEDULES),
            "statistics": ("dataset", "pretrained"),
            "loss": ("mse", "cosine", "l1"),
            "anchors.dtype": ("float16", "bfloat16", "float32"),
            "anchors.keep": (None, "logits", "tokens", "actions", "prefix"),
        }
        for name, allowed in choices.items():
            found = attrgetter(name)(self)
            if found not in allowed:
                known = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise SettingsError(f"{PREFIX}{name} must be one of {known}. Found {found}.")
        for name, least in {
            "batch_size": 1, "epsilon_steps": 1, "drift_every": 0, "drift_anchors": 1, "anchors.count": 1,
            "anchors.batch_size": 1, "anchors.workers": 0,
        }.items():  # fmt: skip
            found = attrgetter(name)(self)
            if found is not None and found < least:
                raise SettingsError(f"{PREFIX}{name} must be a whole number >= {least}. Found {found}.")
        if (self.epsilon_schedule is None) != (self.epsilon_start is None):
            raise SettingsError(
                f"{PREFIX}epsilon_schedule and {PREFIX}epsilon_start belong together: pass both, or neither. Found "
                f"{self.epsilon_schedule} and {self.epsilon_start}."
            )
        with under_our_names({"epsilon": "epsilon", "start": "epsilon_start", "end": "epsilon"}):
            as_schedule(self.for_kept("logits").schedule(2))
        gains = dict.fromkeys(("ki", "learning_rate"), "lambda_lr")
        named = {"dual": "dual", "initial": "lambda_init", "maximum": "lambda_max", "rho": "rho", **gains}
        with under_our_names(named):
            self.controller()
        self.anchors.check()
        if self.epsilon_of == "heldout" and self.anchors.has_source and self.anchors.heldout == 0.0:
            raise SettingsError(
                f"{PREFIX}epsilon_of=heldout needs frames that are held out. Found {PREFIX}anchors.heldout=0: take a "
                "share, such as 0.1."
            )

    def for_kept(self, keep: str) -> "CraftSettings":
        """The same with an epsilon: the default for an adapter's `keep`, if there is none."""
        return self if self.epsilon is not None else replace(self, epsilon=_EPSILON[keep])

    def schedule(self, steps: int) -> float | Schedule:
        """`epsilon` for `CraftOptimizer`, for a training of that many steps."""
        assert self.epsilon is not None, "see for_kept"
        if self.epsilon_schedule is None:
            return self.epsilon
        length = self.epsilon_steps or max(1, steps // 2)
        made: Schedule = _SCHEDULES[self.epsilon_schedule](self.epsilon_start, self.epsilon, length)
        return made

    def controller(self) -> Controller:
        """Controller from `dual` and the three settings of lambda."""
        return make_controller(self.dual, initial=self.lambda_init, gain=self.lambda_lr, maximum=self.lambda_max)

    def rules(self, clip: float) -> dict[str, Any]:
        """The fields of `Rules`, as keywords of `CraftOptimizer`.

        Args:
            clip: Norm that lerobot clips task gradients to, before the step; 0 for none. The merge comes after it.
        """
        held = {f.name: getattr(self, f.name) for f in fields(Rules)}
        return held | {"max_grad_norm": self.max_grad_norm or (clip if clip > 0 else None)}

    def to_dict(self) -> dict[str, Any]:
        """The settings in the types of JSON."""
        encoded: dict[str, Any] = draccus.encode(self)
        return {name: value for name, value in encoded.items() if name not in _FROM_LEROBOT}


def own_flags(arguments: Sequence[str]) -> list[str]:
    """The `--craft.*` flags of a command line without prefix, and without the one that names a package to load."""
    return [f"--{name.removeprefix(PREFIX)}={value}" for name, value in _flags(arguments)[0]]


def without_flags(arguments: Sequence[str]) -> list[str]:
    """A command line without its `--craft.*` flags."""
    return _flags(arguments)[1]


def _flags(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    ours, rest, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = f"--{name[2:].replace('-', '_')}"  # both are the same in all our commands
        if not equals:
            # As lerobot reads flags: the next word is the value, unless it is a flag itself
            if not waiting or waiting[0].startswith("--"):
                raise SettingsError(f"{name} has no value: write {name}=VALUE.")
            value = waiting.pop(0)
        if not name.endswith("discover_packages_path"):
            ours.append((name, value))
    return ours, rest


def read_settings(
    arguments: Sequence[str], saved: Mapping[str, Any] | None = None, *, complete: bool = True
) -> CraftSettings:
    """The settings of a run: flags first, then the file, then what a checkpoint holds, then the defaults.

    Args:
        arguments: Flags from `own_flags`, `--config=FILE` among them: YAML or JSON, with the names of `CraftSettings`,
            at its top or under "craft".
        saved: Result of `CraftSettings.to_dict` from the run that is resumed.
        complete: False if other settings will follow: combinations are not checked yet.

    Raises:
        SettingsError: A file or name does not exist, or a value is invalid.
    """
    merged: dict[str, Any] = {}
    _merge(merged, copy.deepcopy(dict(saved or {})))
    named = [flag.partition("=")[2] for flag in arguments if flag.startswith("--config=")]
    file = named[-1] if named else None
    if file:
        _merge(merged, _read_file(local(file)))
    for flag in arguments:
        name, _, text = flag.removeprefix("--").partition("=")
        if name != "config":
            value = _value(name, text)
            for part in reversed(name.split(".")):
                value = {part: value}
            _merge(merged, value)
    anchors = merged.get("anchors")
    if isinstance(anchors, dict) and isinstance(anchors.get("episodes"), int | list):  # as a file may have it
        anchors["episodes"] = str(anchors["episodes"])
    with under_our_names({rule.name: rule.name for rule in fields(Rules)}):
        settings: CraftSettings = _made(CraftSettings, merged)
    if complete:
        settings.check()
    return settings


def _made(kind: Any, values: Any, place: str = "") -> Any:
    """An object of one of the classes above; each value is checked by itself."""
    if not isinstance(values, Mapping):
        raise SettingsError(f"{PREFIX}{place.rstrip('.')} must hold names and values. Found {values!r}.")
    types, made = _types(kind), {}
    for name, value in values.items():
        where = f"{PREFIX}{place}{name}"
        if name not in types:
            raise _unknown(f"{place}{name}")
        of = types[name]
        choices = get_args(of) if get_origin(of) in (Union, UnionType) else (of,)
        wanted = [one for one in choices if one is not NoneType]
        if is_dataclass(of):
            made[name] = _made(of, value, f"{place}{name}.")
            continue
        try:
            if (isinstance(value, bool) and bool not in wanted) or (value is None and NoneType not in choices):
                raise TypeError
            made[name] = draccus.decode(of, value)
        except (DraccusException, TypeError, ValueError, AttributeError) as error:
            raise SettingsError(
                f"{where} must be {' or '.join(map(_in_words, wanted))}. Found "
                f"{'null' if value is None else repr(value)}."
            ) from error
    return kind(**made)


def _in_words(kind: Any) -> str:
    """Description of a type's valid values."""
    if get_origin(kind) is not Literal:
        return _KINDS[kind]
    names = get_args(kind)
    return f"one of {', '.join(names)}" if len(names) > 1 else f"{names[0]!r}"


def _types(kind: Any) -> dict[str, Any]:
    """Name -> type of each setting in one of the classes above."""
    return {name: of for name, of in get_type_hints(kind).items() if name not in _FROM_LEROBOT}


@contextmanager
def under_our_names(names: Mapping[str, str]) -> Iterator[None]:
    """Makes the library's errors about a value name its flag, within the block.

    Args:
        names: Name in the library -> name of the setting.
    """
    try:
        yield
    except SettingsError:
        raise
    except ValueError as error:
        said = str(error)
        for name, flag in names.items():
            said = said.replace(f"`{name}`", f"{PREFIX}{flag}").replace(f" {name}=", f" {PREFIX}{flag}=")
        raise SettingsError(said) from error


def _value(name: str, text: str) -> Any:
    """The value of a flag's text: YAML, except for texts and paths."""
    kind: Any = CraftSettings
    for part in name.split("."):
        fields = _types(kind) if is_dataclass(kind) else {}
        if part not in fields:
            raise _unknown(name)
        kind = fields[part]
    if text in ("", "null", "None"):
        return None
    if {str, Path} & {kind, *get_args(kind)} and get_origin(kind) is not dict:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{PREFIX}{name}={text} cannot be read: {error}") from error


def _unknown(name: str) -> SettingsError:
    known = get_close_matches(name, setting_names(), 3) or setting_names()
    return SettingsError(f"There is no {PREFIX}{name}. Known: {', '.join(PREFIX + other for other in known)}.")


def setting_names(kind: Any = CraftSettings) -> list[str]:
    """The names of all settings, without their prefix, in the order in which they are declared."""
    names = []
    for name, of in _types(kind).items():
        names += [f"{name}.{inner}" for inner in setting_names(of)] if is_dataclass(of) else [name]
    return names


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"There is no file {str(path)!r}: {PREFIX}config names it.")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(read, dict):
        raise SettingsError(f"{path} must hold names and values. Found {type(read).__name__}.")
    inner = read.get("craft", read)
    return inner if isinstance(inner, dict) else read


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
