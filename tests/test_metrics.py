"""Sinks of metrics: files and trackers."""

import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import pytest
import torch

from craft_optim import CraftOptimizer
from craft_optim.metrics import METRICS, JSONLWriter, LogTo, TensorBoardWriter


def trained(sink, steps=6, every=2, before=lambda step, loss: None):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = CraftOptimizer(
        torch.optim.SGD([weight], lr=0.1), lambda: weight.square().mean(), retention_every=every, on_metrics=sink
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        before(step, loss)
        optimizer.step()
    return optimizer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_say_when_they_were_written(tmp_path):
    begun = time.time()
    writer = JSONLWriter(tmp_path / "m.jsonl")
    trained(writer)
    times = [row["time"] for row in lines(tmp_path / "m.jsonl")]
    assert len(times) == 3
    assert begun - 0.01 <= times[0] <= times[1] <= times[2] <= time.time() + 0.01


def test_values_of_ones_own(tmp_path):
    writer = JSONLWriter(tmp_path / "m.jsonl")
    losses = []

    def before(step, loss):
        losses.append(loss.item())
        if step < 3:
            writer.log(loss=loss, method="mine", seed=1)
            writer.log(lr=0.1, bad=math.inf)

    trained(writer, before=before)
    first, second, third = lines(tmp_path / "m.jsonl")
    assert [*first][:5] == ["loss", "method", "seed", "lr", "bad"]
    assert (first["loss"], first["method"], first["seed"], first["lr"], first["bad"]) == (
        losses[0],
        "mine",
        1,
        0.1,
        None,
    )
    assert second["loss"] == losses[2], "of the steps between rows, the last"
    assert "loss" not in third
    assert set(METRICS) - OF_HELD_OUT_ANCHORS < set(first)


OF_HELD_OUT_ANCHORS = {"heldout", "epsilon_heldout"}
ROW = {"retention_step": 0.0, "retention_loss": 1.0}


@pytest.mark.parametrize(
    ("there", "whole"),
    [
        (b"", 0),
        (b'{"step": 1}\n', 1),
        (b'{"step": 1}\n{"st', 1),
        (b'{"step": 1}\n{"step": 2}', 2),  # only its end is missing
        (b'{"step": 1}\n{"text": "\xc3', 1),
        (b"{", 0),
        (b"\n", 0),
    ],
)
def test_a_line_that_a_run_was_killed_in_costs_no_other(there, whole, tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_bytes(there)
    for _ in range(2):
        writer = JSONLWriter(file)
        writer(ROW)
        writer.close()
    assert file.read_bytes().startswith(there)
    read = []
    for line in file.read_bytes().splitlines():
        with suppress(ValueError):
            read.append(json.loads(line))
    assert len(read) == whole + 2
    assert [row["retention_loss"] for row in read[whole:]] == [1.0, 1.0]


def test_a_writer_that_is_let_go_closes_its_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        writer = JSONLWriter(tmp_path / "m.jsonl")
        writer(ROW)
        file = writer._file
        del writer
        gc.collect()
        assert file.closed


def test_the_graph_is_not_kept():
    class Kept(JSONLWriter):
        def __init__(self):
            self._waiting = {}

    writer = Kept()
    writer.log(loss=torch.ones((), requires_grad=True) * 2)
    assert writer._waiting["loss"].grad_fn is None


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    seen = []
    with SummaryWriter(str(tmp_path)) as writer:
        board = TensorBoardWriter(writer)
        trained(lambda metrics: (board(metrics), seen.append(metrics)))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"craft/{name}" for name in METRICS} - {
        "craft/fresh",
        "craft/heldout",
        "craft/epsilon_heldout",
    }
    for name in ("retention_loss", "lambda", "grad_cos"):
        found = events.Scalars(f"craft/{name}")
        assert [event.step for event in found] == [0, 2, 4]
        assert [event.value for event in found] == pytest.approx([row[name] for row in seen], rel=1e-6)


def test_a_tracker_that_takes_a_dict():
    calls = []
    trained(LogTo(lambda values: calls.append(values), prefix="c/"))
    assert [values["c/retention_step"] for values in calls] == [0, 2, 4]
    assert {*calls[0]} == {f"c/{name}" for name in METRICS} - {"c/fresh", "c/heldout", "c/epsilon_heldout"}


def test_a_tracker_that_is_told_the_step():
    calls = []
    trained(LogTo(lambda values, global_step: calls.append((global_step, values)), step="global_step"))
    assert [(step, type(step)) for step, _ in calls] == [(0, int), (2, int), (4, int)]
    assert all(name.startswith("craft/") for name in calls[0][1])


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"such as `run.log`. Found str"):
        LogTo("run")


TRACKIO = """
import sys, trackio
from craft_optim.metrics import METRICS, LogTo

run = trackio.init(project="p", name="r")
sink = LogTo(run.log, step="step")
for step in (0, 5):
    sink({**dict.fromkeys(METRICS, 0.25), "retention_step": float(step)})
trackio.finish()
"""


def test_trackio(tmp_path):
    pytest.importorskip("trackio", reason="pip install trackio")
    import sqlite3

    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", TRACKIO], env=environment, check=True, capture_output=True)
    with sqlite3.connect(tmp_path / "p.db") as database:
        found = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in found] == [0, 5]
    assert json.loads(found[1][1])["craft/retention_loss"] == 0.25
