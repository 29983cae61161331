"""Results of the commands, gathered from their files: one record, one table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from metaworld_pi0_fast import NEW_TASK, OLD_TASK

from craft_optim.evaluation.statistics import wilson

__all__ = ["METHODS", "Method", "Run", "compare", "markdown"]

TASKS = {"old": OLD_TASK, "new": NEW_TASK}


@dataclass(frozen=True)
class Method:
    """How a policy is fine-tuned.

    Attributes:
        name: In file names.
        label: For people.
        kind: What is compared with the teacher: "logits" or "hidden"; "" for AdamW.
        anchors: Name of the cache; None for AdamW.
        step: The prefix of its step's name.
    """

    name: str
    label: str
    kind: str
    anchors: str | None
    step: str


METHODS = (
    Method("adamw", "AdamW", "", None, "1"),
    Method("logits", "token CRaFT (drawer)", "logits", "logits", "3"),
    Method("hidden", "hidden CRaFT (drawer)", "hidden", "hidden", "4"),
    Method("hidden-both", "hidden CRaFT (drawer and questions)", "hidden", "hidden-both", "4"),
)


@dataclass(frozen=True)
class Run:
    """A method and a seed.

    Attributes:
        method: The method.
        seed: Of lerobot-train.
        parent: Folder of all runs.
    """

    method: Method
    seed: int
    parent: Path

    @property
    def name(self) -> str:
        """Its name in steps and files."""
        return f"{self.method.step}-{self.method.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """The output folder of lerobot-train."""
        return self.parent / self.name

    def checkpoint(self) -> Path:
        """The last one."""
        return self.folder / "checkpoints" / "last" / "pretrained_model"

    def checkpoints(self) -> list[Path]:
        """Checkpoints at numbered steps, in their order, the last one under its other name."""
        numbered = sorted(path for path in (self.folder / "checkpoints").glob("[0-9]*") if path.is_dir())
        return [*(path / "pretrained_model" for path in numbered[:-1]), self.checkpoint()]


def compare(
    out: Path, runs: Sequence[Run], epsilon: Mapping[str, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Gathers everything.

    Args:
        out: Folder of the recipe.
        runs: All of them.
        epsilon: By kind.
        settings: Noted in the record.

    Returns:
        "settings", "epsilon", "tasks", and in "methods" an entry for "pretrained" and each method: `success` by "old"
        and "new" (None without rollouts), `mcq`, `drift` by kind on held-out frames, `layers` (name -> drift),
        `forgetting` (mean over seeds), `seconds` of training; and for pictures `curves`.
    """
    measured = out / "measured"
    drift = {kind: _read(measured / f"drift-{kind}.json") for kind in epsilon}
    before = _read(measured / f"mcq-{runs[0].name}.json")["models"][0]["summary"]
    label = "before (pretrained)"
    nothing = dict.fromkeys(epsilon, 0.0)
    first = {"label": label, "success": _success(measured, ["pretrained"]), "mcq": _mcq([before]), "drift": nothing}
    methods: dict[str, Any] = {"pretrained": first | {"seconds": None, "forgetting": None}}
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        reports = [_read(measured / f"mcq-{run.name}.json") for run in own]
        rows = {kind: [_of(drift[kind], run.checkpoint()) for run in own] for kind in epsilon}
        methods[method.name] = {
            "label": method.label,
            "kind": method.kind or None,
            "epsilon": epsilon.get(method.kind),
            "success": _success(measured, [run.name for run in own]),
            "mcq": _mcq([report["models"][1]["summary"] for report in reports])
            | {"by_question": _by_question(reports), "lost": sum(report["comparison"]["lost"] for report in reports)},
            "drift": {kind: fmean(row["drift"][kind]["mean"] for row in each) for kind, each in rows.items()},
            "layers": _layers([row["drift"]["hidden"]["layers"] for row in rows["hidden"]]),
            "forgetting": _forgetting(measured, own),
            "seconds": fmean(_read(out / "done" / f"{run.name}.json")["seconds"] for run in own),
            "curves": [_curve(run, drift) for run in own],
        }
    methods["pretrained"]["mcq"]["by_question"] = _by_question([_read(measured / f"mcq-{runs[0].name}.json")], 0)
    return {"settings": dict(settings), "epsilon": dict(epsilon), "tasks": TASKS, "methods": methods}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _success(measured: Path, names: Sequence[str]) -> dict[str, Any] | None:
    files = [measured / f"success-{name}.json" for name in names]
    if not all(file.is_file() for file in files):
        return None
    found = {}
    for key, task in TASKS.items():
        outcomes = [outcome for file in files for outcome in _read(file)[task]]
        interval = wilson(sum(outcomes), len(outcomes))
        found[key] = {"rate": fmean(outcomes), "interval": interval, "rollouts": len(outcomes)}
    return found


def _mcq(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Success of all seeds together."""
    total = sum(summary["questions"] for summary in summaries)
    right = round(sum(summary["normalized"]["accuracy"] * summary["questions"] for summary in summaries))
    chance = fmean(summary["chance"] for summary in summaries)
    return {"accuracy": right / total, "interval": wilson(right, total), "questions": total, "chance": chance}


def _by_question(reports: Sequence[Mapping[str, Any]], model: int = 1) -> dict[str, float]:
    rows: dict[str, list[bool]] = {}
    for report in reports:
        for row in report["questions"]:
            rows.setdefault(row["question"], []).append(row["results"][model]["right"])
    return {question: fmean(each) for question, each in rows.items()}


def _of(drift: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    return next(row for row in drift["checkpoints"] if row["path"] == str(checkpoint))


def _layers(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    return {
        f"layer {parts[0]['layer']}, {parts[0]['span']}": fmean(part["mean"] for part in parts)
        for parts in zip(*seeds, strict=True)
    }


def _forgetting(measured: Path, runs: Sequence[Run]) -> dict[str, Any] | None:
    files = [measured / f"forgetting-{run.name}.json" for run in runs]
    if not all(file.is_file() for file in files):
        return None
    each = [next(m for m in _read(file)["measures"] if m["name"] == "forgetting") for file in files]
    return {"mean": fmean(m["value"] for m in each), "intervals": [m["interval"] for m in each]}


def _curve(run: Run, drift: Mapping[str, Any]) -> dict[str, Any]:
    """Drift over steps, on held-out frames: of CRaFT's own kind as training has measured it; of AdamW both kinds."""
    if run.method.anchors is None:
        steps = [*(int(path.parent.name) for path in run.checkpoints()[:-1]), _last_step(run)]
        return {
            "seed": run.seed,
            "steps": steps,
            "heldout": {k: [_of(d, p)["drift"][k]["mean"] for p in run.checkpoints()] for k, d in drift.items()},
        }
    lines = (run.folder / "craft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "drift_anchors" in row]
    return {
        "seed": run.seed,
        "steps": [row["step"] for row in rows],
        "heldout": {run.method.kind: [row["drift_heldout"] for row in rows if "drift_heldout" in row]},
        "anchors": {run.method.kind: [row["drift_anchors"] for row in rows]},
    }


def _last_step(run: Run) -> int:
    return int((run.folder / "checkpoints" / "last").resolve().name)


def markdown(record: Mapping[str, Any]) -> str:
    """The table; a row for each method."""
    header = ["", "old task: success", "new task: success", "questions: right", "drift, logits", "drift, hidden"]
    header += ["forgotten", "training"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for row in record["methods"].values():
        success = row["success"]
        rates = ["-", "-"] if success is None else [_rate(success[k]["rate"], success[k]["interval"]) for k in TASKS]
        cells = [row["label"], *rates, _rate(row["mcq"]["accuracy"], row["mcq"]["interval"])]
        cells += [f"{row['drift'][kind]:.4f}" for kind in ("logits", "hidden")]
        cells.append("-" if row["forgetting"] is None else f"{row['forgetting']['mean']:.2f}")
        cells.append("-" if row["seconds"] is None else f"{row['seconds']:.0f} s")
        lines.append(_line(cells))
    mcq, settings = record["methods"]["pretrained"]["mcq"], record["settings"]
    seeds, rollouts = settings["seeds"], settings["rollouts"]
    epsilon = record["epsilon"]
    notes = [
        f"{settings['steps']} steps, seeds: {seeds}, rollouts per task and seed: {rollouts}; [..]: 95 % interval.",
        f"Old task: {record['tasks']['old']}, new task: {record['tasks']['new']}.",
        f"{mcq['questions']} questions about pictures; chance is {mcq['chance']:.2f}. Drift on held-out frames of the",
        f"old task: logits in nats (token CRaFT allows {epsilon['logits']:g} on its anchors), hidden states in shares",
        f"of the teacher's variance (hidden CRaFT allows {epsilon['hidden']:g}). Forgotten: what",
        "`forgetting.py` says of the old task. Training: wall time, with starting and loading.",
    ]
    return "\n".join([*lines, "", *notes, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rate(rate: float, interval: Sequence[float]) -> str:
    return f"{rate:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
