"""What the charts show of the rows."""

import math

import numpy as np
import pytest

from craft_optim.report.panels import groups, panels
from craft_optim.report.runs import read_file, read_runs


def by_key(found, **settings):
    return {panel.key: panel for panel in panels(groups(found), **settings)}


@pytest.fixture
def run_of(tmp_path, write):
    def made(content, name="run"):
        return read_file(write(tmp_path / f"{name}.jsonl", content))[0]

    return made


def test_methods_are_grouped_and_constrained_ones_come_first(runs_folder):
    found = groups(read_runs([str(runs_folder)]))
    assert [(group.name, len(group.runs)) for group in found] == [("craft", 2), ("adamw", 2)]
    assert [group.constrained for group in found] == [True, False]


def test_every_quantity_has_its_chart(runs_folder):
    found = by_key(read_runs([str(runs_folder)]))
    assert [*found] == ["drift", "loss", "lambda", "cosine", "shares", "norms", "cost", "interval", "kept"]
    assert [curve.label for curve in found["shares"].curves] == ["conflict", "projected", "at the cap"]
    assert {curve.group for curve in found["loss"].curves} == {0, 1}
    assert {curve.group for curve in found["lambda"].curves} == {0}
    assert (found["cost"].unit, found["cost"].curves[0].y.tolist()) == ("ms", pytest.approx([100.0] * 100))


def test_seeds_are_their_median_and_range(run_of):
    def rows(seed, shift):
        return [{"step": s, "lambda": s + shift, "epsilon": 1.0, "method": "m", "seed": seed} for s in range(50)]

    runs = [run_of(rows(seed, shift), f"s{seed}") for seed, shift in enumerate((0.0, 10.0, 70.0))]
    (curve,) = by_key(runs)["lambda"].curves
    assert curve.x.tolist() == [*range(50)]
    assert (curve.y - curve.x).tolist() == [10.0] * 50
    assert (curve.low - curve.x).tolist() == [0.0] * 50
    assert (curve.high - curve.x).tolist() == [70.0] * 50
    (curve,) = by_key([runs[0], run_of(rows(1, 10.0)[:20], "short")])["lambda"].curves
    assert curve.y[19:21].tolist() == [24.0, 20.0], "a seed that ended early counts as long as it ran"


def test_long_runs_are_thinned_and_keep_their_extremes(run_of):
    content = [{"step": s, "lambda": 1.0 + s / 1e4, "epsilon": 0.1, "lr": s % 2} for s in range(5000)]
    content[3210]["lambda"] = 99.0
    content[77]["lambda"] = 0.001
    found = by_key([run_of(content)], points=100)
    (curve,) = found["lambda"].curves
    assert len(curve.x) == 100
    assert (curve.high.max(), curve.low.min()) == (99.0, 0.001)
    assert curve.x[np.argmax(curve.high)] == pytest.approx(3210, abs=50)
    assert curve.y[10] == pytest.approx(1.0 + curve.x[10] / 1e4)
    assert curve.y.mean() == pytest.approx(np.mean([row["lambda"] for row in content]), rel=1e-3)
    assert np.all(np.diff(curve.x) > 0)
    assert found["lr"].curves[0].y == pytest.approx(0.5)
    assert len(by_key([run_of(content[:100])], points=100)["lambda"].curves[0].x) == 100, "as they are"


def test_shares_move(run_of):
    content = [{"step": s, "conflict": float(s >= 100), "epsilon": 1.0, "retention_loss": 1.0} for s in range(200)]
    (curve,) = by_key([run_of(content)])["shares"].curves
    assert curve.y[:95].tolist() == [0.0] * 95
    assert curve.y[105:].tolist() == [1.0] * 95
    assert curve.y[100] == pytest.approx(0.5)
    assert np.all(np.diff(curve.y) >= 0)


def test_cost_is_typical(run_of):
    content = [{"step": s, "seconds": 100.0 if s % 50 == 7 else 0.2} for s in range(1000)]
    (curve,) = by_key([run_of(content)], points=20)["cost"].curves
    assert curve.y.tolist() == pytest.approx([200.0] * 20), "a checkpoint now and then is not what a step costs"


def test_drift_and_what_stands_in_for_it(run_of, rows):
    batches = run_of(rows())
    (curve,) = by_key([batches])["drift"].curves
    assert (curve.label, curve.style) == ("batches", "solid")
    content = rows()
    content[50] |= {"drift_anchors": 0.04, "drift_heldout": 0.09}
    found = by_key([run_of(content, "measured")])["drift"].curves
    assert [(c.label, c.style, len(c.x)) for c in found] == [
        ("anchors", "solid", 1),
        ("batches", "faint", 100),
        ("held-out", "dashed", 1),
    ]


def test_the_average_over_passes_stands_in_for_many_anchors(run_of, rows):
    content = rows(averages=True)
    found = by_key([run_of(content)])["drift"].curves
    assert [(c.label, c.style) for c in found] == [("average", "solid"), ("batches", "faint")]
    assert found[0].y == pytest.approx([row["drift"] for row in content])
    content[99]["drift_anchors"] = 0.04
    found = by_key([run_of(content, "measured")])["drift"].curves
    assert [(c.label, c.style) for c in found] == [("anchors", "solid"), ("average", "faint")]


def test_epsilon_of_held_out_anchors(run_of, rows):
    content = rows(averages=True, epsilon_heldout=0.2, heldout=0.19)
    panel = by_key([run_of(content)])["drift"]
    assert panel.limits[0].y.tolist() == [0.2, 0.2], "what was asked for, not what the anchors are held at for it"
    assert [(c.label, c.style) for c in panel.curves][-1] == ("held-out", "dashed")
    assert panel.curves[-1].y == pytest.approx(0.19)


def test_passes_and_shortened_steps(run_of, rows):
    content = rows(averages=True, every=5)
    for row in content[50:]:
        row["step_kept"] = 0.25
    found = by_key([run_of(content)])
    assert found["interval"].curves[0].x.tolist() == [*range(0, 100, 5)]
    assert found["interval"].curves[0].y == pytest.approx(5.0)
    assert found["kept"].curves[0].y.tolist() == [1.0] * 10 + [0.25] * 10


def test_epsilon_of_one_and_of_several(run_of, rows):
    runs = [run_of(rows(epsilon=0.05), "a"), run_of(rows(steps=150, epsilon=0.05), "b")]
    (limit,) = by_key(runs)["drift"].limits
    assert (limit.group, limit.x.tolist(), limit.y.tolist()) == (None, [0.0, 149.0], [0.05, 0.05])
    decaying = rows()
    for row in decaying:
        row["epsilon"] = 1.0 - row["step"] / 100
    limits = by_key([runs[0], run_of(decaying, "c")])["drift"].limits
    assert [limit.group for limit in limits] == [0, 1]
    assert limits[1].y[[0, -1]].tolist() == pytest.approx([1.0, 0.01])


def test_what_means_of_one_epsilon_leave_over_is_no_other_epsilon(run_of, rows):
    content = rows(2000)
    for row in content[::7]:
        row["epsilon"] = 0.05 * (1 + 1e-15)
    (limit,) = by_key([run_of(content)])["drift"].limits
    assert (limit.group, len(limit.y)) == (None, 2)


@pytest.mark.parametrize(
    ("final", "log"),
    [(0.2, False), (1.0, False), (3.5, False), (5.0, True), (44.0, True), (1e4, True)],
)
def test_epsilon_and_the_room_below_it_are_on_the_axis(run_of, rows, final, log):
    content = rows(final=final)
    content[0]["retention_loss"] = 1e-12
    content[1]["retention_loss"] = -1e-9
    panel = by_key([run_of(content)])["drift"]
    assert panel.log == log
    assert panel.bottom <= (0.05 / 5 if log else 0.0), "room below epsilon"
    assert panel.bottom >= (1e-3 if log else 0.0), "and not lost to rounding errors"
    highest = max(0.05, *(row["retention_loss"] for row in content))
    assert 1.05 * highest < panel.top < 2 * highest, "neither lies on the edge"


def test_a_plain_axis_begins_at_zero_without_epsilon(run_of, rows):
    panel = by_key([run_of(rows(epsilon=None, drift_anchors=2.0))])["drift"]
    assert (panel.log, panel.bottom, panel.limits) == (False, 0.0, ())
    assert "Green" not in panel.caption
    assert panel.caption == "Anchors: drift on many anchors."


def test_a_loss_that_falls_far_has_a_logarithmic_axis(run_of):
    for last, log in ((0.5, False), (1e-3, True), (-1.0, False)):
        content = [{"step": s, "loss": 2.0 + (last - 2.0) * s / 499} for s in range(500)]
        assert by_key([run_of(content)])["loss"].log == log, last


def test_a_logarithmic_axis_ends_at_a_number_with_a_label(run_of):
    nothing = by_key([run_of([{"step": 0, "lambda": 0.0, "epsilon": 0.1}])])["lambda"]
    assert 0 < nothing.bottom < nothing.top
    panel = by_key([run_of([{"step": s, "lambda": 0.37 + s, "epsilon": 0.1} for s in range(50)])])["lambda"]
    power = math.floor(math.log10(panel.bottom))
    assert panel.bottom / 10**power == pytest.approx(round(panel.bottom / 10**power))
    assert panel.bottom == pytest.approx(0.2)


def test_one_row(run_of, rows):
    assert {len(curve.x) for panel in by_key([run_of(rows(1))]).values() for curve in panel.curves} == {1}
