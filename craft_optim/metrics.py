"""Metrics of a step, and the sinks that receive them.

`CraftOptimizer(..., on_metrics=sink)` calls `sink(metrics)` after every step that ran retention. A sink is any
callable; those here append to a file, or pass the values on to a tracker.

    log = JSONLWriter("runs/first/metrics.jsonl")
    optimizer = CraftOptimizer(base, retention, on_metrics=log)
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        log.log(loss=loss)
        optimizer.step()

`craft-optim report runs/first` draws what a `JSONLWriter` has written.
"""

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from craft_optim._paths import local

__all__ = ["METRICS", "JSONLWriter", "LogTo", "Metric", "Sink", "TensorBoardWriter"]


class Metric(NamedTuple):
    """One of the values that a step reports.

    Attributes:
        per_constraint: True if each of several constraints has its own, called "lambda/name". The value without a name
            is then that of the constraint with the largest violation.
        largest: True if the value without a name is the largest of them instead.
    """

    meaning: str
    per_constraint: bool = False
    largest: bool = False


METRICS: dict[str, Metric] = {
    "retention_loss": Metric("L_ret on this step's anchor batch", True),
    "drift": Metric("the average of L_ret over about nine passes: what epsilon is held against", True),
    "epsilon": Metric("the allowed drift at this step; with held-out anchors, of the anchors", True),
    "epsilon_heldout": Metric("with held-out anchors, the allowed drift on these", True),
    "heldout": Metric("the drift on held-out anchors that epsilon follows, when last measured", True),
    "lambda": Metric("the multiplier used in the merge", True),
    "violation": Metric("drift / epsilon", True),
    "grad_dot": Metric("<g_t, g_r>", True),
    "grad_cos": Metric("cosine between task and retention gradient", True),
    "conflict": Metric("1 if the cosine is below the threshold of conflicts", True, True),
    "projected": Metric("1 if the projection acted", True, True),
    "task_grad_norm": Metric("|g_t|"),
    "retention_grad_norm": Metric("|g_r|", True),
    "merged_grad_norm": Metric("norm of what the base optimizer stepped on"),
    "capped": Metric(
        "1 if lambda was held down: by rho K |g_t| / |g_r|, by half of that for long, or by its maximum", True, True
    ),
    "clipped": Metric("1 if max_grad_norm scaled the merged gradient"),
    "step_kept": Metric("share of the base's step that was kept: below 1 where all of it led beyond the trust region"),
    "interval": Metric("K, the steps until the next pass"),
    "skipped": Metric("retention passes so far that were not finite and left the task step alone"),
    "retention_step": Metric("the step (from 0) on which the values were measured"),
    "fresh": Metric("1 if they belong to the last step, 0 if they were kept from an earlier one"),
}


def keyed(what: str, name: str | None) -> str:
    """Name of a constraint's metric or float of the state: "what/name", or "what" if the constraint has no name."""
    return what if name is None else f"{what}/{name}"


Sink = Callable[[Mapping[str, float]], Any]
"""A function that `on_metrics` takes"""


class JSONLWriter:
    """Appends each step's metrics as one line of JSON; values that are not finite become null.

    Every row gets `time`, the seconds since 1970 at which it was written: `craft-optim report` computes from it how
    long a step took.

    Args:
        path: The file; its folder must exist. Lines are flushed one by one, so a killed run keeps them; a line that was
            cut short, by a kill or a full disk, is ended before the next.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> log = JSONLWriter(path)
        >>> log.log(loss=0.5)  # before `optimizer.step()`
        >>> log({"retention_step": 0.0, "retention_loss": math.nan})  # what the optimizer does in it
        >>> [*json.loads(path.read_text())]
        ['loss', 'retention_step', 'retention_loss', 'time']
    """

    def __init__(self, path: str | Path) -> None:
        path = local(path)
        self._file: IO[bytes] = path.open("ab", buffering=0)
        weakref.finalize(self, self._file.close)
        self._cut_short = path.is_file() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        self._waiting: dict[str, Any] = {}

    def log(self, **values: Any) -> None:
        """Adds values of your own to the next row; after several calls, the last value of each name counts.

        Args:
            values: Numbers or text. A tensor of one element is read only when its row is written: nothing waits for the
                device between rows. `loss` and `lr` have a chart in the report; rows with a `method` and a `seed` are
                grouped by them.
        """
        self._waiting |= {name: x.detach() if hasattr(x, "detach") else x for name, x in values.items()}

    def __call__(self, metrics: Mapping[str, float]) -> None:
        row = {**self._waiting, **metrics, "time": round(time.time(), 6)}
        self._waiting = {}
        line = json.dumps({name: _plain(value) for name, value in row.items()}) + "\n"
        rest = memoryview(("\n" * self._cut_short + line).encode())
        while rest:
            rest = rest[self._file.write(rest) :]
            self._cut_short = bool(rest)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _plain(value: Any) -> Any:
    """The value in a type of JSON."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoardWriter:
    """Adds each step's metrics to TensorBoard, at the step on which they were measured.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or another with its `add_scalar`. You close it.

    Example:
        `on_metrics=TensorBoardWriter(SummaryWriter("runs/first"))`
    """

    def __init__(self, writer: Any, prefix: str = "craft/") -> None:
        self._writer, self._prefix = writer, prefix

    def __call__(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["retention_step"])
        for name, value in _of_step(metrics).items():
            self._writer.add_scalar(f"{self._prefix}{name}", value, step)


class LogTo:
    """Passes each step's metrics to a function that takes a dict: W&B, trackio, MLflow, Accelerate.

    Args:
        step: Keyword of `log` for the step. None: `log` gets no step, and counts by itself.

    Example:
        - trackio: `LogTo(run.log, step="step")`
        - MLflow: `LogTo(mlflow.log_metrics, step="step")`
        - Accelerate: `LogTo(accelerator.log, step="step")`
        - W&B, whose steps end with a call of its `log`: `LogTo(functools.partial(run.log, commit=False))` lets the
          values wait for your own `run.log({"loss": loss})` and share its step.
    """

    def __init__(self, log: Callable[..., Any], prefix: str = "craft/", step: str | None = None) -> None:
        if not callable(log):
            raise TypeError(f"`log` must be a function of a dict, such as `run.log`. Found {type(log).__name__}.")
        self._log, self._prefix, self._step = log, prefix, step

    def __call__(self, metrics: Mapping[str, float]) -> None:
        keywords = {} if self._step is None else {self._step: int(metrics["retention_step"])}
        self._log({f"{self._prefix}{name}": value for name, value in _of_step(metrics).items()}, **keywords)


def _of_step(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without `fresh`, which is 1 wherever a sink is called."""
    return {name: value for name, value in metrics.items() if name != "fresh"}
