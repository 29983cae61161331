"""The benchmark on a robot policy of many skills, in its smallest form."""

import functools
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")
pytest.importorskip("peft")

import separate_runs
from metaworld_pi0_fast import NEW_TASK, OLD_TASKS, environment
from metaworld_pi0_fast.rollouts import Rollouts
from skills import command, continuous, runs, setup, summary
from skills.figure import draw
from skills.methods import IN_PI0, IN_SCENES, IN_SEQUENCE, METHODS

KEPT = Path(command.SCRIPT).parent / "results" / command.NAME
KNOWN = OLD_TASKS[:2]
TINY = runs.Settings(steps=3, lr=1e-3, rollouts=2, episodes=3, known=2)
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("skills")


@pytest.fixture
def made(folder, monkeypatch):
    """Makes a run in this process, without rollouts: each succeeds on the first goal alone."""

    def episodes(policy, preprocessor, postprocessor, scene, goals, seed, asked):
        return Rollouts([goal == 0 for goal in goals], [1] * len(goals))

    monkeypatch.setattr(runs, "run_episodes", episodes)

    def make(name, scenario="button"):
        file = folder / "results" / f"{scenario}-{name}-seed0.json"
        if not file.is_file():
            runs.run(BY_NAME[name], scenario, 0, TINY, folder / "work", file)
        return json.loads(file.read_text("utf-8"))

    return make


def test_what_does_not_train_does_not_move(made):
    (stage,) = made("before")["stages"]
    assert set(stage["drift_heldout"]) == set(KNOWN)
    assert stage["drift"] == pytest.approx(0.0, abs=1e-5)
    assert max(stage["drift_heldout"].values()) == pytest.approx(0.0, abs=1e-5)
    assert max(stage["drift_hidden"].values()) == pytest.approx(0.0, abs=1e-5)
    assert max(stage["actions_moved"].values()) == 0.0


@pytest.mark.parametrize("name", ["adamw", "craft"])
def test_what_trains_moves(made, name):
    (stage,) = made(name)["stages"]
    assert stage["drift"] > 0.0
    assert min(stage["drift_heldout"].values()) > 0.0
    assert list(stage["success"]) == [*KNOWN, NEW_TASK]
    assert stage["seconds"] >= stage["plain_seconds"] > 0.0  # the clock may be a coarse one
    assert ("constraint" in stage) == (name == "craft")


@pytest.mark.evidence
def test_tasks_in_turn_each_have_their_own_constraint(made):
    stages = made("craft", "sequence")["stages"]
    assert [len(stage["success"]) for stage in stages] == [3, 4, 5, 6]
    held = [{key for key in stage["constraint"][-1] if key.startswith("epsilon/")} for stage in stages]
    assert [len(names) for names in held] == [1, 2, 3, 4]


@pytest.mark.evidence
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in ("before", "adamw", "craft", "craft-joint")])
def test_every_method_learns(made, name):
    plain, (stage,) = made("adamw")["stages"][0], made(name)["stages"]
    assert 0.0 < stage["drift"] != plain["drift"]


@pytest.mark.evidence
@pytest.mark.parametrize("name", IN_SEQUENCE)
def test_every_method_learns_in_turn(made, name):
    assert len(made(name, "sequence")["stages"]) == len(runs.SCENARIOS["sequence"].tasks)


@pytest.mark.evidence
@pytest.mark.skipif(environment.gl_backend() is None, reason=environment.GL_HELP)
@pytest.mark.parametrize("name", ["before", "adamw", "craft"])
def test_a_policy_of_continuous_actions_is_made_once_and_learns(made, folder, monkeypatch, name):
    monkeypatch.setattr(continuous, "EPISODES", 6)
    monkeypatch.setattr(continuous, "load", functools.partial(continuous.load, steps=3))
    weights = folder / "work" / "pi0" / "pi0.safetensors"
    before = weights.stat().st_mtime_ns if weights.is_file() else None
    (stage,) = made(name, "pi0-faucet")["stages"]
    assert before in (None, weights.stat().st_mtime_ns)
    assert set(stage["drift_heldout"]) == set(KNOWN)
    assert (max(stage["drift_heldout"].values()) < 1e-5) == (name == "before")
    assert set(stage["other_instruction"]) == (set() if name == "before" else {"faucet-open-v3", "faucet-close-v3"})


@pytest.mark.evidence
@pytest.mark.skipif(environment.gl_backend() is None, reason=environment.GL_HELP)
def test_the_command_makes_what_is_missing_and_reports_all(folder, capsys):
    flags = ["--known=2", "--episodes=3", "--steps=3", "--rollouts=1", "--seeds=0", "--scenarios", "button", "faucet"]
    flags += ["--methods", "adamw", "craft", f"--work={folder / 'work'}", f"--results={folder / 'made'}"]
    found = command.main(flags)
    assert {run["method"] for run in found} == {"before", "adamw", "craft"}
    pairs = [run["stages"][-1]["other_instruction"] for run in found if run["scenario"] == "faucet"]
    assert [set(pair) for pair in pairs] == [{"faucet-open-v3", "faucet-close-v3"}] * 2
    assert (folder / "made.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(BY_NAME[name].label in printed for name in ("adamw", "craft"))
    assert "faucet" in printed
    command.main(flags)
    assert "button-craft-seed0: done before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings.*another --results"):
        command.main([*flags, "--steps=4"])


def test_tables_are_about_all_rollouts_of_all_seeds():
    found = [_run("before", 0, {"a-v3": [1, 1], "b-v3": [1, 1]}, [0, 0])]
    found += [_run("adamw", seed, {"a-v3": [1, seed], "b-v3": [0, 0]}, [1, 1]) for seed in (0, 1)]
    before, adamw = summary.rows_of(found)
    assert (before["old_mean"], before["new"], before["cost"]) == (1.0, 0.0, None)
    assert adamw["tasks"] == {"a-v3": 0.75, "b-v3": 0.0}
    assert (adamw["old_mean"], adamw["old_worst"], adamw["worst_task"]) == (0.375, 0.0, "b-v3")
    assert (adamw["new"], adamw["seeds"], adamw["cost"]) == (1.0, [0, 1], 1.0)
    assert "| AdamW | 2 | 1.00 " in summary.markdown(found)


def test_the_page_has_the_tables_of_the_kept_runs():
    text = command.PAGE.read_text("utf-8")
    tables = summary.markdown(separate_runs.finished(KEPT))
    expected = command.with_table(text, tables, command.BEGIN, command.END)
    assert expected == text, f"run python benchmarks/evidence/{command.NAME}.py --only-report"


def test_numbers_of_the_text_are_those_of_the_tables():
    text = command.PAGE.read_text("utf-8")
    tables, after = text.split(command.BEGIN)[1].split(command.END)
    epsilons = {"0.01", "0.05", "0.1", "0.2"}
    said = set(re.findall(r"-?\d+\.\d+", after.split("## What it shows")[1])) - epsilons
    assert len(said) > 10
    assert said <= set(re.findall(r"-?\d+\.\d+", tables))


def test_what_there_are_no_runs_for_is_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"no run to report.*--results"):
        summary.markdown([])
    (adamw,) = alone = [_run("adamw", 0, {"a-v3": [1, 1]}, [1, 1])]
    assert "predicts" not in summary.markdown(alone)
    before = _run("before", 0, {"a-v3": [1, 1]}, [1, 1]) | {"scenario": "pi0-faucet"}
    assert summary.markdown([before]).strip() == ""
    draw([before], tmp_path, "made")
    assert not list(tmp_path.iterdir())
    draw([before, adamw], tmp_path, "made")
    assert [file.name for file in tmp_path.iterdir()] == ["made.png"]


def test_what_orders_tasks_as_their_success_does_predicts_it():
    worse = [
        _run("adamw", seed, {"a-v3": [1, 1], "b-v3": [1, 0]}, [1, 1], {"a-v3": 0.1, "b-v3": 0.2}) for seed in (0, 1)
    ]
    better = _run("craft", 0, {"a-v3": [1, 1], "b-v3": [1, 1]}, [1, 1], {"a-v3": 0.05, "b-v3": 0.1})
    found = summary.predictions([*worse, better])
    assert found["drift_heldout"]["tasks"] < -0.8
    assert found["drift_heldout"]["worst"] == pytest.approx(-1.0)


def _run(method, seed, success, new, drift=None):
    tasks = {task: [bool(x) for x in of] for task, of in success.items()}
    each = drift or dict.fromkeys(tasks, 0.0)
    stage = {"success": tasks | {NEW_TASK: [bool(x) for x in new]}, "drift": max(each.values())}
    stage |= {"seconds": 0.1, "plain_seconds": 0.1}
    stage |= dict.fromkeys(summary.PREDICTORS, each)
    return {"method": method, "scenario": "button", "seed": seed, "stages": [stage]}


def test_methods_and_choices_are_of_what_there_is():
    assert len(BY_NAME) == len(METHODS)
    assert {*IN_SCENES, *IN_SEQUENCE, *IN_PI0} <= set(BY_NAME)
    for method in METHODS:
        assert method.anchors in setup.ANCHORED or method.anchors == "own"
    assert all(old in OLD_TASKS for old in runs.LOOKS_LIKE.values())
