"""The commands, end to end with all methods and variants, on a setting of a few tiny pictures."""

import json

import beyond_the_front
import pytest
import retention_pareto
from pareto import scaled
from pareto.beyond import VARIANTS
from pareto.methods import METHODS
from pareto.prepared import SETTINGS
from pareto.runs import run_all, store
from pareto.setting import Recipe
from pareto.training import Job
from pareto_tiny import with_more_anchors


@pytest.fixture(autouse=True)
def _only_tiny(monkeypatch):
    def short(seed):
        return with_more_anchors(seed, metric="cross_entropy", finetune=Recipe(steps=10, batch_size=16, lr=5e-2))

    for name in list(SETTINGS):
        monkeypatch.delitem(SETTINGS, name)
    monkeypatch.setitem(SETTINGS, "tiny", short)
    monkeypatch.setattr(retention_pareto, "QUICK", (3, 1))
    monkeypatch.setattr(scaled, "SCALES", (1.0, 10.0))
    monkeypatch.setattr(scaled, "RATES", (0.3, 1.0))
    monkeypatch.setattr(beyond_the_front, "SCALED", beyond_the_front.SCALED[:1])


def flags(folder):
    return ["--jobs=1", f"--work={folder / 'work'}", f"--results={folder / 'results'}"]


def written(folder, name):
    return json.loads((folder / "results" / name).read_text(encoding="utf-8"))


def test_retention_pareto(tmp_path, capsys, monkeypatch):
    folder = store(tmp_path / "work")
    monkeypatch.setattr(retention_pareto, "store", lambda work: folder)  # whatever is edited while this runs
    result = retention_pareto.main(flags(tmp_path))
    kept = written(tmp_path, "retention_pareto.json")
    assert {key: kept[key] for key in result} == json.loads(json.dumps(result))
    assert kept["command"] == "python benchmarks/evidence/retention_pareto.py --seeds=1"
    assert str(tmp_path) not in json.dumps(kept)
    assert list(kept["fronts"]["tiny"]) == list(METHODS)
    assert {name: len(front["points"]) for name, front in kept["fronts"]["tiny"].items()} == {
        name: 3 if method.unit else 1 for name, method in METHODS.items()
    }
    knobs = [(row["method"], row["strength"], len(row["drifts"])) for row in kept["robustness"]]
    assert knobs[:2] == [("craft", 0.05, 4), ("fixed", 1.0, 4)]
    assert (tmp_path / "results" / "retention_pareto.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(method.title in printed for method in METHODS.values())
    assert printed.count("drift / epsilon") >= 3
    assert "Targets" in printed

    runs = sorted((tmp_path / "work").rglob("runs/*.json"))
    assert len(runs) == len({json.dumps(run) for run in kept["runs"]})
    runs[0].unlink()
    others = {run: run.stat().st_mtime_ns for run in runs[1:]}
    assert retention_pareto.main(flags(tmp_path)) == result
    assert runs[0].is_file()
    assert {run: run.stat().st_mtime_ns for run in runs[1:]} == others


@pytest.mark.filterwarnings("ignore:Drift on held-out anchors")  # of so few
def test_beyond_the_front(tmp_path, capsys):
    result = beyond_the_front.main([*flags(tmp_path), "--seeds", "0", "1", "--strengths=3"])
    kept = written(tmp_path, "beyond_the_front.json")
    assert {key: kept[key] for key in result} == json.loads(json.dumps(result))
    assert list(kept["differences"]["tiny"]) == ["craft", *VARIANTS]
    assert list(kept["differences"]["tiny"]["craft"]) == ["fixed"]
    areas = {name: front["area"] for name, front in kept["fronts"]["tiny"].items()}
    knobs = [(row["method"], row["strength"], len(row["drifts"])) for row in kept["robustness"]]
    assert knobs[1:3] == [("fixed", 1.0, 8), ("least_share_10", 0.05, 8)]
    by_hand = sum(a - b for a, b in zip(areas["mixed"], areas["fixed"], strict=True)) / 2
    assert kept["differences"]["tiny"]["mixed"]["fixed"]["area"] == pytest.approx(by_hand)
    printed = capsys.readouterr().out
    assert all(method.title.split()[0] in printed for method in VARIANTS.values())


@pytest.mark.evidence
@pytest.mark.parametrize(
    ("command", "flag", "words"),
    [
        (retention_pareto, "--seeds=0", "--seeds must be 1 or more, found 0"),
        (retention_pareto, "--jobs=0", "--jobs must be 1 or more, found 0"),
        (beyond_the_front, "--jobs=0", "--jobs must be 1 or more, found 0"),
        (beyond_the_front, "--seeds=3", "--seeds must be two or more different ones, found [3]"),
    ],
)
def test_numbers_that_make_no_sense(command, flag, words, capsys):
    with pytest.raises(SystemExit):
        command.parse([flag])
    assert words in capsys.readouterr().err


@pytest.mark.evidence
def test_the_default_epsilon_is_in_the_sweep(capsys):
    with pytest.raises(SystemExit):
        beyond_the_front.parse(["--strengths=4"])
    assert "--strengths must be odd" in capsys.readouterr().err


@pytest.mark.evidence
def test_a_run_that_fails_ends_the_command(tmp_path):
    def failing(job, folder):
        raise RuntimeError(f"{job.name} failed")

    folder = store(tmp_path)
    with pytest.raises(RuntimeError, match="tiny-plain-0-0-1-1 failed"):
        run_all([Job("tiny", "plain", 0.0, 0)], folder, 1, failing, "runs")
    assert not list((folder / "runs").iterdir())


@pytest.mark.evidence
def test_other_sources_are_another_store(tmp_path):
    assert store(tmp_path) == store(tmp_path)
    assert store(tmp_path) != store(tmp_path, "beyond")
