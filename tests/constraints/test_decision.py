"""The decision from inner products to coefficients, with values by hand."""

import math

import numpy as np
import pytest

from craft_optim import Rules
from craft_optim._step.decision import Gram, Products, decide


def products(*rows):
    return Products(np.array(rows, dtype=float))


# Two constraints of norm 1 and 1, a task gradient of norm 2: the projection removes the first conflict, and with it the
# second that this would make.
CROSSED = products([4.0, -1.0, 0.2], [-1.0, 1.0, -0.6], [0.2, -0.6, 1.0])
Q = [1.375, 0.625]


def decided(found, lams, project=None, **rules):
    project = [True] * len(lams) if project is None else project
    return decide(found, lams=lams, project=project, rules=Rules(**rules))


def test_cosines():
    assert [Gram(4.0, 9.0, -3.0).cos, Gram(0.25, 0.25, 0.125).cos] == [-0.5, 0.5]
    assert Gram(0.0, 9.0, 0.0).cos == Gram(4.0, 0.0, 0.0).cos == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_enough(bad):
    assert Gram(1.0, 2.0, 3.0).finite
    assert not any(gram.finite for gram in (Gram(bad, 1.0, 1.0), Gram(1.0, bad, 1.0), Gram(1.0, 1.0, bad)))
    for i, j in [(0, 0), (0, 1), (1, 2)]:
        matrix = np.eye(3)
        assert Products(matrix).finite
        matrix[i, j] = bad
        assert not Products(matrix).finite


def test_grams_and_what_is_between():
    found = products([4.0, -3.0, 1.0], [-3.0, 9.0, 2.0], [1.0, 2.0, 16.0])
    assert found.grams == [Gram(4.0, 9.0, -3.0), Gram(4.0, 16.0, 1.0)]
    assert found.between.tolist() == [[9.0, 2.0], [2.0, 16.0]]


def test_unscaled():
    scaled = products([4.0, -3.0, 1.0], [-3.0, 9.0, 2.0], [1.0, 2.0, 16.0])
    assert scaled.unscaled([1.0, 1.0]) is scaled
    assert scaled.unscaled([1.0, 4.0]).matrix.tolist() == [[4.0, -3.0, 0.25], [-3.0, 9.0, 0.5], [0.25, 0.5, 1.0]]


@pytest.mark.parametrize("threshold", [0.0, -0.3])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_what_rho_bounds(m, threshold):
    """lambda alone; what the projection adds, |cos| of the task's gradient at most, comes on top."""
    rng = np.random.default_rng(0)
    largest = 0.0
    for rho in (0.5, 1.0, 3.0):
        for _ in range(200):
            vectors = rng.normal(size=(m + 1, 3)) * np.exp(rng.normal(size=(m + 1, 1)))
            found = Products(vectors @ vectors.T)
            lams = found.caps(rho)
            lams = [min(lam, 1e3) for lam in lams]
            factor = found.common_factor(lams, rho)
            lams = [lam * factor for lam in lams]
            rules = Rules(rho=rho, conflict_threshold=threshold)
            decision = decide(found, lams=lams, project=[True] * m, rules=rules)
            added = sum(c.retention * v for c, v in zip(decision.merges, vectors[1:], strict=True))
            share = np.linalg.norm(added) / np.linalg.norm(vectors[0])
            assert share <= rho + (abs(found.grams[0].cos) if m == 1 else 1.0) + 1e-9
            largest = max(largest, share / rho)
    assert largest > 1.5, "it is not lambda's bound"


def test_caps():
    assert products([16.0, 1.0], [1.0, 4.0]).caps(3.0) == [6.0]  # 3 * 4 / 2
    assert products([16.0, 0.0], [0.0, 0.0]).caps(3.0) == [math.inf]
    assert products([1.0, 0.0, 0.0], [0.0, 0.25, 0.125], [0.0, 0.125, 4.0]).caps(1.0) == [2.0, 0.5]
    assert CROSSED.caps(1.0) == pytest.approx([2.0 / 0.8, 2.0 / 0.8])  # each is 0.8 away from what the other can reach


def test_all_are_scaled_alike_to_the_bound():
    found = products([0.04, 0.0, 0.0], [0.0, 0.09, 0.0], [0.0, 0.0, 0.16])
    assert found.common_factor([1.0, 1.0], 2.0) == pytest.approx(0.8)  # to 2 * 0.2 from 0.5
    assert found.common_factor([1.0, 1.0], 3.0) == found.common_factor([1.0, 1.0], math.inf) == 1.0
    assert (
        found.common_factor([0.0, 0.0], 2.0)
        == products([0.0] * 3, *np.eye(3)[1:]).common_factor([0.0, 0.0], 2.0)
        == 1.0
    )
    assert products([1.0, 0.0], [0.0, 9.0]).common_factor([1.0], 2.0) == 1.0, "its own cap has seen to it"


@pytest.mark.parametrize(
    ("lam", "settings", "a", "w"),
    [
        (0.5, {}, 1.0, 2.0),
        (3.0, {"merge": "equal"}, 0.5, 1.25),
        (0.5, {"merge": "task_priority"}, 1.0, 2.0),
        (3.0, {"merge": "task_priority"}, 1.0, 2.5),
        (0.5, {"project": [False]}, 1.0, 0.5),
        (3.0, {"project": [False], "merge": "equal"}, 0.5, 0.5),
        (0.5, {"conflict_threshold": -0.6}, 1.0, 0.5),
    ],
)
def test_one_constraint(lam, settings, a, w):
    found = decided(products([25.0, -6.0], [-6.0, 4.0]), [lam], **settings)  # cosine -0.6; q = 6 / 4
    assert found.merges == [(a, w)]
    assert found.norm == pytest.approx(math.sqrt(25.0 * a**2 - 12.0 * a * w + 4.0 * w**2), rel=1e-15)
    assert found.conflict == [settings.get("conflict_threshold") is None]
    assert found.projected == [found.conflict[0] and "project" not in settings]
    assert not found.clipped


def test_a_threshold_above_zero_removes_what_helps():
    found = decided(products([4.0, 2.0], [2.0, 4.0]), [0.0], conflict_threshold=0.6)
    assert (found.merges, found.conflict, found.projected) == ([(1.0, -0.5)], [True], [True])
    assert decided(products([4.0, 2.0], [2.0, 4.0]), [0.0], conflict_threshold=0.5).conflict == [False]


@pytest.mark.parametrize("zero", [0, 1])
def test_where_a_gradient_is_zero_nothing_is_removed(zero):
    matrix = np.diag([4.0, 4.0])
    matrix[zero, zero] = 0.0
    found = decided(Products(matrix), [0.25], conflict_threshold=0.5)
    assert (found.merges, found.conflict, found.projected) == ([(1.0, 0.25)], [True], [False])
    assert decided(products([0.25, -0.25], [-0.25, 0.5]), [0.0]).projected == [True], "small is not zero"


@pytest.mark.parametrize(
    ("merge", "a", "w"),
    [
        ("weighted", 1.0, [Q[0] + 0.625, Q[1] + 1.375]),
        ("equal", 1.0 / 3.0, [2.375 / 3.0, 1.625 / 3.0]),
        ("task_priority", 1.0, [Q[0] + 0.625, Q[1] + 1.0]),
    ],
)
def test_two_constraints(merge, a, w):
    found = decided(CROSSED, [0.625, 1.375], merge=merge)
    assert [x.task for x in found.merges] == [a, 1.0], "the second merge adds to the first"
    assert [x.retention for x in found.merges] == pytest.approx(w)
    x = np.array([a, *w])
    assert found.norm == pytest.approx(math.sqrt(x @ CROSSED.matrix @ x))
    assert (found.conflict, found.projected) == ([True, False], [True, True])


def test_only_what_may_be_projected_is():
    first = decided(CROSSED, [0.0, 0.0], [True, False])
    assert [x.retention for x in first.merges] == [1.0, 0.0]
    assert first.projected == [True, False]
    second = decided(CROSSED, [0.0, 0.0], [False, True])
    assert [x.retention for x in second.merges] == [0.0, 0.0], "alone, the second is not against the task"
    assert second.projected == [False, False]


def test_a_weak_conflict_does_not_count():
    """Cosines -0.5 and -0.1 with threshold -0.3: the second is left as it is, though not made worse."""
    found = decided(
        products([4.0, -1.0, -0.2], [-1.0, 1.0, 0.0], [-0.2, 0.0, 1.0]), [0.0, 0.0], conflict_threshold=-0.3
    )
    assert [x.retention for x in found.merges] == [1.0, 0.0]
    assert (found.conflict, found.projected) == ([True, False], [True, False])


@pytest.mark.parametrize(("most", "clipped"), [(1.0, True), (2.0, False), (8.0, False), (None, False)])
def test_the_norm_is_held_to_its_cap(most, clipped):
    found = decided(CROSSED, [0.625, 1.375], max_grad_norm=most)
    assert found.clipped == clipped
    assert found.norm == pytest.approx(1.0 if clipped else 2.0)
    assert found.merges[0] == pytest.approx((0.5, 1.0) if clipped else (1.0, 2.0))
    assert found.merges[1] == pytest.approx((1.0, 1.0) if clipped else (1.0, 2.0))


def test_a_norm_at_its_cap_is_not_clipped():
    found = decided(products([25.0, 0.0], [0.0, 4.0]), [0.0], max_grad_norm=5.0)
    assert (found.norm, found.clipped) == (5.0, False)
