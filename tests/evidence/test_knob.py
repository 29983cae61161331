"""The runs of `knob.py`, what is made of them, and the command at a tiny size."""

import json
import math
from dataclasses import replace
from pathlib import Path

import knob
import pytest
import torch
from pareto.prepared import SETTINGS, prepare
from pareto.setting import Recipe, divergence
from pareto_tiny import with_more_anchors
from steering import plan, problems, running, tables
from steering.cases import Case

ROOT = Path(__file__).parents[2]


def of_table(text):
    """Rows of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


@pytest.mark.evidence
def test_noise_has_mean_one_and_is_that_of_the_number():
    theta = torch.tensor(2.0, dtype=torch.float64)
    drift = problems.Parameter(theta, 0.5, seed=1)
    found = torch.stack([drift.loss(number) for number in range(20_000)]) / 4.0
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(found.std()) == pytest.approx(0.5, abs=0.02)
    assert drift.loss(7) == drift.loss(7) != drift.loss(8)
    assert problems.Parameter(theta, 0.0, seed=1).loss(3) == drift.true()


@pytest.mark.evidence
def test_all_of_a_parameters_drift_is_noted(monkeypatch):
    monkeypatch.setattr(problems, "PARAMETER_STEPS", 6)
    found = problems.run_problem(Case("parameter", 0, "1", epsilon=1.0))
    assert found["steps"] == found["passes"] == 6
    # Far below epsilon lambda's share is small: theta is about 0.001 x steps, whose square is the drift
    assert found["final"] == found["highest"] == pytest.approx((6 * 1e-3) ** 2, rel=0.05)
    assert found["mean"] == pytest.approx((16 + 25 + 36) / 3 * 1e-6, rel=0.05)


def start(monkeypatch, **changes):
    def short(seed):
        return with_more_anchors(seed, metric="cross_entropy", finetune=Recipe(20, batch_size=16, lr=5e-2), **changes)

    for name in list(SETTINGS):
        monkeypatch.delitem(SETTINGS, name)
    monkeypatch.setitem(SETTINGS, "tiny", short)
    monkeypatch.setattr(plan, "BATCH", {"tiny": 1 / 4})
    monkeypatch.setattr(tables, "BATCH", {"tiny": 1 / 4})


@pytest.mark.evidence
def test_held_out_halves_are_two_halves(monkeypatch, tmp_path):
    """Epsilon is about the half that is named, and the cache of it has its pictures."""
    start(monkeypatch)
    made, optimizer = [], running.CraftOptimizer
    monkeypatch.setattr(running, "CraftOptimizer", lambda *of, **named: made.append(named) or optimizer(*of, **named))
    found = running.run(Case("tiny", 0, "auto", share=1 / 4, heldout="odd"), tmp_path)
    prepared = prepare("tiny", 0, tmp_path)
    cache = made[0]["heldout"]
    assert torch.equal(cache.read(range(len(cache))).inputs, prepared.setting.old_test.inputs[1::2])
    assert found["drift_even"] != found["drift_odd"]


@pytest.mark.evidence
def test_the_path_is_over_all_anchors(monkeypatch, tmp_path):
    start(monkeypatch)
    models, base = [], running.base_optimizer
    monkeypatch.setattr(running, "base_optimizer", lambda model, *more: models.append(model) or base(model, *more))
    found = running.run(Case("tiny", 0, "1", share=1 / 4), tmp_path)
    prepared = prepare("tiny", 0, tmp_path)
    with torch.no_grad():
        drift = divergence(models[0](prepared.setting.anchors.inputs), prepared.teacher)
    assert found["final"] == pytest.approx(float(drift), rel=1e-5)
    assert found["highest"] >= found["final"]
    assert (found["steps"], found["passes"]) == (20, 20)


def a_run(setting="language", seed=10, every="auto", build="this", **more):
    case = Case(setting, seed, every, **{k: v for k, v in more.items() if k in Case.__dataclass_fields__})
    measured = {"steps": 100, "passes": 40, "final": 0.05, "highest": 0.1, "mean": 0.05, "P": 0.9, "R": 0.8}
    measured |= {"drift_even": 0.1, "drift_odd": 0.2, "build": build}
    return vars(case) | measured | {k: v for k, v in more.items() if k not in vars(case)}


def test_gains_are_paired_by_seed():
    at = {"share": 1 / 16}
    rows = [
        a_run(seed=10, P=0.9, R=0.5, final=0.04, passes=20, **at),
        a_run(seed=11, P=0.7, R=0.6, final=0.06, passes=60, **at),
        a_run(seed=11, every="1", P=0.6, R=0.7, **at),
        a_run(seed=10, every="1", P=0.6, R=0.5, **at),
    ]
    ((*_, passes, final, plasticity, retention),) = of_table(tables.price(rows))
    assert (passes, final) == ("0.40", "0.80 to 1.20")
    assert plasticity == "+0.200 ± 0.100"
    assert retention == "-0.050 ± 0.050"


def test_held_out_drift_is_that_of_the_half_that_is_not_steered_by():
    at = {"share": 1 / 16, "epsilon": 0.1}
    rows = [
        a_run(drift_even=0.3, drift_odd=0.4, final=0.1, **at),
        a_run(heldout="even", drift_even=9.0, drift_odd=0.11, final=0.01, **at),
        a_run(heldout="odd", drift_even=0.12, drift_odd=9.0, final=0.02, **at),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "EPSILONS", (0.1,))
        ((*_, without, aside, anchors, held, _, _, _, _),) = of_table(tables.heldout(rows))
    assert (without, aside, anchors, held) == ("3.00 to 4.00", "1.10 to 1.20", "1.00", "0.10 to 0.20")


def test_runs_that_began_differently_are_no_pair():
    plain = {
        "setting": "language",
        "seed": 10,
        "lr": 1.0,
        "new": -1.0,
        "old": -3.0,
        "new_before": -2.0,
        "old_before": -1.0,
    }
    row = a_run(new=-1.1, old=-1.2, new_before=-2.0, old_before=-1.0, chance=-3.0)
    (found,) = tables.rated([row], [plain])
    assert (found["P"], found["R"]) == pytest.approx((0.9, 0.9))
    with pytest.raises(ValueError, match="must begin alike"):
        tables.rated([row | {"old_before": -1.01}], [plain])


def test_the_earlier_build_is_asked_for_what_it_knows():
    earlier = plan.cases(["classes", "language"], [10], "earlier")
    assert {case.every for case in earlier} == {"1"}
    assert not any(case.heldout for case in earlier)
    ours = plan.cases(["classes", "language"], [10])
    assert len(set(ours)) == len(ours)
    assert {replace(case, every="auto") for case in earlier} <= set(ours)
    assert len({case.name for case in ours}) == len(ours)


def test_a_tiny_one(tmp_path, monkeypatch, capsys):
    """The other build is a copy of this one's package in another place."""
    start(monkeypatch)
    monkeypatch.setattr(problems, "PARAMETER_STEPS", 5)
    monkeypatch.setattr(problems, "NETWORK_STEPS", 5)
    monkeypatch.setattr(plan, "SCALES", (1.0,))
    monkeypatch.setattr(tables, "SCALES", (1.0,))
    elsewhere = []

    def run_here(cases, build, script, work, processes):
        elsewhere.append((build, script))
        file = tmp_path / "cases.json"
        file.write_text(json.dumps([vars(case) for case in cases]), encoding="utf-8")
        assert knob.main([f"--answer={file}", f"--work={work}", f"--jobs={processes}"]) == {}
        return json.loads(file.read_text(encoding="utf-8"))["records"]

    monkeypatch.setattr(knob, "run_elsewhere", run_here)
    monkeypatch.setattr(knob, "commit", lambda build: "abc1234")
    flags = ["--seeds", "0", "1", "--settings", "tiny", "--jobs=1", f"--work={tmp_path / 'work'}"]
    monkeypatch.setattr(knob, "SETTINGS", SETTINGS)
    result = knob.main([*flags, f"--results={tmp_path}", f"--against={ROOT}"])
    kept = json.loads((tmp_path / "knob.json").read_text(encoding="utf-8"))
    assert elsewhere == [(ROOT, Path(knob.__file__).resolve())]
    assert kept["earlier"] == "abc1234"
    assert kept["command"] == "python benchmarks/evidence/knob.py --against=PATH --seeds 0 1 --settings tiny"
    assert str(tmp_path) not in json.dumps(kept)
    assert len(kept["runs"]) == len(result["runs"])
    assert {row["build"] for row in kept["runs"]} == {"this", "earlier"}
    printed = capsys.readouterr().out
    for name, table in tables.TABLES.items():
        assert table(kept["runs"]) in printed, name
    assert all(math.isfinite(row["final"]) for row in kept["runs"])


def test_another_build_is_another_package(tmp_path):
    """A folder whose `craft_optim` is not the one that ran is refused."""
    (tmp_path / "craft_optim").mkdir()
    (tmp_path / "craft_optim" / "__init__.py").write_text("raise ImportError('another one')\n")
    with pytest.raises(RuntimeError, match=r"The runs with .* failed, with status 1"):
        running.run_elsewhere([], tmp_path, Path(knob.__file__), tmp_path, 1)


@pytest.mark.evidence
def test_what_is_no_build_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        knob.parse([f"--against={tmp_path}"])
    assert "must be a folder that has `craft_optim`" in capsys.readouterr().err
