"""What was learnt against what was kept."""

import json
from pathlib import Path

import pytest

from craft_optim.report.outcomes import Outcome, Scatter, read_outcomes
from craft_optim.report.scatter import axis_range, in_words, scatter_svg, ticks

RESULTS = Path(__file__).parents[2] / "examples" / "results"


def read(tmp_path, content):
    (tmp_path / "o.json").write_text(json.dumps(content))
    return read_outcomes(tmp_path / "o.json")


def test_the_documented_form(tmp_path):
    points = [
        {"method": "a", "label": "l", "x": 0.1, "y": 0.9, "x_interval": [0.0, 0.2], "y_interval": [0.8, 1.0]},
        {"method": "b", "seed": 0, "x": 0.2, "y": 0.3},
        {"method": "b", "seed": 1, "x": 0.4, "y": 0.1},
        {"method": "b", "seed": 2, "x": 0.5, "y": 0.2},
        {"method": "no numbers", "x": None, "y": 1.0},
    ]
    (found,) = read(tmp_path, {"title": "T", "x": "new", "y": "old", "points": points})
    assert (found.title, found.x, found.y) == ("T", "new", "old")
    assert found.points == (
        Outcome("a", "l", 0.1, 0.9, (0.0, 0.2), (0.8, 1.0)),
        Outcome("b", "", 0.4, 0.2, seeds=((0.2, 0.3), (0.4, 0.1), (0.5, 0.2))),
    )


def test_settings_are_drawn_apart(tmp_path):
    points = [{"method": "m", "setting": s, "plasticity": 0.5, "retention": r} for s, r in (("cls", 0.1), ("rot", 0.2))]
    found = read(tmp_path, points)
    assert [(scatter.title, scatter.points[0].y) for scatter in found] == [("cls", 0.1), ("rot", 0.2)]
    assert found[0].x.startswith("plasticity")


def test_rows_with_names(tmp_path):
    row = {"label": "KL", "old_success": 1.0, "new_success": 0.9, "old_success_interval": None}
    (found,) = read(tmp_path, {"rows": [row | {"name": "kl-every-1"}, row | {"name": "kl-every-5"}, row]})
    assert [(point.method, point.label) for point in found.points] == [
        ("kl-every-1", ""),
        ("kl-every-5", ""),
        ("KL", ""),
    ]


def test_results_of_the_examples():
    summary = json.loads((RESULTS / "summary.json").read_text())
    (found,) = read_outcomes(RESULTS / "summary.json")
    assert {point.method: (point.x, point.y) for point in found.points} == {
        method: (summary[method]["new_success"], summary[method]["old_success"])
        for method in ("pretrained", "adamw", "craft")
    }
    craft = next(point for point in found.points if point.method == "craft")
    assert craft.label == "", "an epsilon that was not turned is no label"
    assert craft.y_interval == tuple(summary["craft"]["old_success_interval"])
    assert [x for x, _ in craft.seeds] == summary["craft"]["new_success_per_seed"]
    sweep = json.loads((RESULTS / "sweep-logits.json").read_text())
    (found,) = read_outcomes(RESULTS / "sweep-logits.json")
    labels = [point.label for point in found.points if point.method == "craft"]
    assert labels == [f"epsilon = {row['epsilon']:g}" for row in sweep["craft"]]


def test_fronts_of_the_benchmark(tmp_path):
    points = [[0.1, 0.9, 0.2, 1.0], [1.0, 0.8, 0.6, 0.1], [10.0, 0.5, 0.7, 0.01]]
    of = {"method": "kl", "points": points, "area": [0.5], "best": 1.0}
    content = {
        "settings": {"cls": "digits"},
        "fronts": {"cls": {"kl": of}},
        "runs": [{"plasticity": 1, "retention": 1}],
    }
    (found,) = read(tmp_path, content)
    assert found.title == "digits"
    assert [(p.label, p.x, p.y) for p in found.points] == [
        ("strength = 0.1", 0.9, 0.2),
        ("strength = 1", 0.8, 0.6),
        ("strength = 10", 0.5, 0.7),
    ]
    assert [*found.sweeps] == ["kl"]
    assert scatter_svg(found, {"kl": 0}).count("<polyline") == 1


@pytest.mark.parametrize("content", [{}, [], {"craft": {"old_success": None, "new_success": 0.5}}, {"x": 1}])
def test_nothing_to_draw(tmp_path, content):
    with pytest.raises(ValueError, match=r"o\.json has nothing for a scatter"):
        read(tmp_path, content)


def test_no_json(tmp_path):
    (tmp_path / "o.json").write_text("{")
    with pytest.raises(ValueError, match=r"o\.json is no JSON"):
        read_outcomes(tmp_path / "o.json")


def scatter(*points):
    return Scatter("", "x", "y", tuple(Outcome(name, "", x, y) for name, x, y in points))


def test_the_front():
    found = scatter(("a", 0.0, 1.0), ("b", 0.5, 0.9), ("beaten", 0.4, 0.9), ("c", 0.9, 0.2), ("worst", 0.1, 0.1))
    assert [point.method for point in found.front] == ["a", "b", "c"]
    assert in_words(found).endswith("a at 0 and 1, b at 0.5 and 0.9, c at 0.9 and 0.2.")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 4.0), (1e-4, 3e-4), (120.0, 9000.0)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low <= found[0] < found[-1] <= high
    assert all(len(f"{abs(x):.10g}".replace(".", "").strip("0")) <= 3 for x in found)


def test_axes():
    assert axis_range([0.2, 1.0]) == (-0.04, 1.06)
    assert axis_range([0.0, 10.0]) == (-0.8, 10.8)
    low, high = axis_range([5.0])
    assert low < 5.0 < high


def test_a_name_at_the_edge_stays_in_the_picture():
    text = scatter_svg(scatter(("a method with a long name", 1.0, 1.0)), {"a method with a long name": 0})
    assert 'text-anchor="end" class="label"' in text
    assert 'class="label"' not in scatter_svg(scatter(("x" * 90, 0.5, 0.5)), {"x" * 90: 0})


def test_names_are_text_and_do_not_cover_each_other():
    names = [f"<b>{i}" for i in range(30)]
    crowd = scatter(*((name, 0.5 + i / 1e4, 0.5) for i, name in enumerate(names)), ("alone", 0.1, 0.1))
    text = scatter_svg(crowd, {name: i for i, name in enumerate([*names, "alone"])})
    assert "<b>" not in text
    labels = text.count('class="label"')
    assert 2 <= labels < 10
    assert text.count("<title>") == 31, "all are told where the pointer rests"
    assert "&lt;b&gt;29</text>" in text, "the front goes first"
