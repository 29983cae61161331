"""Success over tasks and stages: measures by hand, files, and the command line."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install 'craft-optim[evaluation]'")

from forgetting import main
from stages import matrix as module
from stages.files import matrix_of, read_evaluation, read_matrix
from stages.matrix import (
    Cell,
    SuccessMatrix,
    average_success,
    backward_transfer,
    changes,
    forgetting,
    forward_transfer,
    measures,
    retention,
)
from stages.plot import draw_matrix

EVIDENCE = Path(module.__file__).parents[1]
TRAINED = ((), ("a",), ("b",), ("c",))
RATES = [  # before, a, b, c; "keep" is what the policy could do before, and is never trained
    [0.1, 0.2, 0.1, 0.8],
    [0.9, 0.4, 0.0, 0.7],
    [0.6, 1.0, 0.3, 0.9],
    [0.5, 0.7, 0.9, 0.6],
]


def matrix(rates=RATES, trained=TRAINED, trials=10, stages="0abc", tasks=("a", "b", "c", "keep")):
    cells = tuple(tuple(None if rate is None else Cell(rate, trials) for rate in row) for row in rates)
    return SuccessMatrix(tuple(stages), tasks, trained, cells)


def test_the_measures_by_hand():
    found = {measure.name: measure for measure in measures(matrix())}
    expected = {
        "average success": {"a": 0.5, "b": 0.7, "c": 0.9, "keep": 0.6},
        "backward transfer": {"a": 0.5 - 0.9, "b": 0.7 - 1.0},
        "forgetting": {"a": 0.9 - 0.5, "b": 1.0 - 0.7, "keep": 0.9 - 0.6},
        "forward transfer": {"b": 0.4 - 0.2, "c": 0.3 - 0.1},
        "retention": {"keep": 0.6 / 0.8},
    }
    assert list(found) == list(expected)
    for name, each in expected.items():
        assert found[name].each == pytest.approx(each), name
        assert found[name].value == pytest.approx(sum(each.values()) / len(each)), name
        assert not found[name].left_out
        low, high = found[name].interval
        assert low < found[name].value < high


@pytest.mark.evidence
def test_a_task_that_is_trained_again_counts_from_its_last_training():
    trained = (("a",), ("b",), ("a", "c"), ("c",))
    assert backward_transfer(matrix(trained=trained)).each == pytest.approx({"a": 0.5 - 0.6, "b": 0.7 - 0.4})
    assert set(forgetting(matrix(trained=trained)).each) == {"a", "b", "keep"}
    assert forward_transfer(matrix(trained=trained)).each == pytest.approx({"c": 0.0 - 0.1})
    last = (("a",), ("b",), (), ("a",))
    assert set(backward_transfer(matrix(trained=last)).each) == {"b"}, "what the last stage trained is not old"
    assert set(forgetting(matrix(trained=last)).each) == {"b", "c", "keep"}
    assert set(retention(matrix(trained=last)).each) == {"c", "keep"}


@pytest.mark.evidence
def test_what_the_first_stage_trained_is_kept_or_not():
    trained = (("a", "keep"), ("b",), (), ("c",))
    assert retention(matrix(trained=trained)).each == pytest.approx({"a": 5.0, "keep": 0.75})
    assert backward_transfer(matrix(trained=trained)).each == pytest.approx({"a": 0.4, "b": 0.3, "keep": -0.2})


@pytest.mark.evidence
def test_missing_cells_are_left_out_and_named():
    rates = [list(row) for row in RATES]
    rates[1][0] = rates[2][1] = rates[3][3] = None
    found = {measure.name: measure for measure in measures(matrix(rates))}
    assert found["average success"].each.keys() == {"a", "b", "c"}
    assert found["average success"].left_out == {"keep": "not evaluated after 'c'"}
    assert found["average success"].value == pytest.approx(0.7)
    assert found["backward transfer"].value is None
    assert found["backward transfer"].interval is None
    assert found["backward transfer"].left_out == {"a": "not evaluated after 'a'", "b": "not evaluated after 'b'"}
    assert found["forgetting"].each == pytest.approx({"a": 0.6 - 0.5, "b": 0.4 - 0.7}), "of what was evaluated"
    assert found["retention"].left_out == {"keep": "not evaluated after 'c'"}
    never = matrix([[0.0, 0.2, 0.1, 0.0], *RATES[1:]], ((), ("b",), (), ("c",)))
    assert retention(never).left_out == dict.fromkeys(("a", "keep"), "no success after '0'")
    assert retention(never).value is None


def test_changes_and_their_p_values():
    found = {change.task: change for change in changes(matrix(trials=50))}
    # scipy-free: the hypergeometric probabilities of tables at most as likely as 40/50 against 30/50
    total, wins = 100, 70
    weights = {k: math.comb(50, k) * math.comb(50, wins - k) / math.comb(total, wins) for k in range(20, 51)}
    expected = sum(p for p in weights.values() if p <= weights[40] * (1 + 1e-7))
    assert found["keep"].p_value == pytest.approx(expected)
    assert (found["keep"].before.successes, found["keep"].after.successes) == (40, 30)
    assert found["c"].p_value < 1e-9
    unknown = changes(matrix(trials=None))
    assert [change.p_value for change in unknown] == [None] * 4


@pytest.mark.evidence
def test_intervals_cover_what_rollouts_leave_open(monkeypatch):
    monkeypatch.setattr(module, "_DRAWS", 500)
    generator = np.random.default_rng(0)
    functions = (average_success, backward_transfer, forgetting, forward_transfer, retention)
    expected = [function(matrix()).value for function in functions]
    inside, runs = np.zeros(len(functions)), 400
    for _ in range(runs):
        drawn = matrix(generator.binomial(40, RATES) / 40, trials=40)
        for place, function in enumerate(functions):
            low, high = function(drawn, seed=1).interval
            inside[place] += low <= expected[place] <= high
    assert ((inside > 0.9 * runs) & (inside < 0.99 * runs)).all(), inside / runs


def test_an_interval_does_not_claim_certainty_and_contains_the_value():
    certain = matrix([[1.0, 0.0], [1.0, 1.0]], ((), ("b",)), 50, "xy", ("a", "b"))
    lost = forgetting(certain)
    assert lost.value == 0.0
    assert lost.interval[0] < 0.0 < lost.interval[1] < 0.1
    average = average_success(certain)
    assert average.interval[1] == average.value == 1.0
    assert average.interval[0] < 0.99
    assert average_success(certain) == average, "the same at every call"
    assert average_success(certain, seed=1).interval != average.interval
    narrow = average_success(certain, confidence=0.5).interval
    assert average.interval[0] < narrow[0]
    assert average_success(matrix(trials=None)).interval is None
    assert Cell.of(50, 50).interval() == pytest.approx((0.9287, 1.0), abs=1e-4)


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("0",), ("a",), ((),), ((None,),)), "at least two"),
        ((("0", "0"), ("a",), ((), ()), ((None,), (None,))), "different names"),
        ((("0", "1"), ("a",), ((),), ((None,), (None,))), "Found 1 and 2"),
        ((("0", "1"), ("a",), ((), ("b",)), ((None,), (None,))), "has trained 'b'"),
        ((("0", "1"), ("a",), ((), ("a",)), ((None,), ())), "0 cells for 1 tasks"),
    ],
)
def test_parts_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        SuccessMatrix(*arguments)


@pytest.mark.evidence
def test_rates_that_cannot_be():
    for rate, trials, message in ((94.0, None, "no percentage"), (0.33, 10, "cannot come from 10"), (0.5, 0, ">= 1")):
        with pytest.raises(ValueError, match=message):
            Cell(rate, trials)
    with pytest.raises(ValueError, match="successes=3, trials=2"):
        Cell.of(3, 2)
    with pytest.raises(ValueError, match="confidence=1"):
        average_success(matrix(), confidence=1)


def evaluation(path, **tasks):
    """As lerobot's eval_policy_all returns it and lerobot-eval writes it; names are group__number."""
    rows = []
    for name, successes in tasks.items():
        group, _, number = name.partition("__")
        metrics = {"sum_rewards": [0.0] * len(successes), "max_rewards": [], "successes": successes, "video_paths": []}
        rows.append({"task_group": group, "task_id": int(number or 0), "metrics": metrics})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"per_task": rows, "per_group": {}, "overall": {"pc_success": math.nan}}))
    return path


@pytest.mark.evidence
def test_what_lerobot_eval_writes(tmp_path):
    yes, no = [True] * 4, [False, False, True, False]
    evaluation(tmp_path / "0" / "eval_info.json", drawer=yes, libero__0=no, libero__3=yes)
    found = read_evaluation(tmp_path / "0")
    assert found == {("drawer", 0): Cell.of(4, 4), ("libero", 0): Cell.of(1, 4), ("libero", 3): Cell.of(4, 4)}
    later = [{("drawer", 0): Cell.of(2, 4)}, {("button", 2): Cell.of(3, 4), ("libero", 3): Cell.of(1, 4)}]
    made = matrix_of({"before": [found], "after": later}, {"after": ["button"]})
    assert made.tasks == ("drawer", "libero/0", "libero/3", "button")
    assert made.trained == ((), ("button",))
    np.testing.assert_equal(made.rates, [[1.0, 0.25, 1.0, np.nan], [0.5, np.nan, 0.25, 0.75]])
    with pytest.raises(ValueError, match="'drawer' twice"):
        matrix_of({"before": [found], "after": [found, found]}, {"after": []})


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no list 'per_task'"),
        ('{"overall": {"pc_success": 3}}', "no list 'per_task'"),
        ('{"per_task": [{"task_group": "g", "task_id": 0}]}', r"per_task\[0\] must have"),
        ('{"per_task": [{"task_group": "g", "task_id": 0, "metrics": {"successes": []}}]}', "at least one true or"),
        ('{"per_task": [{"task_group": "g", "task_id": 0, "metrics": {"successes": [0.5]}}]}', r"Found \[0.5\]"),
    ],
)
def test_files_that_are_no_evaluation(tmp_path, content, message):
    (tmp_path / "eval_info.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_evaluation(tmp_path)


CSV = "stage,trained,drawer,button\nbefore, drawer,50/50,0\nafter,button;drawer,0.5,\n"


@pytest.mark.evidence
def test_matrices_of_ones_own(tmp_path):
    (tmp_path / "m.csv").write_text(CSV)
    stages = [
        {"name": "before", "trained": ["drawer"], "success": {"drawer": {}, "button": 0}},
        {"name": "after", "trained": ["button", "drawer"], "success": {"drawer": 0.5, "button": None}},
    ]
    stages[0]["success"]["drawer"] = [True] * 50
    (tmp_path / "m.json").write_text(json.dumps({"stages": stages}))
    for file in ("m.csv", "m.json"):
        read = read_matrix(tmp_path / file)
        assert (read.stages, read.tasks) == (("before", "after"), ("drawer", "button"))
        assert read.trained == (("drawer",), ("button", "drawer"))
        assert read.cells == ((Cell(1.0, 50), Cell(0.0)), (Cell(0.5), None))
        assert read_matrix(tmp_path / file, {"after": []}).trained == (("drawer",), ())


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CSV.replace("0.5", "1.5"), r"after, drawer: a cell must be.*'1.5'"),
        (CSV.replace("50/50", "51/50"), "successes=51, trials=50"),
        (CSV.replace("50/50", "most"), "'most'"),
        (CSV.replace("50/50", "nan"), "'nan'"),
        (CSV.replace("stage,", "name,"), "must have a column 'stage'"),
        (CSV.replace("0.5,", "0.5"), "line 3: it must have 4 cells"),
        (CSV.replace("before", "after"), "'after' twice"),
        (CSV.replace("button;", "window;"), "has trained 'window'"),
        ("stage,drawer\nbefore,1\nafter,1\n", r"which tasks stage 'after' trained.*--trained after="),
    ],
)
def test_matrices_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_matrix(tmp_path / "m.csv")


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yes, no = [True] * 20, [False] * 20
    evaluation(Path("0/eval_info.json"), drawer=yes, button=no)
    evaluation(Path("1/eval_info.json"), button=[True] * 18 + [False] * 2)
    evaluation(Path("2/eval_info.json"), drawer=[True] * 5 + [False] * 15)
    return ["--stage", "before=0", "--stage", "after=1,2/eval_info.json", "--trained", "before=drawer", "after=button"]


def test_the_command(evaluated, capsys):
    main([*evaluated, "--plot=success.png", "--json=all.json"])
    said = capsys.readouterr().out
    assert re.search(r"drawer +1.00 \[0.84, 1.00\] \* +0.25 \[0.11, 0.47\]\n", said)
    assert re.search(r"button +0.00 \[0.00, 0.16\] +0.90 \[0.70, 0.97\] \*\n", said)
    assert re.search(r"drawer +1.00 +0.25 +-0.75 +7.7e-07 +0.75\n", said)
    assert re.search(r"backward transfer +-0.75 +\[-0.88, -0.50\] +1\n", said)
    assert re.search(r"forward transfer +- +0\n", said)
    assert "forgetting: loss since each task" in said
    found = json.loads(Path("all.json").read_text())
    assert found["stages"][1]["success"]["drawer"]["rate"] == 0.25
    assert found["stages"][1]["trained"] == ["button"]
    values = {row["name"]: row["value"] for row in found["measures"]}
    assert values["average success"] == pytest.approx(0.575)
    assert values["forgetting"] == pytest.approx(0.75)
    assert values["retention"] == pytest.approx(0.25)
    assert values["forward transfer"] is None
    assert Path("success.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_what_the_command_prints(tmp_path, capsys):
    """Rollouts of the demo's table, for AdamW."""
    text = (EVIDENCE / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^```text\n(stage,.*?)^```", text, re.DOTALL | re.MULTILINE)
    (printed,) = re.findall(r"^```console\n(Success after.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "adamw.csv").write_text(table)
    main([f"--matrix={tmp_path / 'adamw.csv'}"])
    assert printed.strip() in capsys.readouterr().out
    kept = json.loads((EVIDENCE.parents[1] / "examples" / "results" / "summary.json").read_text(encoding="utf-8"))
    rates = [int(won) / int(of) for won, of in re.findall(r"(\d+)/(\d+)", table)]
    assert rates == pytest.approx(
        [rate for method in ("pretrained", "adamw") for rate in kept[method]["tasks"].values()]
    )


@pytest.mark.evidence
def test_a_matrix_without_trials_has_no_intervals(tmp_path, capsys):
    (tmp_path / "m.csv").write_text("stage,drawer\nbefore,1\nafter,0.5\n")
    main([f"--matrix={tmp_path / 'm.csv'}", "--trained", "after="])
    said = capsys.readouterr().out
    assert re.search(r"drawer +1.00 +0.50\n", said)
    assert re.search(r"retention +0.50 +1\n", said)


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "pass what was evaluated"),
        (["--stage", "before"], "must be NAME=VALUE. Found 'before'"),
        (["--stage", "before=0", "--stage", "before=1"], "names 'before' twice"),
        (["--stage", "before=", "--stage", "after=1"], "needs a file"),
        (["--matrix=none.csv"], "none.csv"),
        (["--stage", "before=0", "--stage", "after=1"], "which tasks stage 'after' trained"),
        (["--stage", "before=0", "--stage", "after=1", "--trained", "later=drawer"], "no stage 'later'"),
    ],
)
def test_wrong_arguments(evaluated, capsys, arguments, remedy):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.evidence
def test_a_map_with_empty_cells(tmp_path):
    rates = [[None, 0.2, 0.1, 0.8], *RATES[1:]]
    draw_matrix(matrix(rates), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
