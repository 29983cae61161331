"""What is read of a run's files."""

import json

import numpy as np
import pytest

from craft_optim.metrics import METRICS, JSONLWriter
from craft_optim.report.runs import files_of, read_file, read_runs


def only(path, **settings):
    (run,) = read_file(path, **settings)
    return run


def test_columns_over_the_steps(tmp_path, rows, write):
    run = only(write(tmp_path / "first" / "metrics.jsonl", rows(7)))
    assert (run.name, run.method, run.seed, run.notes) == ("first", "first", None, ())
    assert run.steps.tolist() == [*range(7)]
    assert run["loss"].tolist() == [row["loss"] for row in rows(7)]
    assert np.isnan(run["of no row"]).all()
    assert run["seconds"][1:].tolist() == [0.25] * 6, "from the times of the rows"
    assert np.isnan(run["seconds"][0])


def test_kept_values_are_not_measured_again(tmp_path, rows, write):
    run = only(write(tmp_path / "m.jsonl", rows(10, every=4)))
    steps, drift = run.measured("retention_loss")
    assert steps.tolist() == [0, 4, 8]
    assert drift.tolist() == [row["retention_loss"] for row in rows(10, every=4)][::4]
    assert len(run.measured("loss")[0]) == 10
    assert len(run.measured("skipped")[0]) == 10, "a count is true on every step"


def test_nulls_and_missing_keys(tmp_path, write):
    given = [
        {"step": 0, "loss": 1.0, "violation": None},
        {"step": 1, "note": "text", "deep": {"a": 1}},
        {"step": 2, "drift_anchors": 0.5},
        {"loss": 3.0},
        {"step": None, "loss": 4.0},
    ]
    run = only(write(tmp_path / "m.jsonl", given))
    assert run.steps.tolist() == [0, 1, 2]
    assert run.measured("loss")[1].tolist() == [1.0]
    assert run.measured("drift_anchors")[0].tolist() == [2]
    assert len(run.measured("violation")[0]) == 0


@pytest.mark.parametrize("end", ['\n{"step": 9, "lo', "\n"])
def test_a_killed_run(tmp_path, rows, write, end):
    run = only(write(tmp_path / "m.jsonl", rows(9), end))
    assert run.steps[-1] == 8
    assert len(run.notes) == (end != "\n")
    assert all("not complete" in note for note in run.notes)


def test_a_whole_last_line_counts_without_its_end(tmp_path, rows, write):
    run = only(write(tmp_path / "m.jsonl", rows(9), end=""))
    assert run.steps[-1] == 8
    assert run.notes == ()


def test_a_line_that_was_torn_and_written_over(tmp_path, rows, write):
    path = write(tmp_path / "m.jsonl", rows(5), '\n{"step": 5, "lo')
    path.write_text(path.read_text() + "\n".join(json.dumps(row) for row in rows(8)[5:]) + "\n")
    run = only(path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert run.notes == ("1 line(s) that are no JSON were left out.",)


def test_a_resumed_run_replaces_what_it_did_again(tmp_path, rows, write):
    first, again, last = rows(10), rows(20)[6:14], rows(20)[12:]
    for number, part in enumerate((first, again, last)):
        for row in part:
            row |= {"loss": float(number), "time": row["time"] + 1e6 * number}
    run = only(write(tmp_path / "m.jsonl", [*first, *again, *last]))
    assert run.steps.tolist() == [*range(20)]
    assert run["loss"].tolist() == [0.0] * 6 + [1.0] * 6 + [2.0] * 8
    assert run.notes == (
        "6 row(s) were left out, as their steps come again later in the file: they are from before the run was "
        "resumed, or from an earlier run that wrote to the same file.",
    )
    took = run.measured("seconds")[1]
    assert len(took) == 17
    assert set(took) == {0.25}, "the pauses are no steps"


def test_rows_of_one_step_are_one(tmp_path, write):
    given = [{"step": 5, "loss": 1.0}, {"step": 5, "eval_craft/drift_heldout": 0.1}, {"step": 9, "loss": 0.5}]
    run = only(write(tmp_path / "m.jsonl", given))
    assert run.steps.tolist() == [5, 9]
    assert run["loss"].tolist() == [1.0, 0.5]
    assert run.measured("drift_heldout")[1].tolist() == [0.1]
    assert run.notes == ()


def test_what_the_writer_writes(tmp_path):
    jsonl = JSONLWriter(tmp_path / "a.jsonl")
    for step in range(4):
        metrics = {**dict.fromkeys(METRICS, 0.5), "retention_step": 3.0 * step, "fresh": 1.0}
        jsonl.log(loss=1.0)
        jsonl(metrics)
    run = only(tmp_path / "a.jsonl")
    assert run.steps.tolist() == [0, 3, 6, 9]
    assert run["lambda"].tolist() == [0.5] * 4
    assert run["loss"].tolist() == [1.0] * 4


def test_a_run_of_lerobot_train(tmp_path, write):
    given = [{"step": s + 1, "loss": 1.0, "lr": 1e-4, "retention_loss": 0.1, "fresh": 1.0} for s in range(3)]
    given[-1] |= {"drift_anchors": 0.2, "drift_heldout": 0.3}
    folder = tmp_path / "new_task"
    write(folder / "craft" / "metrics.jsonl", given)
    (folder / "checkpoints").mkdir()
    (run,) = read_runs([str(folder)])
    assert run.name == "new_task"
    assert run.measured("drift_anchors")[1].tolist() == [0.2]
    assert run.measured("drift_heldout")[1].tolist() == [0.3]


def test_a_state_of_the_trainer(tmp_path):
    for step in (2, 10):
        history = [{"step": s, "loss": 1.0 / s, "craft/lambda": 0.5, "learning_rate": 0.1} for s in range(1, step + 1)]
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run,) = read_runs([str(tmp_path)])
    assert len(run.steps) == 10, "the last checkpoint has them all"
    assert run["lambda"].tolist() == [0.5] * 10
    assert run["lr"].tolist() == [0.1] * 10


def test_several_constraints_are_seen_one_by_one(tmp_path, write):
    row = {"step": 0, "loss": 1.0, "retention_loss": 0.9, "epsilon": 0.3, "violation": 3.0}
    row |= {"drift_heldout/old": 0.7, "drift_anchors/old": 0.15}
    row |= {"retention_loss/language": 0.9, "epsilon/language": 0.3, "retention_loss/old": 0.1, "epsilon/old": 0.2}
    first, second = read_file(write(tmp_path / "m.jsonl", [row | {"seed": 4}]), name="run")
    assert (first.name, second.name) == ("run: language seed 4", "run: old seed 4")
    assert second["retention_loss"].tolist() == [0.1]
    assert second["epsilon"].tolist() == [0.2]
    assert second["loss"].tolist() == [1.0]
    assert (second["drift_anchors"].tolist(), second["drift_heldout"].tolist()) == ([0.15], [0.7])
    assert np.isnan(first["drift_anchors"]).all()
    stale = read_file(write(tmp_path / "n.jsonl", [row, row | {"step": 1, "fresh": 0.0}]))
    assert [run.measured("retention_loss")[0].tolist() for run in stale] == [[0], [0]]


def test_a_file_of_all_and_its_parts_are_read_once(runs_folder):
    parts = [file.read_text() for file in sorted(runs_folder.glob("*/metrics.jsonl"))]
    (runs_folder.parent / "metrics.jsonl").write_text("".join(parts))
    found = read_runs([str(runs_folder.parent)])
    assert sorted(run.name for run in found) == ["adamw seed 0", "adamw seed 1", "craft seed 0", "craft seed 1"]
    assert {run.method for run in found} == {"adamw", "craft"}


def test_names(tmp_path, rows, write):
    one = write(tmp_path / "a" / "slow-seed3" / "metrics.jsonl", rows(3))
    (run,) = read_runs([str(one)])
    assert (run.name, run.method, run.seed) == ("slow seed 3", "slow", 3)
    (run,) = read_runs([f"mine={one.parent}"])
    assert (run.name, run.method) == ("mine", "mine")
    both = write(tmp_path / "a" / "all.jsonl", [*rows(3, method="x", seed=0), *rows(3, method="y", seed=0)])
    assert [run.name for run in read_runs([f"mine={both}"])] == ["mine x seed 0", "mine y seed 0"]


def test_runs_of_one_name_are_told_apart(tmp_path, rows, write):
    for place, seed in (("one", 0), ("one", 1), ("two", 0)):
        content = rows(3, method="craft", seed=seed, epsilon=0.1 if place == "one" else 0.2)
        write(tmp_path / place / "runs" / f"craft-seed{seed}" / "metrics.jsonl", content)
    found = read_runs([str(tmp_path / "one"), str(tmp_path / "two")])
    assert [run.name for run in found] == ["one/craft seed 0", "one/craft seed 1", "two/craft seed 0"]
    assert [run.method for run in found] == ["one/craft", "one/craft", "two/craft"]
    twice = write(tmp_path / "twice.jsonl", rows(3))
    other = write(tmp_path / "other.jsonl", rows(4))
    assert [run.name for run in read_runs([f"x={twice}", f"x={other}"])] == ["twice/x", "other/x"]


def test_a_folder_gives_what_looks_like_a_run(tmp_path, rows, write):
    (tmp_path / "questions.jsonl").write_text('{"question": "why?"}\n')
    (tmp_path / "broken.jsonl").write_text("\x00\xff\n", encoding="latin-1")
    (tmp_path / "empty.jsonl").touch()
    path = write(tmp_path / "deep" / "er" / "metrics.jsonl", rows(3))
    assert files_of(tmp_path) == [path]


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("gone.jsonl", None, FileNotFoundError, "There is no run"),
        ("empty.jsonl", "", ValueError, "has no rows that can be drawn"),
        ("other.jsonl", '{"question": 1}\n', ValueError, "has no rows that can be drawn"),
        ("only-steps.jsonl", '{"step": 1}\n', ValueError, "has no rows that can be drawn"),
        ("config.json", "{}", ValueError, "no trainer_state.json"),
        ("list.json", "[1]", ValueError, "no trainer_state.json"),
    ],
)
def test_what_cannot_be_read_says_so(tmp_path, name, content, kind, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=said) as caught:
        read_runs([str(tmp_path / name)])
    assert name in str(caught.value)


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no run"):
        read_runs([str(tmp_path)])
