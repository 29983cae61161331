"""The table of what the optimizer costs, docs/performance.md, from the JSON of a run.

    python benchmarks/performance_table.py run.json   # keeps what matters of pytest-benchmark's JSON, writes the page
    python benchmarks/performance_table.py            # writes the page from what was kept

A run of some groups takes the place of what is kept of these.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LINES", "Line", "promise_of", "read_results", "render", "results_of", "updated", "with_table"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"
DEVICES = ("cpu", "cuda")

BEGIN = "<!-- performance: written by `python benchmarks/performance_table.py` -->\n"
END = "<!-- end of performance -->"
NOT_MEASURED = "not measured"
LEGEND = (
    "By `make bench`: medians of rounds in which both take turns; on the CPU of processor time, which other work on "
    "the machine disturbs less, except between processes. Bold: a promise not kept. Surgery is `project_and_merge_`; "
    "its memory traffic is that of reading both gradients twice and writing one, 5/3 of the time of `y += alpha * x` "
    "on one vector. Peers make new vectors; on the CPU they get memory that was used before. torchjd's time includes "
    "making the Jacobian of the two lists. The plain loop is three `torch.dot` per tensor and one foreach axpy. K: "
    'retention on every K-th step; with as many anchors as training examples, or a quarter. "auto" is past its start '
    "and at epsilon. AdamW is fused. The pass over many classes is of 512 positions of width 256, with top-64 anchors "
    "and a head that does not train."
)

FLOOR = "Surgery, as a multiple of its memory traffic"
STEP = "Whole step, as a multiple of AdamW's"
HEAD = "Retention pass over many classes, as a multiple of its distance as autograd takes it apart"
HEAD_MEMORY = "Peak memory of that pass, in copies of its logits in float32"
SMALL = "Step with retention, what it takes beyond its pass and the base's step"
WITHOUT = "Step without retention, over AdamW's own step"
MEMORY = "Peak memory over AdamW's, in copies of the gradients"
SCALING = "Scaling"


class Line(NamedTuple):
    """One line of the table.

    Attributes:
        section: Heading of the lines around it.
        label: What the reader sees.
        name: What the benchmark calls it.
        devices: On which of `DEVICES` it is measured.
        promise: Upper bound; None for none.
        promised_on: Where the bound holds; None for all devices.
        unit: Follows the number.
    """

    section: str
    label: str
    name: str
    devices: tuple[str, ...] = DEVICES
    promise: float | None = None
    promised_on: str | None = None
    unit: str = ""


LINES = (
    Line(FLOOR, "GPT-2 124M, float32", "surgery, GPT-2 124M, float32", promise=1.5, promised_on="cpu"),
    Line(FLOOR, "the same without a compiler", "surgery without a compiler, GPT-2 124M, float32", promise=2.1,
         promised_on="cpu"),
    Line(FLOOR, "GPT-2 124M, bfloat16", "surgery, GPT-2 124M, bfloat16", ("cuda",)),
    Line(FLOOR, "PaliGemma 3B, bfloat16", "surgery, PaliGemma 3B, bfloat16", ("cuda",), 1.2),
    Line(FLOOR, "PaliGemma 3B, float32", "surgery, PaliGemma 3B, float32", ("cuda",)),
    Line(FLOOR, "peer: a plain loop, GPT-2 124M", "plain loop, GPT-2 124M, float32"),
    Line(FLOOR, "peer: PCGrad by flattening, GPT-2 124M", "PCGrad by flattening, GPT-2 124M, float32"),
    Line(FLOOR, "peer: torchjd's PCGrad, GPT-2 124M", "torchjd's PCGrad, GPT-2 124M, float32"),
    Line(FLOOR, "peer: torchjd's UPGrad, GPT-2 124M", "torchjd's UPGrad, GPT-2 124M, float32"),
    Line(FLOOR, "peer: the published loop, GPT-2 124M", "published loop, GPT-2 124M, float32"),
    Line(FLOOR, "2,000 tensors of 4,096 elements, float32", "surgery, 2,000 x 4,096, float32", promise=2.5,
         promised_on="cpu"),
    Line(FLOOR, "the same without a compiler", "surgery without a compiler, 2,000 x 4,096, float32"),
    Line(FLOOR, "peer: a plain loop, 2,000 tensors of 4,096", "plain loop, 2,000 x 4,096, float32"),
    Line(FLOOR, "peer: PCGrad by flattening, 2,000 tensors of 4,096", "PCGrad by flattening, 2,000 x 4,096, float32"),
    Line(FLOOR, "peer: the published loop, 2,000 tensors of 4,096", "published loop, 2,000 x 4,096, float32"),
    Line(FLOOR, "2,000 tensors of 1,024 elements, float32", "surgery, 2,000 x 1,024, float32"),
    Line(FLOOR, "peer: a plain loop, 2,000 tensors of 1,024", "plain loop, 2,000 x 1,024, float32"),
    Line(STEP, "GPT-2 124M, K = 1", "step of GPT-2 124M, K = 1"),
    Line(STEP, "GPT-2 124M, K = 1, a quarter of the anchors", "step of GPT-2 124M, K = 1, quarter of the anchors"),
    Line(STEP, "GPT-2 124M, K = 5", "step of GPT-2 124M, K = 5"),
    Line(STEP, 'GPT-2 124M, "auto"', "step of GPT-2 124M, auto, at epsilon", promise=1.5, promised_on="cpu"),
    Line(STEP, "small pi0_fast, K = 1", "step of the small pi0_fast, K = 1"),
    Line(STEP, "small pi0_fast, K = 1, a quarter of the anchors",
         "step of the small pi0_fast, K = 1, quarter of the anchors"),
    Line(STEP, "small pi0_fast, K = 5", "step of the small pi0_fast, K = 5"),
    Line(STEP, 'small pi0_fast, "auto"', "step of the small pi0_fast, auto, at epsilon"),
    Line(STEP, "pi0_fast 3B, K = 5", "step of pi0_fast 3B, K = 5", ("cuda",), 1.15),
    Line(HEAD, "257,152 classes", "pass over 257152 classes", promise=0.75, promised_on="cpu"),
    Line(HEAD, "49,152 classes", "pass over 49152 classes", promise=1.0, promised_on="cpu"),
    Line(HEAD, "1,000 classes", "pass over 1000 classes"),
    Line(HEAD, "257,152 classes, of a head that is not found", "pass over 257152 classes, logits given"),
    Line(HEAD_MEMORY, "257,152 classes", "memory, pass over 257152 classes", promise=0.3, promised_on="cpu"),
    Line(HEAD_MEMORY, "257,152 classes, of a head that is not found", "memory, pass over 257152 classes, logits given",
         promise=2.6, promised_on="cpu"),
    Line(HEAD_MEMORY, "49,152 classes", "memory, pass over 49152 classes"),
    Line(HEAD_MEMORY, "peer: as autograd takes it apart, 257,152 classes",
         "memory, the formula's pass over 257152 classes"),
    Line(HEAD_MEMORY, "peer: a plain KL penalty, 257,152 classes", "memory, plain KL's pass over 257152 classes"),
    Line(SMALL, "100 tensors of 64 elements", "step with retention, added to pass and base, 100 small tensors",
         promise=1.0, promised_on="cpu", unit=" ms"),
    Line(SMALL, "1,000 tensors of 64 elements", "step with retention, added to pass and base, 1000 small tensors",
         promise=6.0, promised_on="cpu", unit=" ms"),
    Line(WITHOUT, "GPT-2's 148 tensors", "step without retention, GPT-2 124M", promise=1.01),
    Line(WITHOUT, "a tiny model, added microseconds", "step without retention, added to a tiny model's", promise=20.0,
         unit=" us"),
    Line(MEMORY, "default", "memory, default", promise=1.0),
    Line(MEMORY, '`gradient_memory="bfloat16"`', "memory, bfloat16"),
    Line(MEMORY, '`gradient_memory="host"`', "memory, host", ("cuda",)),
    Line(MEMORY, "peer: the published loop", "memory, published loop"),
    Line(SCALING, "surgery over its traffic, 100 tensors, 1 M elements", "surgery, 1 M elements in 100 tensors"),
    Line(SCALING, "surgery over its traffic, 100 tensors, 64 M elements", "surgery, 64 M elements in 100 tensors"),
    Line(SCALING, "surgery over its traffic, 16 M elements in 1 tensor", "surgery, 16 M elements in 1 tensor"),
    Line(SCALING, "surgery over its traffic, 16 M elements in 10,000 tensors",
         "surgery, 16 M elements in 10,000 tensors"),
    Line(SCALING, "AdamW's step on 2 processes over 1", "step of AdamW, 2 processes", ("cpu",)),
    Line(SCALING, "CRaFT's step (K = 1) on 2 processes over 1", "step of CRaFT, 2 processes", ("cpu",)),
)  # fmt: skip
_PROMISES = {line.name: line.promise for line in LINES if line.promise is not None}


def promise_of(name: str) -> str:
    """What is promised of a benchmark's number, such as "<= 1.5"; empty if nothing is."""
    return f"<= {_PROMISES[name]:g}" if name in _PROMISES else ""


def results_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run: its numbers, and of the machine what they depend on.

    Args:
        run: pytest-benchmark's JSON of `pytest benchmarks`.

    Returns:
        `{"machine": {...}, "rows": [{"group", "name", "value", ...}]}`.

    Raises:
        ValueError: If two rows have one name: the table could not tell them apart.
    """
    machine = run["machine_info"]
    kept = ("device", "device_name", "torch", "threads", "python_version", "compiler", "system")
    rows = [
        {"group": benchmark["group"], **row}
        for benchmark in run["benchmarks"]
        for row in benchmark["extra_info"].get("rows", ())
    ]
    names = [row["name"] for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Each row of a run needs a name of its own. Found twice: {', '.join(twice)}. Rename one.")
    return {
        "machine": {"cpu": machine["cpu"].get("brand_raw", ""), **{key: machine[key] for key in kept}},
        "rows": rows,
    }


def updated(old: Mapping[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The new results, and of the old ones the groups that the new run has not measured.

    Args:
        old: What was kept so far, if anything.
        new: From `results_of`.

    Raises:
        ValueError: If there are such groups and they come from another machine, torch or number of threads.
    """
    measured = {row["group"] for row in new["rows"]}
    rest = [row for row in old["rows"] if row["group"] not in measured] if old else []
    if rest and old and old["machine"] != new["machine"]:
        different = sorted(key for key, value in new["machine"].items() if old["machine"].get(key) != value)
        raise ValueError(
            f"The run has measured {', '.join(sorted(measured))} only, and the other groups' numbers are of another "
            f"machine or installation ({', '.join(different)} differ). Run all: make bench."
        )
    return {"machine": new["machine"], "rows": rest + new["rows"]}


def read_results() -> dict[str, dict[str, Any]]:
    """What was kept of the last run on each device that has one."""
    files = {device: RESULTS / f"{device}.json" for device in DEVICES}
    return {device: json.loads(file.read_text("utf-8")) for device, file in files.items() if file.exists()}


def render(results: Mapping[str, Mapping[str, Any]], lines: Sequence[Line] = LINES) -> str:
    """The table in Markdown, and a sentence about the machines. A number that breaks its promise is bold."""
    values = {device: {row["name"]: _number(row, device) for row in kept["rows"]} for device, kept in results.items()}
    titles = [_title(device, results.get(device)) for device in DEVICES]
    text = [f"| | {' | '.join(titles)} | promised |", "|---|" + "---:|" * (len(DEVICES) + 1)]
    for section, of_section in groupby(lines, lambda line: line.section):
        text.append(f"| *{section}* |{' |' * (len(DEVICES) + 1)}")
        for line in of_section:
            cells = [_cell(line, device, values.get(device, {}).get(line.name)) for device in DEVICES]
            text.append(f"| {line.label} | {' | '.join(cells)} | {_promised(line)} |")
    return "\n".join([*text, "", *map(_about, results.values()), "", LEGEND, ""])


def _number(row: Mapping[str, Any], device: str) -> float:
    """On a GPU the clock; on a CPU the processor's time where it is known."""
    number: float = row["value"] if device != "cpu" or row["cpu"] is None else row["cpu"]
    return number


def _title(device: str, kept: Mapping[str, Any] | None) -> str:
    return device.upper() if kept is None else f"{device.upper()}: {kept['machine']['device_name']}"


def _cell(line: Line, device: str, value: float | None) -> str:
    if device not in line.devices:
        return "-"
    if value is None:
        return NOT_MEASURED
    text = f"{value:.3g}" if value >= 100.0 else f"{value:.2f}"
    # The number that is shown is the one that counts: 1.0004 copies are one.
    broken = line.promise is not None and line.promised_on in (None, device) and float(text) > line.promise
    return f"**{text}{line.unit}**" if broken else f"{text}{line.unit}"


def _promised(line: Line) -> str:
    if line.promise is None:
        return ""
    where = f" ({line.promised_on.upper()})" if line.promised_on else ""
    return f"<= {line.promise:g}{line.unit}{where}"


def _about(kept: Mapping[str, Any]) -> str:
    machine = kept["machine"]
    compiler = machine["compiler"] or "no compiler"
    return (
        f"{machine['device'].upper()}: {machine['device_name']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] != 1 else ''}, {machine['system']}, Python {machine['python_version']}, "
        f"torch {machine['torch']}, {compiler}."
    )


def with_table(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """The text of a page with this table between its marks.

    Raises:
        ValueError: If the marks are not there, once each and in order.
    """
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in rest or end in after:
        raise ValueError(f"The text must have {begin.strip()!r} and, after it, {end!r}, once each. Put them there.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main(arguments: Sequence[str]) -> None:
    """Keeps what matters of a run, if one is given, and writes the table."""
    if arguments:
        kept = results_of(json.loads(Path(arguments[0]).read_text("utf-8")))
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{kept['machine']['device']}.json"
        kept = updated(json.loads(file.read_text("utf-8")) if file.exists() else None, kept)
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text("utf-8"), render(read_results())), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
