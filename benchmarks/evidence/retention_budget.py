"""Cost and drift of retention, over `retention_every` and the number of anchors per pass.

    python benchmarks/evidence/retention_budget.py              # two seeds; results/, docs/choosing.md
    python benchmarks/evidence/retention_budget.py --every 1 4 --anchor-batches 32 --seeds=1

Each point is a run of `pi0_fast_craft.py` without rollouts, drawer to button. Before it trains, its steps and those of
plain AdamW take turns on copies of the policy: the cost. Finished runs are not run again.
"""

import argparse
import copy
import csv
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import _paths
import pi0_fast_craft as craft
import torch
from matplotlib.figure import Figure
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
from metaworld_pi0_fast.pictures import COLOURS
from metaworld_pi0_fast.policy import load_policy, make_processors
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from six_experiments import EPSILON
from six_experiments_support.commands import Steps

NAME = "retention-budget"
RATE = 1e-3  # the learning rate that needs no mention
OF_LAST = 50  # steps that the new task's loss is averaged over
ROUND = 10  # steps of a round in which both take turns, at least; a round has whole periods of retention_every
COLUMNS = {
    "retention_every": "retention every",
    "anchor_batch": "anchors",
    "cost": "cost of a step",
    "drift_highest": "highest drift on the way",
    "drift_anchor": "drift on anchors",
    "drift_heldout": "drift, held-out",
    "loss": f"new task: loss, last {OF_LAST}",
}
PER_SEED = ("drift_highest", "drift_anchor", "drift_heldout", "loss")


@dataclass(frozen=True)
class Point:
    """How often retention runs, on how many anchors; 0 and 0 for plain AdamW."""

    every: int
    batch: int

    @property
    def method(self) -> str:
        """Its name in `pi0_fast_craft`."""
        return "craft" if self.every else "adamw"

    @property
    def name(self) -> str:
        """Its name in file names."""
        return f"every-{self.every}-anchors-{self.batch}" if self.every else "adamw"


PLAIN = Point(0, 0)


class Bench:
    """The policy, both tasks and the anchors of `pi0_fast_craft`, loaded once for all runs.

    Args:
        args: As `parse` returns them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._work, source = args.work, ASSETS / "pretrained"
        torch.set_num_threads(1)
        self.policy = load_policy(source, device="cpu")
        preprocessor = make_processors(self.policy, path=source)[0]
        common = self.arguments(PLAIN, args)
        old, self.new = (
            craft.load_task(None, task, self.policy, preprocessor, common, ASSETS) for task in (OLD_TASK, NEW_TASK)
        )
        folder = self._work / "anchors"
        self.cache = craft.anchor(self.policy, old, old.frames.train_indices, folder / "anchors", common)
        self.heldout = craft.anchor(self.policy, old, old.frames.heldout_indices, folder / "held-out", common)
        self._pretrained = copy.deepcopy(self.policy.state_dict())

    def arguments(self, point: Point, args: argparse.Namespace) -> argparse.Namespace:
        """The command line of `pi0_fast_craft` for a point."""
        flags = [
            f"--steps={args.steps}",
            f"--lr={args.lr}",
            f"--epsilon={EPSILON['logits']}",
            f"--save-every={args.steps}",
            f"--out={self._work / point.name}",
        ]
        if args.episodes:
            flags.append(f"--dataset.episodes={args.episodes}")
        if point.every:
            flags += [f"--retention-every={point.every}", f"--anchor-batch-size={point.batch}"]
        return craft.parse(flags)

    def run(self, point: Point, seed: int, args: argparse.Namespace, path: Path) -> None:
        """Measures what a step costs, trains, measures what was held, and writes all of it as JSON."""
        own = self.arguments(point, args)
        costs = self.costs(point, seed, own, args.rounds)
        self.policy.load_state_dict(self._pretrained)
        retention = craft.retention_of(self.policy, self.cache, own, seed)
        craft.fine_tune(self.policy, point.method, self.new, retention, self.heldout, own, seed)
        file = own.out / "runs" / f"{point.method}-seed{seed}" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = {
            "costs": costs,
            "drift_anchor": retention.drift(batch_size=64),
            "drift_heldout": retention.drift(self.heldout, batch_size=64),
            "drift_highest": max(row["drift_anchors"] for row in rows if "drift_anchors" in row),
            "loss": fmean(row["loss"] for row in rows[-OF_LAST:]),
        }
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")

    def costs(self, point: Point, seed: int, own: argparse.Namespace, rounds: int) -> list[float]:
        """CPU time of a training step as a multiple of plain AdamW's, of each round; see `in_turns`."""
        length = whole_periods(point.every)

        def steps(method: str) -> Callable[[int], None]:
            self.policy.load_state_dict(self._pretrained)
            policy = copy.deepcopy(self.policy).train()
            retention = craft.retention_of(policy, self.cache, own, seed)
            state = craft.make_optimizer(policy, method, retention, own)
            if point.every and method == "craft":
                for group in state[0].param_groups:  # a run's start, in which a pass looks at more anchors, is short
                    group["craft_start"] = 0.0

            def step(number: int) -> None:
                craft.train_step(policy, batch_of(number), *state)

            return step

        @functools.lru_cache(maxsize=1)
        def batch_of(number: int) -> dict[str, torch.Tensor]:
            rows = self.new.frames.train_indices
            return self.new.frames.train_batch(craft.rows_of_step(rows, own.batch_size, seed, number))

        ours, plain = steps(point.method), steps("adamw")
        return in_turns(ours, plain, length, rounds, before=batch_of)


def whole_periods(every: int) -> int:
    """Steps of a round: at least `ROUND`, and as many with retention per step as in a long run."""
    period = max(1, every)
    return period * math.ceil(ROUND / period)


def in_turns(
    ours: Callable[[int], object],
    plain: Callable[[int], object],
    length: int,
    rounds: int,
    before: Callable[[int], object] = lambda number: None,
) -> list[float]:
    """Ratios of CPU time, a value per round of `length` steps; each step is done by both, and they go first by turns.

    CPU time is that of the process with all its threads, so that other work on the machine does not count. One round
    more, the first, warms up.

    Args:
        ours: Called with the number of the step, from 0.
        plain: The same; what `ours` is a multiple of.
        length: Steps of a round.
        rounds: How many count.
        before: Called with each step's number before both, and not counted.
    """
    functions, ratios = (ours, plain), []
    for first in range(0, length * (rounds + 1), length):
        spent = [0.0, 0.0]
        for number in range(first, first + length):
            before(number)
            for which in (0, 1) if number % 2 else (1, 0):
                began = time.process_time()
                functions[which](number)
                spent[which] += time.process_time() - began
        ratios.append(spent[0] / spent[1])
    return ratios[1:]


def summarise(point: Point, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and each seed's value; of costs the median of all rounds, and half the quartiles' distance.

    Args:
        point: What was run.
        runs: As `Bench.run` writes them, one per seed.
    """
    costs = [cost for run in runs for cost in run["costs"]]
    low, _, high = quantiles(costs, n=4)
    row: dict[str, Any] = {"retention_every": point.every, "anchor_batch": point.batch}
    row |= {"cost": median(costs), "cost_spread": (high - low) / 2}
    for key in PER_SEED:
        row[key] = fmean(run[key] for run in runs)
        row[f"{key}_per_seed"] = [run[key] for run in runs]
    return row


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All numbers that are not lists, a row per point."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """A row per point, plain AdamW first."""
    title = "epsilon {epsilon:g}, {steps} steps, learning rate {lr:g}, seeds {seeds}".format_map(result)
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in COLUMNS.values():
        table.add_column(column, justify="right")
    for row in [result["adamw"], *result["points"]]:
        kind = ["AdamW", "-"] if not row["retention_every"] else [f"{row['retention_every']}", f"{row['anchor_batch']}"]
        cost = f"{row['cost']:.2f} +- {row['cost_spread']:.2f}"
        table.add_row(*kind, cost, *(f"{row[key]:.4f}" for key in PER_SEED[:-1]), f"{row['loss']:.3f}")
    console.print(table)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Drift over cost, on anchors and held-out frames: a line per number of anchors, a marker per retention_every."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    rows = result["points"]
    batches = sorted({row["anchor_batch"] for row in rows}, reverse=True)
    colours = dict(zip(batches, itertools.cycle([COLOURS["craft"], "#4daf4a", "#984ea3", "#e6ab02"]), strict=False))
    markers = dict(zip(sorted({row["retention_every"] for row in rows}), itertools.cycle("os^DvP"), strict=False))
    panels = (("drift_anchor", "drift on the anchors"), ("drift_heldout", "drift on held-out frames"))
    left, right = figure.subplots(1, 2)
    for axis, (key, title) in zip((left, right), panels, strict=True):
        for batch, colour in colours.items():
            line = sorted((row for row in rows if row["anchor_batch"] == batch), key=lambda row: float(row["cost"]))
            label = f"{batch} anchors" if axis is left else None
            axis.plot([row["cost"] for row in line], [row[key] for row in line], color=colour, label=label)
            for row in line:
                each = row[f"{key}_per_seed"]
                axis.plot(row["cost"], row[key], color=colour, marker=markers[row["retention_every"]])
                axis.plot([row["cost"]] * len(each), each, color="black", marker="_", ls="", ms=5)
        axis.set_title(f"{title} at the end", fontsize=10)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="both", labelsize=8)
        axis.set_xlabel("CPU time of a training step, plain AdamW = 1")
        axis.grid(alpha=0.25, which="both")
    left.axhline(result["epsilon"], color="black", ls="--", lw=1, label=f"epsilon = {result['epsilon']:g}")
    for every, marker in markers.items():
        right.plot([], [], color="#8c8c8c", marker=marker, ls="", label=f"retention_every={every}")
    right.plot([], [], color="black", marker="_", ls="", ms=5, label="each seed")
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--every", nargs="+", type=positive, default=[1, 2, 5, 10], help="values of retention_every")
    add("--anchor-batches", nargs="+", type=positive, default=[16, 8, 4], help="anchors per retention pass")
    add("--seeds", type=positive, default=2, help="number of seeds, counted from 0")
    add("--steps", type=positive, default=800, help="fine-tuning steps")
    add("--lr", type=float, default=RATE, help="peak learning rate; results of another one have it in their names")
    add("--rounds", type=positive, default=6, help=f"rounds per run that measure costs, of {ROUND} steps or more")
    add("--episodes", type=positive, default=None, help="use the first N episodes of each dataset (default: all)")
    add("--work", type=Path, default=_paths.WORK / "retention_budget", help="where the runs go")
    add("--results", type=Path, default=_paths.RESULTS, help="where the summary goes")
    args = parser.parse_args(arguments)
    if args.seeds * args.rounds < 2:
        parser.error("--rounds must be 2 or more with one seed: there is no spread of one value")
    args.work = args.work.resolve()
    return args


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs what is not there yet; writes the JSON, the CSV and the picture, and prints the table."""
    args, console = parse(arguments), Console()
    wanted = {"steps": args.steps, "lr": args.lr, "rounds": args.rounds, "episodes": args.episodes}
    steps = Steps(args.work, wanted, console)
    found = args.work / "found"
    found.mkdir(exist_ok=True)

    @functools.cache
    def bench() -> Bench:  # not loaded if there is nothing to run
        return Bench(args)

    def run(point: Point, seed: int, path: Path) -> None:
        bench().run(point, seed, args, path)

    points = [Point(every, batch) for batch in args.anchor_batches for every in args.every]
    for seed in range(args.seeds):
        for point in [PLAIN, *points]:
            name = f"{point.name}-seed{seed}"
            steps.call(name, functools.partial(run, point, seed, found / f"{name}.json"))

    def row(point: Point) -> dict[str, Any]:
        files = [found / f"{point.name}-seed{seed}.json" for seed in range(args.seeds)]
        return summarise(point, [json.loads(file.read_text(encoding="utf-8")) for file in files])

    result = {
        "epsilon": EPSILON["logits"],
        "seeds": list(range(args.seeds)),
        **wanted,
        "tasks": {"old": OLD_TASK, "new": NEW_TASK},
        "adamw": row(PLAIN),
        "points": [row(point) for point in points],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    name = NAME if args.lr == RATE else f"{NAME}-lr-{args.lr:g}"
    (args.results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_csv([result["adamw"], *result["points"]], args.results / f"{name}.csv")
    draw(result, args.results / f"{name}.png")
    print_table(result, console)
    console.print(f"Written to [bold]{args.results}[/bold]")
    return result


if __name__ == "__main__":
    main()
