"""Plasticity, retention and dominated area against values computed by hand; what the summary makes of runs."""

import pytest
from pareto.measures import dominated_area, front, plasticity, retention, retention_at
from pareto.summary import (
    Front,
    best_strength,
    differences,
    fronts,
    outcomes,
    standard_error,
    targets,
    tried,
)


@pytest.mark.parametrize(
    ("after", "expected"), [(0.9, 1.0), (0.5, 0.5), (0.1, 0.0), (0.0, 0.0), (1.0, 1.0), (0.3, 0.25)]
)
def test_plasticity_is_the_share_of_the_gain(after, expected):
    assert plasticity(after, before=0.1, plain=0.9) == pytest.approx(expected)


def test_plasticity_of_cross_entropies_is_the_same():
    """Scores are minus the cross-entropy: from 3 nats to 2.5, where plain fine-tuning reaches 1."""
    assert plasticity(-2.5, before=-3.0, plain=-1.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("after", "expected"), [(1.0, 1.0), (0.8, 0.75), (0.2, 0.0), (0.0, 0.0), (0.6, 0.5), (1.1, 1.0)]
)
def test_nothing_is_left_at_chance_where_plain_falls_below_it(after, expected):
    assert retention(after, before=1.0, plain=0.0, chance=0.2) == pytest.approx(expected)


def test_nothing_is_left_where_plain_ends_if_that_is_above_chance():
    assert retention(-1.5, before=-1.0, plain=-2.0, chance=-3.0) == pytest.approx(0.5)


def test_what_cannot_be_rated_is_refused():
    with pytest.raises(ValueError, match=r"`plain` must be above `before`.*Found plain=0\.1"):
        plasticity(0.5, before=0.1, plain=0.1)
    for plain, chance in ((0.9, 0.1), (0.1, 0.9)):
        with pytest.raises(ValueError, match="`before` must be above"):
            retention(0.5, before=0.9, plain=plain, chance=chance)


POINTS = [(0.5, 0.8), (1.0, 0.2), (0.4, 0.7), (0.8, 0.5), (0.8, 0.4)]


def test_front():
    assert front(POINTS) == [(0.5, 0.8), (0.8, 0.5), (1.0, 0.2)]
    assert front([(0.5, 0.5), (0.5, 0.5)]) == [(0.5, 0.5)]


def test_dominated_area():
    """0.5 x 0.8 + 0.3 x 0.5 + 0.2 x 0.2, whatever the order and with dominated points."""
    assert dominated_area(POINTS) == pytest.approx(0.59)
    assert dominated_area(POINTS[::-1]) == pytest.approx(0.59)
    assert dominated_area([(1.0, 1.0)]) == 1.0
    assert dominated_area([]) == 0.0


def test_retention_at():
    assert retention_at(POINTS, 0.8) == 0.5
    assert retention_at(POINTS, 0.85) == pytest.approx(0.425)  # a quarter of the way from 0.5 to 0.2
    assert retention_at(POINTS, 0.1) == 0.8
    assert retention_at(POINTS[:1], 0.95) == 0.0


def record(method, strength, new, old, *, seed=0, scale=1.0, lr=1.0, drift=0.05):
    of_job = {"setting": "s", "method": method, "strength": strength, "seed": seed, "scale": scale, "lr": lr}
    scores = {"new": new, "old": old, "new_before": 0.0, "old_before": 1.0, "chance": 0.0}
    return of_job | scores | {"drift_anchors": drift, "drift_heldout": 2 * drift}


def plain(new, old, **other):
    return record("plain", 0.0, new, old, **other)


def test_runs_are_rated_against_plain_of_the_same_seed_and_rate():
    runs = [
        plain(1.0, 0.0),
        plain(0.5, 0.5, lr=0.3),
        plain(0.8, 0.0, seed=1),
        record("craft", 0.05, 0.4, 0.75, scale=10.0),
        record("craft", 0.05, 0.4, 0.75, lr=0.3),
        record("craft", 0.05, 0.4, 0.75, seed=1),
    ]
    assert [row.point for row in outcomes(runs)[3:]] == [(0.4, 0.75), (0.8, 0.5), (0.5, 0.75)]
    with pytest.raises(KeyError):
        outcomes(runs[1:])


RUNS = [
    plain(1.0, 0.0),
    plain(1.0, 0.0, lr=3.0),
    record("craft", 0.1, 0.9, 0.5, drift=0.11),
    record("craft", 0.1, 0.3, 0.9, lr=3.0, drift=0.09),
    record("craft", 0.01, 0.5, 0.9, drift=0.01),
    record("fixed", 1.0, 0.2, 0.2, drift=0.2),
    record("fixed", 1.0, 1.0, 0.1, scale=10.0, drift=0.02),
]


def test_fronts_leave_out_what_was_scaled():
    found = fronts(outcomes(RUNS), "s")
    assert list(found) == ["plain", "craft", "fixed"]
    assert found["craft"].points == [(0.01, 0.5, 0.9, 0.01), (0.1, 0.9, 0.5, 0.11)]
    assert found["craft"].area == [pytest.approx(0.5 * 0.9 + 0.4 * 0.5)]
    assert found["craft"].best == 0.5
    assert found["plain"].at_learned == [0.0]


def test_best_strength_is_that_of_the_sweep():
    runs = [*RUNS, record("craft", 0.2, 0.8, 0.55, drift=0.2), record("craft", 0.3, 0.95, 0.95, lr=3.0)]
    assert best_strength(outcomes(runs), "s", "craft") == 0.2


def test_tried_takes_the_worst_of_each_seed_and_all_drifts():
    rated = outcomes([*RUNS, plain(1.0, 0.0, seed=1), record("craft", 0.1, 0.9, 0.7, seed=1, drift=0.12)])
    found = tried(rated, "s", "craft", 0.1)
    assert found.worst == [0.3, 0.7]
    assert found.ratios == pytest.approx([1.1, 0.9, 1.2])
    assert found.spread == pytest.approx(0.12 / 0.09)


def front_of(area, at_learned=(0.5,)):
    return Front("any", [], list(area), list(at_learned), 0.0)


@pytest.mark.parametrize(
    ("drift", "area", "other_worst", "met"),
    [
        (1.0, 0.87, 0.64, [True, True, True, True]),
        (1.2, 0.86, 0.66, [False, True, False, False]),
        (1.4, 0.9, 0.1, [False, False, True, True]),
        (0.85, 0.9, 0.1, [False, True, True, True]),
    ],
)
def test_targets(drift, area, other_worst, met):
    rated = outcomes([plain(1.0, 0.0), record("craft", 1.0, 0.7, 0.7, drift=drift),
                      record("fixed", 1.0, other_worst, 1.0)])  # fmt: skip
    ours, untuned = (tried(rated, "s", method, 1.0) for method in ("craft", "fixed"))
    found = targets("s", {"craft": front_of([area]), "fixed": front_of([0.899])}, ours, untuned)
    assert [target.met for target in found] == met


def test_differences_are_paired_by_seed():
    """+0.1, +0.1 and +0.4: mean 0.2, standard error sqrt(0.03) / sqrt(3); of all areas alone it would be larger."""
    found = differences(front_of([0.2, 0.6, 0.9], [0.5, 0.5, 0.5]), front_of([0.1, 0.5, 0.5], [0.5, 0.5, 0.5]))
    assert (found.area, found.area_error) == (pytest.approx(0.2), pytest.approx(0.1))
    assert (found.at_learned, found.at_learned_error) == (0.0, 0.0)
    with pytest.raises(ValueError, match="shorter"):
        differences(front_of([0.1, 0.2]), front_of([0.1]))


def test_standard_error_of_one_value():
    assert standard_error([0.5]) == 0.0
