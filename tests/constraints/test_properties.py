"""The merge under any number of constraints, by what defines it: properties of vectors, on all kinds of gradients.

None knows how the coefficients are found.
"""

import numpy as np
import pytest
import torch

from craft_optim import Rules
from craft_optim._step.decision import Products, decide
from craft_optim.functional import project_and_merge_several_

nnls = pytest.importorskip("scipy.optimize", reason="pip install 'craft-optim[evaluation]'").nnls

KINDS = ["random", "against the task", "against each other", "collinear", "opposed", "dependent", "zero", "far scales"]
# Constraints
MS = [1, 2, 3, 5]


def gradients(kind, m, seed=0):
    """The task's and m others, `[m + 1, 12]`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m + 1, 12))
    if kind != "random":
        x[1:] -= 0.6 * x[0]
    if kind == "against each other":
        x[1:] -= 0.9 * x[1:].mean(axis=0) + 0.2 * x[0]
    elif kind == "collinear":
        x[m] = 3.0 * x[1]
    elif kind == "opposed" and m > 1:
        x[m] = -0.5 * x[1]
    elif kind == "dependent" and m > 2:
        x[m] = x[1] + 2.0 * x[2]
    elif kind == "zero" and m > 1:
        x[m] = 0.0
    elif kind == "far scales":
        x *= 10.0 ** rng.integers(-6, 6, (m + 1, 1))
    return x


def merged(x, lams=None, cuts=(5, 6), **settings):
    """The merged gradient of the rows of x, which are cut into tensors; without multipliers unless they are given."""
    task, *retention = ([part.clone() for part in torch.tensor(row).tensor_split(cuts)] for row in x)
    project_and_merge_several_(task, retention, lams=[0.0] * len(retention) if lams is None else lams, **settings)
    return torch.cat(retention[-1]).numpy()


def assert_close(found, expected, scale):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * float(np.max(scale)))


def assert_is_the_projection(x, g, rows):
    """g is the vector nearest to the task's that works against none of `rows`: Moreau's two orthogonal parts."""
    unit = np.array([row / np.linalg.norm(row) for row in rows if row.any()])
    size = np.linalg.norm(x[0])
    assert (unit @ g >= -1e-7 * size).all(), "it works against none"
    assert abs(g @ (g - x[0])) <= 1e-7 * size**2, "what is added is orthogonal to the result"
    assert nnls(unit.T, g - x[0])[1] <= 1e-7 * size, "and is a sum of retention gradients, none of them negative"


def projection(x, rng):
    assert_is_the_projection(x, merged(x), x[1:])


def projection_of_some(x, rng):
    project = [j % 2 == 0 for j in range(len(x) - 1)]
    assert_is_the_projection(x, merged(x, project=project), x[1:][project])
    assert_close(merged(x, project=[False] * (len(x) - 1)), x[0], 1e-9 * np.abs(x[0]))


def threshold(x, rng):
    """A conflict above it does not count, and is not made worse by what is done about a stronger one."""
    size, products = np.linalg.norm(x, axis=1), x[1:] @ x[0]
    cosines = products / np.where(size[1:] > 0.0, size[1:] * size[0], 1.0)
    for limit in (-1.0, *np.sort(cosines[cosines < 0.0]) / 2.0, 0.0):
        g = merged(x, conflict_threshold=limit)
        least = np.where(cosines < limit, 0.0, np.minimum(products, 0.0))
        assert (x[1:] @ g >= least - 1e-7 * size[0] * size[1:]).all()
        if not (cosines < limit).any():
            assert np.array_equal(g, x[0])


def multipliers_add(x, rng):
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    terms = lams[:, None] * x[1:]
    assert_close(merged(x, lams), merged(x) + terms.sum(axis=0), np.abs([x[0], *terms]))


def equal_is_the_mean(x, rng):
    """Of the projected task gradient and the retention gradients: `weighted` with multipliers of 1, over m + 1."""
    ones = np.ones(len(x) - 1)
    assert_close(merged(x, 5.0 * ones, merge="equal"), merged(x, ones) / len(x), np.abs(x))


def task_priority_is_at_most_one(x, rng):
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    assert_close(merged(x, lams, merge="task_priority"), merged(x, np.minimum(lams, 1.0)), np.abs(x))


def order_does_not_matter(x, rng):
    lams, project, order = rng.uniform(0.0, 3.0, len(x) - 1), rng.random(len(x) - 1) < 0.7, rng.permutation(len(x) - 1)
    found = merged(np.array([x[0], *x[1:][order]]), lams[order], project=project[order])
    assert_close(found, merged(x, lams, project=project), np.abs(x) * max(1.0, *lams))


def unit_of_a_loss_does_not_matter(x, rng):
    lams, units = rng.uniform(0.0, 3.0, len(x) - 1), 10.0 ** rng.uniform(-4, 4, len(x) - 1)
    found = merged(np.array([x[0], *units[:, None] * x[1:]]), lams / units)
    assert_close(found, merged(x, lams), np.abs(x) * max(1.0, *lams))


def unit_of_the_task_scales_all(x, rng):
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    assert_close(merged(np.array([1e3 * x[0], *x[1:]]), 1e3 * lams), 1e3 * merged(x, lams), 1e3 * np.abs(x) * 3.0)


def a_constraint_twice_is_once(x, rng):
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    found = merged(np.array([*x, x[-1]]), [*lams[:-1], lams[-1] / 2.0, lams[-1] / 2.0])
    assert_close(found, merged(x, lams), np.abs(x) * max(1.0, *lams))


def tensors_do_not_matter(x, rng):
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    assert_close(merged(x, lams, cuts=()), merged(x, lams, cuts=(1, 1, 4, 9)), np.abs(x) * max(1.0, *lams))


def turned_gradients_turn_the_merge(x, rng):
    turn = np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))[0]
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    assert_close(merged(x @ turn, lams), merged(x, lams) @ turn, np.abs(x) * 12.0)


def norms_follow_from_products(x, rng):
    """Without a look at a gradient; and a cap on the norm shortens the merge, and turns it nowhere."""
    lams = rng.uniform(0.0, 3.0, len(x) - 1)
    g = merged(x, lams)
    for most in (None, 0.5 * np.linalg.norm(g)):
        rules = Rules(max_grad_norm=most)
        found = decide(Products(x @ x.T), lams=lams, project=[True] * len(lams), rules=rules)
        v = x[0]
        for (a, w), row in zip(found.merges, x[1:], strict=True):
            v = a * v + w * row
        assert_close(v, g if most is None else 0.5 * g, np.abs(x) * max(1.0, *lams))
        assert abs(found.norm - np.linalg.norm(v)) <= 1e-6 * np.linalg.norm(x, axis=1).max() * max(1.0, *lams)


PROPERTIES = [
    projection,
    projection_of_some,
    threshold,
    multipliers_add,
    equal_is_the_mean,
    task_priority_is_at_most_one,
    order_does_not_matter,
    unit_of_a_loss_does_not_matter,
    unit_of_the_task_scales_all,
    a_constraint_twice_is_once,
    tensors_do_not_matter,
    turned_gradients_turn_the_merge,
    norms_follow_from_products,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
def test_property(holds, kind, monkeypatch):
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", "0")  # the coefficients are the same; other tests compare the passes
    for m in MS:
        for seed in range(2):
            holds(gradients(kind, m, seed), np.random.default_rng(seed))


def test_the_kinds_conflict():
    """Or the properties of the projection would hold of nothing."""
    for kind in KINDS[1:]:
        assert all((x[1:] @ x[0] < 0.0).any() for m in MS if m > 1 for x in [gradients(kind, m)])
