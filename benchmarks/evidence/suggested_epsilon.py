"""The epsilon that `craft_optim.calibrate` suggests, against the best of a sweep, at three learning rates.

    python benchmarks/evidence/suggested_epsilon.py                                 # minutes on two cores; .benchmarks/
    python benchmarks/evidence/suggested_epsilon.py --results=benchmarks/evidence/results    # what is in the repository

The settings are those of `retention_pareto.py`, and so is what plasticity and retention are. Calibration sees 100 plain
steps and the anchors, no test set.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
import torch
from markdown_table import markdown_table
from pareto.prepared import SETTINGS, base_optimizer, prepare
from pareto.runs import run_all, store
from pareto.scaled import RATES
from pareto.setting import task_loss
from pareto.summary import Outcome, outcomes
from pareto.training import Job, fine_tune

from craft_optim import Calibration, calibrate
from craft_optim.anchors import AnchorCache, LogitRetention

NAME = "suggested_epsilon"
EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Row:
    """A setting at one learning rate; means over seeds.

    Attributes:
        setting: Its name.
        lr: Factor on its learning rate.
        one: Drift of one plain step.
        hundred: Of a hundred.
        suggested: What calibration suggests to begin with.
        least: min(plasticity, retention) there.
        best: The epsilon of the sweep with the largest mean of min(plasticity, retention).
        least_at_best: That.
    """

    setting: str
    lr: float
    one: float
    hundred: float
    suggested: float
    least: float
    best: float
    least_at_best: float


def calibrated(setting: str, seed: int, lr: float, folder: Path) -> Calibration:
    """Calibrates at the recipe's learning rate times `lr`."""
    prepared = prepare(setting, seed, folder)
    model, recipe = prepared.model(), prepared.setting.finetune
    optimizer, _ = base_optimizer(model, recipe, lr)
    batches = prepared.setting.task.batches(recipe.batch_size, seed)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task_loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    retention = LogitRetention(model, AnchorCache.open(prepared.cache), prepared.setting.anchor_batch)
    return calibrate(model, retention, train_step=step)


def compared(
    setting: str, lr: float, of: Sequence[Calibration], epsilons: Sequence[float], rated: Sequence[Outcome]
) -> Row:
    """A row of the table.

    Args:
        setting: Its name.
        lr: Factor on its learning rate.
        of: Per seed.
        epsilons: What each of them suggests.
        rated: The runs of the sweep, and those at the suggested epsilons, of all settings.
    """
    runs = [run for run in rated if (run.setting, run.lr, run.method) == (setting, lr, "craft")]

    def least(epsilon: float, seed: int | None = None) -> float:
        return fmean(run.least for run in runs if run.strength == epsilon and seed in (None, run.seed))

    best = max(EPSILONS, key=least)
    return Row(
        setting,
        lr,
        one=fmean(found.plain[0].drift for found in of),
        hundred=fmean(found.plain[1].drift for found in of),
        suggested=fmean(epsilons),
        least=fmean(least(epsilon, seed) for seed, epsilon in enumerate(epsilons)),
        best=best,
        least_at_best=least(best),
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table, as docs/calibration.md has it."""
    header = ("setting", "learning rate", "1 step", "100 steps", "suggested", "min(P, R)", "best swept", "min(P, R)")
    cells = [
        (
            row.setting,
            f"x{row.lr:g}",
            *(f"{x:.2g}" for x in (row.one, row.hundred, row.suggested)),
            f"{row.least:.2f}",
            f"{row.best:g}",
            f"{row.least_at_best:.2f}",
        )
        for row in rows
    ]
    return markdown_table(header, cells)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Runs what is not there yet, prints the table and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="default: all")
    add("--seeds", type=int, default=1, help="number of seeds, counted from 0 (default: 1)")
    add("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    add("--work", type=Path, default=Path(".benchmarks") / NAME, help="where finished runs are")
    add("--results", type=Path, default=Path(".benchmarks"), help="where the JSON goes")
    args = parser.parse_args(arguments)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, found {getattr(args, name)}")
    folder, points = store(args.work.resolve()), list(product(args.settings, RATES))

    of: dict[tuple[str, float], list[Calibration]] = {
        point: [calibrated(point[0], seed, point[1], folder) for seed in range(args.seeds)] for point in points
    }
    sweep = [
        Job(setting, method, strength, seed, lr=lr)
        for (setting, lr), seed in product(points, range(args.seeds))
        for method, strength in [("plain", 0.0), *(("craft", epsilon) for epsilon in EPSILONS)]
    ]
    suggested = {point: [_epsilon(found) for found in of[point]] for point in points}
    own = [
        Job(setting, "craft", epsilon, seed, lr=lr)
        for setting, lr in points
        for seed, epsilon in enumerate(suggested[setting, lr])
    ]
    rated = outcomes(run_all([*sweep, *own], folder, args.jobs, fine_tune, "runs"))
    rows = [compared(*point, of[point], suggested[point], rated) for point in points]
    print(markdown(rows))
    args.results.mkdir(parents=True, exist_ok=True)
    words = [f"python benchmarks/evidence/{NAME}.py", "--settings", *args.settings, f"--seeds={args.seeds}"]
    result: dict[str, Any] = {"command": " ".join(words), "rows": [asdict(row) for row in rows]}
    (args.results / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return rows


def _epsilon(found: Calibration) -> float:
    if found.suggestion is None:
        raise ValueError(f"Nothing is suggested: plain training does not move the model.\n{found}")
    return found.suggestion.epsilon


if __name__ == "__main__":
    main()
