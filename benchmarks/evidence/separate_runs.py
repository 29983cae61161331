"""Runs of a benchmark, each a process of its own and a JSON file; those that are there are not made again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["finished", "make_unless_done", "side_by_side"]


def make_unless_done(script: Path, file: Path, settings: Mapping[str, Any], flags: Mapping[str, object]) -> None:
    """Makes a run in a process of its own, whose memory is the run's, unless its file is there.

    Args:
        script: What makes it.
        file: What it writes: a JSON with its `settings`.
        settings: What a run must have been made with.
        flags: Its command line; those of None are left out.

    Raises:
        ValueError: The file is there, with other settings.
        CalledProcessError: The run failed.
    """
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))["settings"]
        if found != settings:
            raise ValueError(f"{file} is of other settings, {found}: pass these, or another --results.")
        print(f"{file.stem}: done before", flush=True)
        return
    options = [f"--{key}={value}" for key, value in flags.items() if value is not None]
    subprocess.run([sys.executable, script, *options], check=True)


def side_by_side(jobs: Iterable[Callable[[], object]], workers: int) -> None:
    """Calls all of these, so many at a time, and in their order.

    Raises:
        Exception: As the first that failed, after all have ended.
    """
    with ThreadPoolExecutor(workers) as pool:
        made = [pool.submit(job) for job in jobs]
    for job in made:
        job.result()


def finished(folder: Path) -> list[dict[str, Any]]:
    """The runs that are in a folder."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
