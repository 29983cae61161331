"""Run of lerobot-train with retention: wrapped optimizer, anchors built at the first step, checkpoints and reports.

The hooks of `craft_optim.lerobot.plugin` call it, in this order:

    prepare   before anything is loaded: the settings, and the source of the anchors
    wrap      the optimizer that lerobot has made of the policy's preset
    begin     before the first update: the anchors of the policy as it is then, or those that it began with; when a
              run goes on also lambda, the step, which anchors come next
    report    after every update
    save      beside lerobot's own training state
"""

import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import TRAINING_STATE_DIR
from lerobot.utils.logging_utils import AverageMeter
from lerobot.utils.random_utils import load_rng_state
from torch import nn

from craft_optim._step.constraint import Constraint
from craft_optim._warn import warn
from craft_optim.anchors import AnchorCache, AnchorRetention
from craft_optim.anchors.folders import write_aside, write_json
from craft_optim.heldout import runs_away
from craft_optim.lerobot._shared import speaks
from craft_optim.lerobot.adapters import adapter_for, kept_of
from craft_optim.lerobot.checks import check_run, check_source, check_task, find_cache, warn_of_few, warn_of_no_effect
from craft_optim.lerobot.frames import SOURCES, AnchorFrames
from craft_optim.lerobot.run_anchors import (
    RunAnchors,
    build_anchors,
    counts_of,
    heldout_folder,
    open_anchors,
    open_source,
)
from craft_optim.lerobot.settings import (
    PREFIX,
    CraftSettings,
    SettingsError,
    anchors_per_pass,
    read_settings,
    under_our_names,
)
from craft_optim.metrics import METRICS, JSONLWriter
from craft_optim.optimizer import CraftOptimizer

__all__ = ["FOLDER", "STATE_FILE", "CraftRun"]

FOLDER = "craft"
STATE_FILE = "craft.json"
_VERSION = 1
# Metrics in the console's line; others go to the trackers only
_SHOWN = {
    "drift": ("drift", ":.3g"),
    "epsilon": ("eps", ":.3g"),
    "heldout": ("held", ":.3g"),
    "epsilon_heldout": ("held_eps", ":.3g"),
    "lambda": ("lam", ":.3g"),
    "grad_cos": ("cos", ":.2f"),
}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


class _Quiet(AverageMeter):  # type: ignore[misc]  # lerobot is not typed for mypy here
    """A meter that W&B gets and the console does not."""

    def __str__(self) -> str:
        return ""


class CraftRun:
    """One run, with its state.

    Args:
        flags: Flags from `settings.own_flags`.
        complete: False if the run may resume a checkpoint, which has the other settings.

    Raises:
        SettingsError: A setting is invalid.

    Attributes:
        settings: Settings from flags and files; after `prepare` also from the checkpoint that the run resumes.
        optimizer: The CraftOptimizer; None before `wrap`.
        retention: The closure; None before `begin`.
    """

    def __init__(self, flags: Sequence[str], *, complete: bool = True) -> None:
        self.read(flags, complete=complete)
        self._forget()

    def read(self, flags: Sequence[str], *, complete: bool = True) -> None:
        """Takes other flags, for another run in this process; arguments and errors as of the class."""
        self.flags = list(flags)
        self.settings = read_settings(flags, complete=complete)
        if complete:
            check_source(self.settings.anchors)

    def _forget(self) -> None:
        """Resets the state: one process may train more than once."""
        self.optimizer: CraftOptimizer | None = None
        self.retention: AnchorRetention | None = None
        self._cfg: Any = None
        self._saved: dict[str, Any] | None = None
        self._source: AnchorFrames | None = None
        self._cache: AnchorCache | None = None
        self._anchors: RunAnchors | None = None
        self._writer: JSONLWriter | None = None
        self._ran_away = False

    # -- before the first step -----------------------------------------------------------------------------------------

    def with_statistics(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Keywords of lerobot's processor factory, without the new dataset's statistics if the old ones must stay.

        A resumed run has the processors of its checkpoint either way.
        """
        if self.settings.statistics == "dataset" or not arguments.get("pretrained_path"):
            return arguments
        changed = {key: value for key, value in arguments.items() if key != "dataset_stats"}
        for key in ("preprocessor_overrides", "postprocessor_overrides"):
            steps = changed.get(key) or {}
            changed[key] = {
                step: {name: value for name, value in own.items() if name != "stats"} for step, own in steps.items()
            }
        return changed

    def prepare(self, cfg: Any) -> None:
        """Opens the anchors or their source, so that errors in them or the settings are raised now.

        Args:
            cfg: lerobot's TrainPipelineConfig, validated.

        Raises:
            SettingsError: The run cannot be constrained, or a setting is invalid.
            ValueError: The anchors' dataset cannot be read, or does not fit the policy.
        """
        self._forget()
        self._cfg = cfg
        if cfg.resume:
            self._saved = _read_state(cfg.checkpoint_path)
        settings = self.settings = read_settings(self.flags, self._saved and self._saved["settings"])
        check_run(cfg, settings, self._saved)
        anchors = settings.anchors
        with under_our_names({"keep": "anchors.keep"}):
            keep = kept_of(cfg.policy.type, anchors.keep)
        if anchors.top_k != "auto" and keep != "logits":
            raise SettingsError(f"{PREFIX}anchors.top_k is of logits, and of {cfg.policy.type} {keep} are kept.")
        if not cfg.resume:
            check_source(anchors)
        if speaks():
            check_task(cfg, anchors)
            if self._saved is not None:
                warn_of_no_effect(read_settings([], self._saved["settings"]).anchors, anchors)
        if not cfg.resume and anchors.has_source:
            with under_our_names({name: f"anchors.{name}" for name in SOURCES}):
                self._source = open_source(anchors, cfg)
        else:
            folder, begun_with = self._folder(), None if self._saved is None else self._saved["fingerprint"]
            self._cache = find_cache(folder, begun_with, trained=cfg.resume)
        if settings.epsilon_of == "heldout":
            self._require_heldout()

    def _require_heldout(self) -> None:
        """Raises SettingsError if --craft.epsilon_of=heldout lacks held-out anchors."""
        wanted = f"{PREFIX}epsilon_of=heldout needs frames that are held out"
        if self._source is not None:
            if counts_of(self.settings.anchors, self._source)[1] == 0:
                raise SettingsError(
                    f"{wanted}, of other episodes than the anchors'. Found one episode, or one frame: take more "
                    f"({PREFIX}anchors.episodes, {PREFIX}anchors.count)."
                )
            return
        assert self._cache is not None
        folder = heldout_folder(self._cache.path)
        if not folder.is_dir():
            raise SettingsError(
                f"{wanted}, and there is no {folder}: build a cache there, of other episodes than the anchors', with "
                f"`craft-optim build-anchors`, or pass {PREFIX}epsilon_of=anchors."
            )

    def _folder(self) -> Path:
        """Folder of the anchors."""
        cfg, own = self._cfg, self.settings.anchors.path
        if self._saved is not None and own == _path_or_none(self._saved["settings"]["anchors"]["path"]):
            return _moved(self._saved, cfg.checkpoint_path)
        return own or Path(cfg.output_dir) / FOLDER / "anchors"

    def wrap(self, policy: nn.Module, base: Any) -> CraftOptimizer:
        """Wraps lerobot's optimizer under the constraint, for training.

        Args:
            policy: Policy on its device, not yet prepared by accelerate.
            base: Result of lerobot's factory.

        Raises:
            SettingsError: There are several optimizers.
            ValueError: The kept output of the policy cannot move.
        """
        cfg, settings = self._cfg, self.settings
        if isinstance(base, dict):
            raise SettingsError(
                f"craft wraps one optimizer, and {cfg.policy.type} has {len(base)} ({', '.join(base)}): leave the flag "
                "out."
            )
        adapter_for(policy, settings.anchors.keep)  # raises here, before the dataset is read
        optimizer = CraftOptimizer(base, **settings.rules(cfg.optimizer.grad_clip_norm))
        _keep_state_dicts_plain(optimizer)
        self.optimizer = optimizer
        return optimizer

    def begin(self, model: nn.Module, accelerator: Any, step: int) -> None:
        """Builds or opens the anchors, and starts or resumes retention. Collective.

        Args:
            model: Policy prepared by accelerate.
            accelerator: The `Accelerator`.
            step: Number of updates that lerobot has done.
        """
        settings, optimizer, cfg = self.settings, self.optimizer, self._cfg
        assert optimizer is not None
        model = _within(model)
        autocast = _AUTOCAST.get(accelerator.mixed_precision)
        if self._source is None:
            assert self._cache is not None
            found = open_anchors(model, self._cache)
        else:
            folder = self._folder()
            log.info("craft: building the anchors of %s in %s", cfg.policy.pretrained_path, folder)
            found = build_anchors(
                model,
                settings.anchors,
                self._source,
                folder,
                pretrained=str(cfg.policy.pretrained_path),
                device=accelerator.device,
                autocast=autocast,
            )
        self._anchors = found
        settings = self.settings = settings.for_kept(found.adapter.keep)
        size, processes = settings.batch_size or anchors_per_pass(cfg.batch_size), accelerator.num_processes
        if len(found.cache) < processes:
            raise SettingsError(f"Each process takes at least one anchor. Found {len(found.cache)} for {processes}.")
        if accelerator.is_main_process:
            warn_of_few(len(found.cache), size * processes)
        loss: dict[str, Any] = {"loss": settings.loss} if found.adapter.kind == "hidden" else {}
        self.retention = found.adapter.retention(
            model,
            found.cache,
            batch_size=min(size, len(found.cache) // processes),
            strict=not cfg.resume,
            **loss,
        )
        heldout = found.heldout if settings.epsilon_of == "heldout" else None
        optimizer.retention_closure = Constraint(
            self.retention, settings.schedule(cfg.steps), settings.controller(), heldout
        )
        if self._saved is not None:
            for group in optimizer.param_groups:
                # Another --craft.dual has other floats, which start anew
                group.update({name: value for name, value in self._saved["state"].items() if name in group})
        done = int(optimizer.param_groups[0]["craft_step"])  # less than `step` if part of the run was without craft
        optimizer.rules = replace(optimizer.rules, total_steps=done + cfg.steps - step)
        if cfg.resume:
            # lerobot restores it earlier; making the data loader draws from it
            load_rng_state(cfg.checkpoint_path / TRAINING_STATE_DIR)
        if accelerator.is_main_process:
            self._open_log(step)
            wandb = sys.modules.get("wandb")  # lerobot has started it, or nobody wants it
            if wandb is not None and wandb.run is not None:
                wandb.config.update({"craft": settings.to_dict()}, allow_val_change=True)
        log.info("craft: %s", _in_words(settings, found))

    # -- from then on --------------------------------------------------------------------------------------------------

    def report(self, tracker: Any) -> None:
        """Passes the last update's metrics to lerobot's tracker, and appends them to the log.

        Measures drift when due; collective then.
        """
        settings, optimizer, cfg = self.settings, self.optimizer, self._cfg
        assert optimizer is not None
        step = tracker.steps + 1  # lerobot counts it after this
        every = cfg.save_freq if settings.drift_every is None else settings.drift_every
        row = dict(optimizer.metrics) if optimizer.metrics.get("fresh") else {}
        if step == cfg.steps or (every > 0 and step % every == 0):
            drifts = self._drifts()
            row |= drifts
            _meter(tracker, drifts, drifts)
            log.info("craft: step %d: %s", step, _drift_in_words(drifts, optimizer.metrics))
            self._judge(drifts)
        _meter(tracker, METRICS, optimizer.metrics)
        if self._writer is not None:
            self._writer({"step": step, "loss": tracker.loss.val, "lr": tracker.lr.val, **row})
            if step == cfg.steps:
                page = Path(cfg.output_dir) / "report.html"
                log.info("craft: next: %s", shlex.join(["craft-optim", "report", str(cfg.output_dir), f"--out={page}"]))

    def _drifts(self) -> dict[str, float]:
        assert self._anchors is not None
        assert self.retention is not None
        caches = {"drift_anchors": self._anchors.cache, "drift_heldout": self._anchors.heldout}
        return {
            name: self.retention.drift(cache, self.settings.drift_anchors)
            for name, cache in caches.items()
            if cache is not None
        }

    def _judge(self, drifts: Mapping[str, float]) -> None:
        """Warns once, on one process, if drift is held only on the anchors; with epsilon_of the optimizer does."""
        assert self.optimizer is not None
        if self._writer is None or self._ran_away or "drift_heldout" not in drifts:
            return
        if self.settings.epsilon_of == "heldout":
            return
        said = runs_away(drifts["drift_anchors"], drifts["drift_heldout"], self.optimizer.metrics["epsilon"])
        if said is not None:
            self._ran_away = True
            warn(said)

    def save(self, checkpoint: Path) -> None:
        """Writes `craft.json` beside lerobot's training state; the files of lerobot are those of a plain run."""
        assert self.optimizer is not None
        assert self._anchors is not None
        path = self._anchors.cache.path.resolve()
        held = {
            "version": _VERSION,
            "settings": self.settings.to_dict(),
            "pretrained": str(self._saved["pretrained"] if self._saved else self._cfg.policy.pretrained_path),
            "anchors": str(path),
            "anchors_from_here": os.path.relpath(path, Path(checkpoint).resolve()),
            "fingerprint": self._anchors.cache.fingerprint,
            "state": {k: v for k, v in self.optimizer.param_groups[0].items() if k.startswith("craft_")},
        }
        write_json(Path(checkpoint) / TRAINING_STATE_DIR / STATE_FILE, held)

    def _open_log(self, step: int) -> None:
        file = Path(self._cfg.output_dir) / FOLDER / "metrics.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            _forget_rows_after(file, step)
        self._writer = JSONLWriter(file)


def _keep_state_dicts_plain(optimizer: CraftOptimizer) -> None:
    """Removes our floats from state dicts: lerobot's checkpoints stay exchangeable with runs without them."""

    def leave_out(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if not k.startswith("craft_")} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def put_back(of: Any, state: dict[str, Any]) -> dict[str, Any]:
        own = {k: v for k, v in of.param_groups[0].items() if k.startswith("craft_")}
        return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}

    optimizer.register_state_dict_post_hook(leave_out)
    optimizer.register_load_state_dict_pre_hook(put_back)


def _within(model: nn.Module) -> nn.Module:
    """The policy itself if its wrapper may be bypassed."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _read_state(checkpoint: Path) -> dict[str, Any] | None:
    file = Path(checkpoint) / TRAINING_STATE_DIR / STATE_FILE
    if not file.is_file():
        return None
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = held["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{file} cannot be read ({error}): resume from another checkpoint.") from error
    if version != _VERSION:
        raise SettingsError(
            f"{file} has version {version}, this craft-optim reads {_VERSION}: use the one that wrote it."
        )
    return held


def _path_or_none(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _moved(saved: Mapping[str, Any], checkpoint: Path) -> Path:
    """Folder of a checkpoint's anchors: at the same relative path, if both were moved together."""
    beside = (Path(checkpoint).resolve() / saved["anchors_from_here"]).resolve()
    return beside if beside.is_dir() else Path(saved["anchors"])


def _meter(tracker: Any, names: Mapping[str, Any], values: Mapping[str, float]) -> None:
    """Adds values to lerobot's tracker, its log line and W&B; names not shown in the line go to W&B only."""
    for name in names:
        if name not in values or math.isnan(values[name]):  # a value not yet measured would make a mean NaN
            continue
        key = f"craft/{name}"
        if key not in tracker.metrics:
            shown = _SHOWN.get(name)
            tracker.metrics[key] = AverageMeter(*shown) if shown else _Quiet(name)
        tracker.metrics[key].update(float(values[name]))


def _drift_in_words(drifts: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    words = [f"{drifts['drift_anchors']:.3g} on anchors (epsilon {metrics['epsilon']:.3g})"]
    if "drift_heldout" in drifts:
        of_these = f" (epsilon {metrics['epsilon_heldout']:.3g})" if "epsilon_heldout" in metrics else ""
        words.append(f"{drifts['drift_heldout']:.3g} on held-out ones{of_these}")
    return f"drift {', '.join(words)}"


def _in_words(settings: CraftSettings, found: RunAnchors) -> str:
    held = "none are held out" if found.heldout is None else f"{len(found.heldout)} more are held out"
    schedule = f", {settings.epsilon_schedule}" if settings.epsilon_schedule else ""
    on = " on those" if settings.epsilon_of == "heldout" else ""
    every = settings.retention_every
    return (
        f"{len(found.cache)} anchors ({found.adapter.keep}) from {found.cache.path}, {held}; epsilon "
        f"{settings.epsilon:g}{schedule}{on}, "
        f"{'as often as drift needs it' if every == 'auto' else f'every {every} step(s)'}"
    )


def _forget_rows_after(file: Path, step: int) -> None:
    """Removes rows of steps that the resumed run repeats, and a half-written last one of a killed run."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_aside(file, lambda aside: aside.write_text("".join(kept), encoding="utf-8"))
