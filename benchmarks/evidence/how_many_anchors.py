"""Drift over the number of anchors and epsilon: five short runs of craft-optim train.

    python benchmarks/evidence/how_many_anchors.py                      # prints the table of docs/choosing.md
    python benchmarks/evidence/how_many_anchors.py --out=outputs/anchors --steps=300

The shipped small pi0_fast learns the button; frames of the drawer are its anchors. Finished runs are not run again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import _paths
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
from metaworld_pi0_fast.unpacked import unpack
from rich.console import Console
from rich.table import Table
from six_experiments_support.commands import Steps, craft_optim

from craft_optim.anchors.sampling import spread

DATA = ASSETS / "demonstrations"
OF_LAST = 50  # steps that the new task's loss is averaged over
# What measures the drift and changes no gradient
NONE = {
    "dual": "ascent",
    "lambda_init": 0,
    "lambda_max": 0,
    "projection": "never",
    "trust_region": "null",
    "max_grad_norm": 1e9,
}
HELD_OUT = 4, 256  # episodes, and frames of them
# Name of a run -> what it is, its anchors, and its flags
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("without retention", 256, NONE),
    "anchors-64": ("64 anchors, epsilon 0.03", 64, {}),
    "anchors-256": ("256 anchors, epsilon 0.03", 256, {}),
    "anchors-1024": ("1024 anchors, epsilon 0.03", 1024, {}),
    "tighter": ("256 anchors, epsilon 0.01", 256, {"epsilon": 0.01}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_paths.WORK / "how_many_anchors")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(arguments)
    out, console = args.out.resolve(), Console()
    steps = Steps(out, {"steps": args.steps}, console)
    pretrained = out / "pretrained"
    steps.call("unpack", lambda: unpack(pretrained))
    training = [
        f"--policy.path={pretrained}", "--dataset.repo_id=local/new", f"--dataset.root={DATA / NEW_TASK}",
        "--policy.optimizer_lr=1e-3", "--policy.scheduler_decay_lr=1e-4", "--policy.scheduler_warmup_steps=20",
        f"--steps={args.steps}", f"--save_freq={args.steps}", "--log_freq=1", "--batch_size=16", "--num_workers=0",
        "--policy.push_to_hub=false", "--wandb.enable=false",
    ]  # fmt: skip
    total = json.loads((DATA / OLD_TASK / "meta" / "info.json").read_text(encoding="utf-8"))["total_episodes"]
    held_out = spread(total, HELD_OUT[0])
    trained = [episode for episode in range(total) if episode not in held_out]

    def cache(folder: Path, episodes: list[int], count: int) -> None:
        frames = [f"--dataset.root={DATA / OLD_TASK}", f"--dataset.episodes={episodes}", f"--count={count}"]
        steps.command(folder.name, craft_optim("build-anchors", folder, f"--policy.path={pretrained}", *frames))

    for count in sorted({count for _, count, _ in RUNS.values()}):
        cache(out / f"cache-{count}", trained, count)
        cache(out / f"cache-{count}-heldout", held_out, HELD_OUT[1])
    for name, (_, count, own) in RUNS.items():
        settings = {"anchors.path": out / f"cache-{count}", "epsilon": 0.03, "statistics": "pretrained"} | own
        flags = [f"--craft.{key}={value}" for key, value in settings.items()]
        small = "--small.discover_packages_path=small_pi0_fast"
        steps.command(name, craft_optim("train", small, *flags, *training, f"--output_dir={out / name}"))
    table = Table("", "drift on anchors", "drift on held-out frames", f"new task: loss, last {OF_LAST}")
    for name, (label, *_) in RUNS.items():
        rows = rows_of(out / name)
        loss = fmean(row["loss"] for row in rows[-OF_LAST:])
        drifts = (f"{rows[-1][key]:.3f}" for key in ("drift_anchors", "drift_heldout"))
        table.add_row(label, *drifts, f"{loss:.2f}")
    console.print(table)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, a row per step."""
    return [json.loads(line) for line in (run / "craft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
