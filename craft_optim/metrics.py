"""What a step reports, and where it goes.

`CraftOptimizer(..., on_metrics=sink)` calls `sink(metrics)` after every step that ran retention. A sink is any
callable; the two here append to a file.
"""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO

__all__ = ["METRICS", "CSVWriter", "JSONLWriter"]

METRICS: dict[str, str] = {
    "retention_loss": "L_ret on this step's anchor batch",
    "epsilon": "the allowed drift at this step",
    "lambda": "the multiplier used in the merge",
    "violation": "retention_loss / epsilon",
    "grad_dot": "<g_t, g_r>",
    "grad_cos": "cosine between task and retention gradient",
    "conflict": "share of blocks (1 block unless granularity says otherwise) with cosine < conflict_threshold",
    "projected": "share of blocks in which the projection acted",
    "task_grad_norm": "|g_t|",
    "retention_grad_norm": "|g_r|",
    "merged_grad_norm": "norm of what the base optimizer stepped on",
    "capped": "1 if rho |g_t| / |g_r| held lambda down",
    "clipped": "1 if max_grad_norm scaled the merged gradient",
    "skipped": "retention passes so far that were not finite and left the task step alone",
    "retention_step": "the step (from 0) on which the values were measured",
    "fresh": "1 if they belong to the last step, 0 if they were kept from an earlier one",
}


class JSONLWriter:
    """Appends each step's metrics as one line of JSON; values that are not finite become null.

    Args:
        path: The file; its folder must exist. Lines are flushed one by one, so a killed run keeps them.
    """

    def __init__(self, path: str | Path) -> None:
        self._file: IO[str] = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - stays open for the whole run

    def __call__(self, metrics: Mapping[str, float]) -> None:
        row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class CSVWriter:
    """Appends each step's metrics as one row; the header is written when the file is new.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: IO[str] = self._path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, fieldnames=list(METRICS), extrasaction="ignore")

    def __call__(self, metrics: Mapping[str, float]) -> None:
        if self._path.stat().st_size == 0:
            self._writer.writeheader()
        self._writer.writerow(metrics)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
