"""The comparison of suggested epsilons with a sweep: what its table is computed from."""

import json
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("joblib")
pytest.importorskip("sklearn")

import suggested_epsilon
from _paths import RESULTS, ROOT
from pareto.prepared import SETTINGS
from pareto.summary import Outcome
from pareto_tiny import with_more_anchors
from suggested_epsilon import EPSILONS, Row, compared, main, markdown


def run(strength, seed, least, lr=1.0, setting="classes", method="craft"):
    return Outcome(setting, method, strength, seed, 1.0, lr, plasticity=least, retention=1.0, drift=0.0, heldout=0.0)


def found(one, hundred):
    return SimpleNamespace(plain=(SimpleNamespace(drift=one), SimpleNamespace(drift=hundred)))


def test_a_row_is_of_one_setting_and_learning_rate():
    values = dict.fromkeys(EPSILONS, 0.1) | {0.01: 0.6, 0.1: 0.8}
    rated = [run(epsilon, seed, least + 0.1 * seed) for epsilon, least in values.items() for seed in (0, 1)]
    rated += [run(0.02, 0, 0.5), run(0.04, 1, 0.3)]  # what was suggested
    rated += [run(epsilon, seed, 1.0, **other) for epsilon in values for seed in (0, 1)
              for other in ({"lr": 3.0}, {"setting": "rotation"}, {"method": "fixed"})]  # fmt: skip
    row = compared("classes", 1.0, [found(0.1, 2.0), found(0.3, 4.0)], [0.02, 0.04], rated)
    assert (row.one, row.hundred, row.suggested, row.least, row.best) == pytest.approx((0.2, 3.0, 0.03, 0.4, 0.1))
    assert row.least_at_best == pytest.approx(0.85)


def test_the_page_has_the_results():
    result = json.loads((RESULTS / "suggested_epsilon.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    table = markdown([Row(**row) for row in result["rows"]])
    assert table in text, table
    assert len(re.findall(r"^\| \w+ \| x", text, re.MULTILINE)) == len(result["rows"]) == 9


def test_a_tiny_one(tmp_path, monkeypatch, capsys):
    for name in list(SETTINGS):
        monkeypatch.delitem(SETTINGS, name)
    monkeypatch.setitem(SETTINGS, "tiny", lambda seed: with_more_anchors(seed, metric="cross_entropy"))
    monkeypatch.setattr(suggested_epsilon, "RATES", (1.0,))
    (row,) = main(["--jobs=1", f"--work={tmp_path / 'work'}", f"--results={tmp_path}"])
    kept = json.loads((tmp_path / "suggested_epsilon.json").read_text(encoding="utf-8"))
    assert [Row(**found) for found in kept["rows"]] == [row]
    assert kept["command"] == "python benchmarks/evidence/suggested_epsilon.py --settings tiny --seeds=1"
    assert 0.0 < row.one < row.suggested < row.hundred
    assert row.best in EPSILONS
    assert 0.0 < row.least <= 1.0
    assert 0.0 < row.least_at_best <= 1.0
    assert markdown([row]) in capsys.readouterr().out


@pytest.mark.evidence
def test_a_wrong_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds=0"])
    assert "--seeds must be 1 or more, found 0" in capsys.readouterr().err
