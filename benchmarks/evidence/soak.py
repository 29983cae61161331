"""Thousands of steps of everything that keeps something from one step to the next: does anything grow?

    python benchmarks/evidence/soak.py                # 5,000 steps of each case: minutes
    python benchmarks/evidence/soak.py --steps=100    # a quick look

Each case is a process of its own (several, `--processes`, where it says so) that trains a toy model. At a tenth, at the
half and at the end of its steps it counts what it holds. The last line says whether anything has grown since the first
count, or memory since the second; then the script fails.
"""

import argparse
import copy
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import _paths  # noqa: F401  (puts benchmarks/ on the path)
import torch
import torch.distributed as dist
from markdown_table import markdown_table
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from craft_optim import CraftOptimizer, HeldOutDrift
from craft_optim.anchors import (
    BernoulliRetention,
    CombinedRetention,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    OutputRetention,
    Reading,
    Snapshot,
    TokenRetention,
    build,
)
from craft_optim.metrics import JSONLWriter
from craft_optim.schedules import Linear

# MB that a process may take between the half and the end: what glibc's heap and Python's pools waver by; and tensors of
# batches that other threads are reading.
SLACK, READ = 1.0, 4


class Counts(NamedTuple):
    """What one process holds.

    Attributes:
        memory: Resident, in MB.
        tensors: Alive in Python.
        nodes: Of autograd's graphs, that those tensors keep.
        threads: Of the process, those of torch among them.
        files: Open descriptors.
        hooks: Of the model's modules and parameters, and of the optimizer and its base.
    """

    memory: float
    tensors: int
    nodes: int
    threads: int
    files: int
    hooks: int


class Run(NamedTuple):
    """A case that is set up: the model, its optimizer and what to do in each step."""

    model: nn.Module
    optimizer: CraftOptimizer
    step: Callable[[int], Any]


def counts(run: Run) -> Counts:
    """What this process holds now."""
    gc.collect()
    held = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    owners = chain(run.model.modules(), run.model.parameters(), (run.optimizer, run.optimizer.base_optimizer))
    tables = [table for one in owners for name, table in vars(one).items() if name.endswith("_hooks")]
    tables += [p._backward_hooks for p in run.model.parameters()]  # not among their vars
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Counts(
        pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        len(held),
        len({node for x in held for node in _nodes(x)}),
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        sum(len(table) for table in tables if table),
    )


def _nodes(tensor: Tensor) -> Iterator[Any]:
    waiting = [tensor.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None:
            yield node
            waiting += [following for following, _ in node.next_functions]


def grown(rows: Sequence[Counts]) -> list[str]:
    """Names of what has grown, of three counts."""
    first, half, last = rows
    found = [
        name for name in Counts._fields[1:] if getattr(last, name) > getattr(first, name) + READ * (name == "tensors")
    ]
    return ["memory", *found] if last.memory > half.memory + SLACK else found


# -- the cases ---------------------------------------------------------------------------------------------------------

INPUTS: Any = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
CLASSES = Reading(class_dim=-1)
WORDS: Any = torch.randint(20, (64, 6), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A small network with dropout; checkpointing as asked."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(8, 16), reentrant
        self.body = nn.Sequential(nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.body(h) if self.reentrant is None else checkpoint(self.body, h, use_reentrant=self.reentrant)
        return self.head(h)  # type: ignore[no-any-return]


def training(
    model: nn.Module, retention: Any, inputs: Tensor = INPUTS, base: Any = torch.optim.AdamW, **settings: Any
) -> Run:
    """A plain loop."""
    base = base(model.parameters(), lr=1e-3)
    optimizer = CraftOptimizer(base, retention, **({"epsilon": 0.05} | settings))

    def step(number: int) -> None:
        optimizer.zero_grad()
        model(inputs[number % 8 :: 8]).square().mean().backward()
        optimizer.step()

    return Run(model, optimizer, step)


def on_cache(kind: Any = LogitRetention, workers: int = 1, **fields: Any) -> Callable[[Path], Run]:
    def case(folder: Path) -> Run:
        model = Net()
        cache = build(model, INPUTS.split(16), folder, **({"class_dim": -1} | fields))
        return training(model, kind(model, cache, 8, workers=workers))

    return case


def tokens(folder: Path) -> Run:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))

    def generate(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        return batch, model(batch).argmax(-1)

    cache = build(model, WORDS.split(16), folder, tokens=generate)
    return training(model, TokenRetention(model, cache, 8), WORDS)


def combined(folder: Path) -> Run:
    model = Net()
    cache = build(model, INPUTS.split(16), folder, class_dim=-1, layers=["body"])
    parts = {"logits": LogitRetention(model, cache, 8), "hidden": HiddenRetention(model, cache, 8)}
    return training(model, CombinedRetention(parts))


def online(folder: Path) -> Run:
    model = Net()
    teacher = copy.deepcopy(model).requires_grad_(False)
    return training(model, OnlineRetention(model, INPUTS, 8, teacher=teacher, reading=CLASSES))


def snapshot(folder: Path) -> Run:
    model = Net()
    return training(model, OnlineRetention(model, INPUTS, 8, teacher=Snapshot(model), reading=CLASSES))


def several(folder: Path) -> Run:
    model = Net()
    cache = build(model, INPUTS.split(16), folder, class_dim=-1, layers=["body"])
    closures = {"logits": LogitRetention(model, cache, 8), "hidden": HiddenRetention(model, cache, 8)}
    rules: dict[str, Any] = {"retention_every": 2, "max_grad_norm": 1.0, "gradient_memory": "bfloat16"}
    return training(model, closures, epsilon=Linear(0.1, 0.05, 1000), **rules)


def checkpointing(reentrant: bool) -> Callable[[Path], Run]:
    def case(folder: Path) -> Run:
        model = Net(reentrant)
        return training(model, LogitRetention(model, build(model, INPUTS.split(16), folder, class_dim=-1), 8))

    return case


def line_search(folder: Path) -> Run:
    model = Net()
    cache = build(model, INPUTS.split(16), folder, class_dim=-1)

    def base(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=lr, max_iter=3)

    run = training(model, LogitRetention(model, cache, 8), base=base)

    def step(number: int) -> None:
        def evaluate() -> Any:
            run.optimizer.zero_grad()
            loss: Any = model(INPUTS[number % 8 :: 8]).square().mean()
            loss.backward()
            return loss

        run.optimizer.step(evaluate)

    return run._replace(step=step)


def sinks(folder: Path) -> Run:
    model = Net()
    cache, others = (build(model, x.split(16), folder / str(n), class_dim=-1) for n, x in enumerate(INPUTS.split(32)))
    retention = LogitRetention(model, cache, 8)
    sink = HeldOutDrift(retention, others, every=10, factor=1e9, sink=JSONLWriter(folder / "metrics.jsonl"))
    return training(model, retention, on_metrics=sink)


def float16(folder: Path) -> Run:
    model = Net()
    cache = build(model, INPUTS.split(16), folder, class_dim=-1, autocast=torch.float16)
    run = training(model, LogitRetention(model, cache, 8))
    scaler = GradScaler("cpu", init_scale=256.0)

    def step(number: int) -> None:
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(INPUTS[number % 8 :: 8]).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()

    return run._replace(step=step)


def compiled(folder: Path) -> Run:
    model: Any = torch.compile(Net(), backend="aot_eager")
    return training(model, LogitRetention(model, build(model, INPUTS.split(16), folder, class_dim=-1), 8))


def failing(folder: Path) -> Run:
    """Every third pass runs out of memory, once in its forward and once in its backward."""
    model = Net(reentrant=False)
    run = training(model, LogitRetention(model, build(model, INPUTS.split(16), folder, class_dim=-1), 8))
    calls = {"left": -1}

    def fail(*_: Any) -> None:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise RuntimeError("out of memory")

    model.body.register_forward_pre_hook(fail)  # runs in the task's forward and backward, then in the pass's

    def step(number: int) -> None:
        calls["left"] = {0: 3, 1: 4}.get(number % 6, -1)
        with suppress(RuntimeError):
            run.step(number)

    return run._replace(step=step)


def saved(folder: Path) -> Run:
    """Every fifth step is saved and loaded, and has a new closure, which reads ahead with threads of its own."""
    model = Net()
    cache = build(model, INPUTS.split(16), folder, class_dim=-1)
    run = training(model, LogitRetention(model, cache, 8))

    def step(number: int) -> None:
        run.step(number)
        if number % 5 == 0:
            torch.save(run.optimizer.state_dict(), folder / "state.pt")
            run.optimizer.retention_closure = LogitRetention(model, cache, 8, workers=2, strict=False)
            run.optimizer.load_state_dict(torch.load(folder / "state.pt"))

    return run._replace(step=step)


def parallel(folder: Path) -> Run:
    model = DistributedDataParallel(Net())
    cache = build(model, INPUTS.split(16), folder, class_dim=-1)
    return training(model, LogitRetention(model, cache, 8))


def parallel_several(folder: Path) -> Run:
    model = DistributedDataParallel(Net())
    cache = build(model, INPUTS.split(16), folder, class_dim=-1, layers=["body"])
    closures = {"logits": LogitRetention(model, cache, 8, workers=2), "hidden": HiddenRetention(model, cache, 8)}
    return training(model, closures)


ALONE: dict[str, Callable[[Path], Run]] = {
    "LogitRetention": on_cache(),
    "LogitRetention, 2 workers": on_cache(workers=2),
    "BernoulliRetention": on_cache(BernoulliRetention, output="labels", class_dim=None),
    "OutputRetention": on_cache(OutputRetention, output="values", class_dim=None),
    "HiddenRetention": on_cache(HiddenRetention, output=None, class_dim=None, layers=["body"]),
    "TokenRetention": tokens,
    "CombinedRetention": combined,
    "OnlineRetention, a module": online,
    "OnlineRetention, Snapshot": snapshot,
    "two constraints, every 2nd step, bfloat16": several,
    "checkpointing, reentrant": checkpointing(True),
    "checkpointing, not reentrant": checkpointing(False),
    "LBFGS": line_search,
    "JSONLWriter, HeldOutDrift": sinks,
    "GradScaler, float16": float16,
    "torch.compile": compiled,
    "passes that fail": failing,
    "saved, loaded, closure set": saved,
}
TOGETHER: dict[str, Callable[[Path], Run]] = {"DDP": parallel, "DDP, two constraints": parallel_several}


# -- running them ------------------------------------------------------------------------------------------------------


def work(name: str, steps: int, rank: int, processes: int, folder: Path, answer: Any) -> None:
    """One process of a case: sends its three counts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name in TOGETHER:
        store = FileStore(str(folder / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    run = (ALONE | TOGETHER)[name](folder / "anchors")
    marks, found = (steps // 10, steps // 2, steps), []
    for number in range(steps):
        run.step(number)
        if number + 1 in marks:
            found.append(counts(run))
    answer.send(found)
    if name in TOGETHER:
        dist.barrier()
        dist.destroy_process_group()


def soak(name: str, steps: int, processes: int) -> list[list[Counts]]:
    """The counts of each process of a case."""
    count, folder = processes if name in TOGETHER else 1, Path(tempfile.mkdtemp())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # the imports take longer than most cases
    started = []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, steps, rank, count, folder, there))
        process.start()
        there.close()
        started.append((process, here))
    try:
        return [here.recv() for _, here in started]
    finally:
        for process, _ in started:
            process.join()
        shutil.rmtree(folder)


def cell(rows: Sequence[Counts], name: str) -> str:
    """The three counts of one thing; one number if they are the same."""
    values = [f"{getattr(row, name):.1f}" if name == "memory" else str(getattr(row, name)) for row in rows]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps of each case, >= 10")
    parser.add_argument("--processes", type=int, default=2, help="of the cases with several")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    asked = parser.parse_args(arguments)
    table, leaks = [], []
    for name in [name for name in ALONE | TOGETHER if asked.only in name]:
        for rank, rows in enumerate(soak(name, asked.steps, asked.processes)):
            whole = f"{name}, rank {rank}" if name in TOGETHER else name
            table.append([whole, *(cell(rows, what) for what in Counts._fields)])
            leaks += [f"{whole}: {', '.join(found)}"] if (found := grown(rows)) else []
            print(f"{whole}: {rows[-1]}", file=sys.stderr, flush=True)
    header = ["case", "resident MB", "tensors", "graph nodes", "threads", "files", "hooks"]
    print(markdown_table(header, table))
    print(f"\n{asked.steps} steps. " + ("Nothing has grown." if not leaks else f"Grown: {'; '.join(leaks)}."))
    return bool(leaks)


if __name__ == "__main__":
    sys.exit(main())
