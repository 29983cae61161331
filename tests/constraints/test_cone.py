"""The quadratic programme against SciPy's NNLS: scales, collinear and zero gradients; and what defines its solution."""

import numpy as np
import pytest

from craft_optim._step.cone import distance_to_cone, nearest_in_cone

nnls = pytest.importorskip("scipy.optimize", reason="pip install 'craft-optim[evaluation]'").nnls

SCALES = [1e-15, 1e-5, 1.0, 1e5, 1e15]
KINDS = ["random", "obtuse", "collinear", "opposed", "dependent", "zero"]


def gradients(kind, m, seed):
    """g and m others, `[m + 1, 40]`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m + 1, 40))
    if kind == "obtuse":
        x[1:] -= 0.9 * x[1:].mean(axis=0) + 0.3 * x[0]
    elif kind == "collinear" and m > 1:
        x[2] = 3.0 * x[1]
    elif kind == "opposed" and m > 1:
        x[2] = -0.5 * x[1]
    elif kind == "dependent" and m > 2:
        x[3] = x[1] + 2.0 * x[2]
    elif kind == "zero":
        x[m] = 0.0
    return x


def projected(x):
    """By ours: q, and the vector nearest to the first."""
    k = x @ x.T
    q = nearest_in_cone(k[None, 1:, 1:], k[None, 0, 1:])[0]
    return q, x[0] + q @ x[1:]


@pytest.mark.parametrize(("kind", "m"), [(kind, m) for kind in KINDS for m in (1, 2, 3, 5) if (kind, m) != ("zero", 1)])
def test_it_is_scipys_solution(kind, m):
    moved = 0
    for seed in range(8):
        x = gradients(kind, m, seed)
        q, v = projected(x)
        by_scipy = x[0] + nnls(x[1:].T, -x[0])[0] @ x[1:]
        np.testing.assert_allclose(v, by_scipy, rtol=0, atol=1e-6 * np.abs(x[0]).max())
        assert (q >= 0.0).all()
        assert (x[1:] @ v >= -1e-6 * np.linalg.norm(x, axis=1).max() ** 2).all(), "it works against none of them"
        assert abs(q @ (x[1:] @ v)) < 1e-6, "what is moved is on the boundary"
        moved += (q > 0.0).any()
    assert moved > 2


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("of_task", SCALES)
def test_scales_do_not_matter(scale, of_task):
    x = gradients("obtuse", 3, 0)
    expected, _ = projected(x)
    assert (expected > 0.0).sum() > 1
    factors = np.array([of_task, scale, 1.0, 1.0 / scale])
    found, _ = projected(x * factors[:, None])
    np.testing.assert_allclose(found * factors[1:] / of_task, expected, rtol=1e-9)


def test_blocks_are_solved_on_their_own():
    xs = [gradients(kind, 3, seed) for seed, kind in enumerate(KINDS)]
    k = np.stack([x @ x.T for x in xs])
    together = nearest_in_cone(k[:, 1:, 1:], k[:, 0, 1:])
    for x, q in zip(xs, together, strict=True):
        np.testing.assert_allclose(q, projected(x)[0], rtol=1e-12, atol=1e-15)


def test_nothing_is_moved_where_nothing_conflicts():
    assert not nearest_in_cone(np.eye(2)[None], np.array([[0.0, 0.3]])).any()


def test_nearly_collinear_gradients_do_not_blow_up():
    """As float32 sums leave them: the second differs from the first by noise, and so do their products."""
    for sign in (-1.0, 1.0):
        k = np.array([[[1.0, 1.0 + sign * 1e-7], [1.0 + sign * 1e-7, 1.0]]])
        q = nearest_in_cone(k, np.array([[-0.5, -0.5 * (1 + 1e-7)]]))[0]
        assert q.sum() == pytest.approx(0.5, rel=1e-5)


def test_the_distance_is_that_of_the_cone():
    x = gradients("obtuse", 4, 3)[1:]
    found = [distance_to_cone(x @ x.T, j) for j in range(4)]
    expected = [nnls(np.delete(x, j, axis=0).T, -x[j])[1] for j in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert min(f / np.linalg.norm(g) for f, g in zip(found, x, strict=True)) < 0.9
    assert distance_to_cone(np.array([[4.0, 1.0], [1.0, 9.0]]), 0) == 2.0
    assert distance_to_cone(np.array([[1.0, -0.8], [-0.8, 1.0]]), 1) == pytest.approx(0.6, rel=1e-15)


def test_zeros_are_no_invalid_numbers():
    with np.errstate(all="raise"):
        assert not nearest_in_cone(np.eye(2)[None], np.zeros((1, 2))).any()
        assert nearest_in_cone(np.diag([4.0, 0.0])[None], np.array([[-2.0, 0.0]])).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(("away", "q"), [(1.5e-8, [1.0, 1.0]), (0.5e-8, [2.0, 0.0])])
def test_gradients_count_as_dependent_within_a_cosine_of_1e_8(away, q):
    cosines = np.array([[1.0, 1.0 - away], [1.0 - away, 1.0]])
    found = nearest_in_cone(cosines[None], -cosines.sum(axis=0)[None])[0]  # both at 1 solve it exactly
    assert found == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize(("c", "moved"), [(-1.7e-7, 1.7e-7), (-1.3e-7, 0.0)])
def test_a_conflict_that_gains_less_than_1e_14_is_left(c, moved):
    q = nearest_in_cone(np.eye(2)[None], np.array([[-1.0, c]]))[0]  # the second gains c^2 / 2
    assert q == pytest.approx([1.0, moved], rel=1e-12)
