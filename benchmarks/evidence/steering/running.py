"""Runs cases: with this build, or with another one in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pareto.prepared import base_optimizer, cache_of, prepare
from pareto.runs import run_all, store
from pareto.setting import divergence, score, task_loss, teacher_logprobs
from torch import Tensor

import craft_optim
from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorCache, LogitRetention

from .cases import Case, Found, Record, keywords
from .problems import run_problem

__all__ = ["HALVES", "MODULES", "answer", "run", "run_elsewhere"]

HALVES = {"even": slice(0, None, 2), "odd": slice(1, None, 2)}
MODULES = ("../steering/cases", "../steering/problems", "../steering/running")
"""What runs depend on beside `pareto`."""


def run(case: Case, folder: Path) -> Record:
    """Runs a case; see `Found.record`.

    Of a setting also `new` and `old`, scores on both test sets, and before; `chance`; and `drift_even` and `drift_odd`,
    the drift on each half of the old test set, in nats.

    Args:
        case: What to run.
        folder: Where pretrained networks are.
    """
    if case.setting in ("parameter", "network"):
        return run_problem(case)
    prepared = prepare(case.setting, case.seed, folder)
    setting, model = prepared.setting, prepared.model()
    base, schedule = base_optimizer(model, setting.finetune, case.lr)
    inputs, old = setting.anchors.inputs, setting.old_test.inputs
    torch.manual_seed(case.seed)
    batches = setting.task.batches(setting.finetune.batch_size, case.seed)
    count = max(1, round(case.share * len(inputs)))
    cache = AnchorCache.open(prepared.cache)
    retention = LogitRetention(model, cache, batch_size=count, seed=case.seed, workers=0)
    settings = keywords(case)
    if case.heldout:
        settings["heldout"] = cache_of(prepared, f"old-test-{case.heldout}", old[HALVES[case.heldout]])

    def drift(of: Tensor, teacher: Tensor) -> float:
        return float(divergence(teacher_logprobs(model, of), teacher))

    found = Found(lambda: drift(inputs, prepared.teacher))
    optimizer = CraftOptimizer(base, retention, epsilon=case.epsilon, on_metrics=found.passed, **settings)
    for _ in range(setting.finetune.steps):
        base.zero_grad()
        (case.scale * task_loss(model, next(batches))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        found.stepped()
    return found.record(case) | {
        "new": score(model, setting.task_test, setting.metric),
        "old": score(model, setting.old_test, setting.metric),
        "new_before": prepared.new,
        "old_before": prepared.old,
        "chance": prepared.chance,
        **{f"drift_{half}": drift(old[rows], prepared.heldout[rows]) for half, rows in HALVES.items()},
    }


def answer(file: Path, work: Path, processes: int) -> None:
    """Runs the cases in a JSON file, and puts their records in their place; says which package it was."""
    cases = [Case(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    records = run_all(cases, store(work, *MODULES), processes, run, "the other build")
    found = {"package": str(Path(craft_optim.__file__).parent), "records": records}
    file.write_text(json.dumps(found), encoding="utf-8")


def run_elsewhere(cases: Sequence[Case], build: Path, script: Path, work: Path, processes: int) -> list[Record]:
    """Runs cases with the package of another build.

    Args:
        cases: What to run.
        build: A folder that has `craft_optim`.
        script: The command, which passes `--answer` on to `answer`.
        work: Where finished runs are.
        processes: At the same time.

    Raises:
        RuntimeError: The process failed, or ran another package.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        command = [sys.executable, str(script), f"--answer={file}", f"--work={work}", f"--jobs={processes}"]
        environment = os.environ | {"PYTHONPATH": str(build)}
        status = subprocess.run(command, env=environment, check=False).returncode
        if status:
            raise RuntimeError(f"The runs with {build} failed, with status {status}: see above.")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if Path(found["package"]) != build / "craft_optim":
        raise RuntimeError(f"The runs were to be with {build}. Found {found['package']}.")
    return list(found["records"])
