"""Many runs in several processes, each done once: what is finished is read."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import joblib
import numpy
import sklearn
import torch
from tqdm.auto import tqdm

import craft_optim

from .prepared import SETTINGS, prepare
from .training import Record

__all__ = ["WORK", "Runnable", "run_all", "store", "versions", "with_runs"]

WORK = Path(".benchmarks") / "pareto"  # finished runs, of all commands
_HERE = Path(__file__).parent
_OF_RUNS = ("setting", "digits", "characters", "prepared", "methods", "training")


class Runnable(Protocol):
    """A hashable description of one run, `training.Job` for example.

    Attributes:
        setting: Of `SETTINGS`, which is pretrained first; or anything else, of which nothing is.
        seed: Of pretraining.
        name: In the name of its file.
    """

    @property
    def setting(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def name(self) -> str: ...


Of = TypeVar("Of", bound=Runnable)


def store(work: Path, *more: str) -> Path:
    """The folder for runs of these sources: any change in them, in craft_optim or torch leads to another one.

    Args:
        work: Where the folder is.
        more: Modules beside those that all runs depend on, seen from their folder.
    """
    package = Path(craft_optim.__file__).parent
    files = [_HERE / f"{name}.py" for name in (*_OF_RUNS, *more)] + sorted(package.rglob("*.py"))
    digest = hashlib.sha256(f"{torch.__version__} {platform.python_version()}".encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = work / digest.hexdigest()[:12]
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    return folder


def run_all(
    jobs: Iterable[Of], folder: Path, processes: int, function: Callable[[Of, Path], Record], about: str
) -> list[Record]:
    """Runs jobs that are not done yet, and returns their records in order; jobs that occur twice are run once.

    Args:
        jobs: What to run.
        folder: Of `store`.
        processes: At the same time, each with one thread.
        function: Runs a job, given a folder for pretrained networks. One that a module has: it is sent by name.
        about: A word for the progress bar.
    """
    jobs = list(dict.fromkeys(jobs))
    missing = [job for job in jobs if not _file(folder, job).is_file()]
    starts = list(dict.fromkeys((job.setting, job.seed) for job in missing if job.setting in SETTINGS))
    _in_turn(_prepare, [(*start, folder) for start in starts], processes, "pretrained")
    _in_turn(_run, [(job, folder, function) for job in missing], processes, about)
    return [json.loads(_file(folder, job).read_text(encoding="utf-8")) for job in jobs]


def _in_turn(function: Callable[..., None], calls: Sequence[tuple[object, ...]], processes: int, about: str) -> None:
    """Makes the calls; an exception in one ends it all."""
    pool = joblib.Parallel(n_jobs=processes, return_as="generator_unordered")
    for _ in tqdm(pool(joblib.delayed(function)(*call) for call in calls), total=len(calls), desc=about):
        pass


def _file(folder: Path, job: Runnable) -> Path:
    return folder / "runs" / f"{job.name}.json"


def _prepare(name: str, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    prepare(name, seed, folder)


def _run(job: Of, folder: Path, function: Callable[[Of, Path], Record]) -> None:
    torch.set_num_threads(1)
    file = _file(folder, job)
    half = file.with_suffix(".half")
    half.write_text(json.dumps(function(job, folder)) + "\n", encoding="utf-8")
    half.replace(file)  # there or not there, also for a command that was killed


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {module.__name__: module.__version__ for module in (craft_optim, numpy, sklearn, torch)}
    return {"python": platform.python_version()} | found


def with_runs(result: Mapping[str, Any], records: Sequence[Record]) -> str:
    """A result as JSON, followed by the runs it is computed from: a line for each, five digits."""
    rounded = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items()} for record in records]
    lines = ",\n".join(f"    {json.dumps(record)}" for record in rounded)
    return f'{json.dumps(result, indent=2)[:-2]},\n  "runs": [\n{lines}\n  ]\n}}\n'
