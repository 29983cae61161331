"""Success and drift of the small pi0_fast over a range of epsilons, several seeds.

    python benchmarks/evidence/sweep_epsilon.py                       # half an hour on 2 cores; writes to results/
    python benchmarks/evidence/sweep_epsilon.py --retention hidden --epsilons 0.02 0.05 0.1

Every point is a run of `pi0_fast_craft.py` in a process of its own. A sweep that was stopped goes on where it was:
points that are there already, with the same settings, are not run again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import _paths
from metaworld_pi0_fast import NEW_TASK, OLD_TASK
from metaworld_pi0_fast.pictures import draw_sweep
from metaworld_pi0_fast.summary import Outcome, print_sweep, summarise
from rich.console import Console
from tqdm.auto import tqdm

EPSILONS = {"logits": [0.005, 0.01, 0.02, 0.03, 0.05, 0.1], "hidden": [0.01, 0.02, 0.05, 0.1, 0.2]}


def run_point(method: str, epsilon: float, args: argparse.Namespace) -> list[Outcome]:
    """The outcomes of one method at one epsilon, all seeds; from disk if they are there."""
    out = args.work / f"{args.retention}-{method}-{epsilon:g}"
    wanted = {"retention": args.retention, "epsilon": epsilon, "seeds": args.seeds, "rollouts": args.rollouts}
    done = out / "point.json"
    if not (done.is_file() and json.loads(done.read_text())["settings"] == wanted):
        command = [sys.executable, str(_paths.EXAMPLES / "pi0_fast_craft.py"), "--methods", method, "--out", str(out)]
        command += [f"--{name}={value}" for name, value in wanted.items()] + ["--workers=1"]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
        outcomes = json.loads((out / "outcomes.json").read_text())
        done.write_text(json.dumps({"settings": wanted, "outcomes": outcomes}))
    return [Outcome(**outcome) for outcome in json.loads(done.read_text())["outcomes"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the points two at a time, then writes the table, the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retention", choices=tuple(EPSILONS), default="logits")
    parser.add_argument("--epsilons", nargs="+", type=float, default=None, help=f"default: {EPSILONS}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=20, help="per task and seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--work", type=Path, default=_paths.WORK / "sweep", help="where the runs go")
    parser.add_argument("--results", type=Path, default=_paths.RESULTS, help="where the summary goes")
    args = parser.parse_args(arguments)
    epsilons = sorted(args.epsilons or EPSILONS[args.retention])

    points: list[tuple[str, float]] = [("adamw", epsilons[0])] + [("craft", epsilon) for epsilon in epsilons]
    found: dict[tuple[str, float], list[Outcome]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(run_point, *point, args): point for point in points}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="points"):
            found[jobs[job]] = job.result()

    adamw = summarise(found["adamw", epsilons[0]], epsilons[0])["adamw"]
    craft = [summarise(found["craft", epsilon], epsilon)["craft"] for epsilon in epsilons]
    result: dict[str, Any] = {
        "retention": args.retention,
        "seeds": list(range(args.seeds)),
        "rollouts_per_seed_and_task": args.rollouts,
        "tasks": {"old": OLD_TASK, "new": NEW_TASK},
        "adamw": {k: v for k, v in adamw.items() if k != "epsilon"},
        "craft": craft,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"sweep-{args.retention}"
    (args.results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_sweep(result, args.results / f"{name}.png")
    console = Console()
    print_sweep(result, console)
    console.print(f"Written to [bold]{args.results}[/bold]")


if __name__ == "__main__":
    main()
