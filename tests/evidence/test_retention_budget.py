"""The table of costs and drifts: how costs are measured and summed up, and the script at a tiny size."""

import csv
import json
from statistics import fmean

import pytest

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")

import retention_budget as budget


class Clock:
    """CPU time as the functions say, and who was called when."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(budget.time, "process_time", lambda: self.now)

    def taking(self, name, seconds):
        def function(number):
            self.calls.append((name, number))
            self.now += seconds(number)

        return function


def test_costs_are_ratios_of_rounds_in_which_both_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    ours = clock.taking("ours", lambda n: 1000.0 if n < 2 else 8.0 if n % 2 else 4.0)  # the first round warms up
    plain = clock.taking("plain", lambda n: 2.0 if n < 4 else 4.0)
    before = clock.taking("before", lambda n: 50.0)
    assert budget.in_turns(ours, plain, length=2, rounds=2, before=before) == [3.0, 1.5]
    assert clock.calls[:6] == [
        *[("before", 0), ("plain", 0), ("ours", 0)],
        *[("before", 1), ("ours", 1), ("plain", 1)],
    ]
    assert len(clock.calls) == 3 * 6


@pytest.mark.parametrize(("every", "steps"), [(0, 10), (1, 10), (2, 10), (3, 12), (5, 10), (10, 10), (16, 16)])
def test_a_round_has_whole_periods(every, steps):
    assert budget.whole_periods(every) == steps


def test_means_over_seeds_and_the_median_over_all_rounds():
    first = {"costs": [1.0, 2.0, 9.0], "drift_anchor": 0.1, "drift_heldout": 1.0, "drift_highest": 0.2, "loss": 3.0}
    second = {"costs": [3.0, 4.0], "drift_anchor": 0.3, "drift_heldout": 2.0, "drift_highest": 0.6, "loss": 4.0}
    row = budget.summarise(budget.Point(5, 8), [first, second])
    assert (row["retention_every"], row["anchor_batch"]) == (5, 8)
    assert row["cost"] == 3.0
    assert row["cost_spread"] == pytest.approx((6.5 - 1.5) / 2)
    assert row["drift_anchor"] == pytest.approx(0.2)
    assert row["drift_anchor_per_seed"] == [0.1, 0.3]
    assert (row["drift_heldout"], row["drift_highest"], row["loss"]) == (1.5, pytest.approx(0.4), 3.5)


@pytest.mark.evidence
def test_one_round_has_no_spread(capsys):
    with pytest.raises(SystemExit):
        budget.parse(["--seeds=1", "--rounds=1"])
    assert "--rounds must be 2 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        budget.parse(["--every", "0"])
    assert "must be 1 or more, found 0" in capsys.readouterr().err


def test_a_tiny_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "ROUND", 2)
    monkeypatch.setenv("COLUMNS", "200")
    work, results = tmp_path / "work", tmp_path / "results"
    tiny = ["--seeds=1", "--steps=4", "--rounds=2", "--episodes=5", f"--work={work}", f"--results={results}"]
    batches, made = [], budget.craft.retention_of
    monkeypatch.setattr(
        budget.craft,
        "retention_of",
        lambda p, c, args, s: batches.append(args.anchor_batch_size) or made(p, c, args, s),
    )

    budget.main([*tiny, "--every", "1", "--anchor-batches", "4"])
    result = budget.main([*tiny, "--every", "1", "2", "--anchor-batches", "4"])  # the anchors are there, one point not
    printed = capsys.readouterr().out
    assert "every-1-anchors-4-seed0: done before" in printed
    assert "every-2-anchors-4-seed0: done before" not in printed
    assert batches[-3:] == [4, 4, 4]

    first, second = result["points"]
    assert [(row["retention_every"], row["anchor_batch"]) for row in result["points"]] == [(1, 4), (2, 4)]
    # Of four anchors beside sixteen frames about 1.45 and 1.2; these are few steps
    assert first["cost"] > 1.1
    assert result["adamw"]["cost"] == pytest.approx(1.0, abs=0.2)
    rows = {}
    for name, folder in (("adamw", "adamw"), *((f"craft{k}", f"every-{k}-anchors-4") for k in (1, 2))):
        (file,) = (work / folder / "runs").glob("*-seed0/metrics.jsonl")
        rows[name] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["fresh"] for row in rows["craft1"]] == [1, 1, 1, 1]
    assert [row["fresh"] for row in rows["craft2"]] == [1, 0, 1, 0]
    assert second["loss"] == pytest.approx(fmean(row["loss"] for row in rows["craft2"]))
    assert second["drift_highest"] == max(row["drift_anchors"] for row in rows["craft2"] if "drift_anchors" in row)
    drifts = [row["drift_anchor"] for row in (result["adamw"], first, second)]
    assert all(drift > 1e-5 for drift in drifts)
    assert len(set(drifts)) == 3
    assert all(row["drift_heldout"] != row["drift_anchor"] for row in result["points"])

    assert json.loads((results / "retention-budget.json").read_text()) == result
    with (results / "retention-budget.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["retention_every"] for row in found] == ["0", "1", "2"]
    assert float(found[2]["drift_heldout"]) == second["drift_heldout"]
    assert (results / "retention-budget.png").stat().st_size > 10_000
    assert f"{second['drift_heldout']:.4f}" in printed

    monkeypatch.setattr(budget, "Bench", None)  # nothing is loaded where nothing has to run
    assert budget.main([*tiny, "--every", "1", "2", "--anchor-batches", "4"]) == result
