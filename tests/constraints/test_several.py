"""Decision and surgery of several constraints against the float64 reference, and against those of one."""

import numpy as np
import pytest
import torch

from craft_optim import Rules
from craft_optim._step.decision import Products, decide
from craft_optim._step.kernels import compiled
from craft_optim._step.reference import reference_merge_several
from craft_optim._step.surgery import GradientSets
from craft_optim.functional import project_and_merge_, project_and_merge_several_

pytest.importorskip("scipy", reason="of the reference: pip install 'craft-optim[evaluation]'")

SHAPES = [(3,), (), (0,), (7, 5), (2, 3, 4, 4), (200, 130)]
# One rounding per merge, and what sums in float32 leave in the coefficients
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.fixture(params=["compiled", "portable"], autouse=True)
def way(request, monkeypatch):
    """Every test here runs with and without the compiled pass."""
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", "1" if request.param == "compiled" else "0")
    if request.param == "compiled" and compiled.library() is None:
        pytest.skip("no C++ compiler")


def make(m=3, dtype=torch.float32, scales=None, seed=0, missing=False):
    """A task gradient that conflicts with all retention gradients, some of which conflict among themselves."""
    g = torch.Generator().manual_seed(seed)
    scales = scales or [1.0] * (m + 1)
    task = [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]
    shared = [torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES]
    lists = [
        [torch.randn(s, generator=g, dtype=torch.float64) - 0.4 * t + (-1) ** j * 0.7 * x
         for s, t, x in zip(SHAPES, task, shared, strict=True)]
        for j in range(m)
    ]  # fmt: skip
    scaled = [[(x * scale).to(dtype) for x in xs] for xs, scale in zip([task, *lists], scales, strict=True)]
    if missing:
        scaled[0][1] = scaled[1][3] = scaled[m][4] = None
        for xs in scaled:
            xs[0] = None
        for xs in scaled[1:]:
            xs[5] = None
    return scaled[0], scaled[1:]


def copies(lists):
    return [[None if x is None else x.clone() for x in xs] for xs in lists]


def assert_close(merged, expected, dtype):
    for g, e in zip(merged, expected, strict=True):
        if g is None:
            assert not e.any()
        elif g.numel():
            assert g.dtype == dtype
            assert float((g.double() - e).abs().max()) <= TOLERANCE[dtype] * float(e.abs().max())


@pytest.mark.parametrize("merge", ["weighted", "equal", "task_priority"])
@pytest.mark.parametrize("project", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("threshold", [0.0, -0.305])
@pytest.mark.parametrize("missing", [False, True])
def test_every_mode_matches_the_reference(merge, project, threshold, missing):
    task, retention = make(missing=missing)
    settings = {"lams": [0.3, 2.0, 0.0], "project": project, "conflict_threshold": threshold, "merge": merge}
    parameters = [torch.zeros(s) for s in SHAPES]
    expected = reference_merge_several(task, copies(retention), parameters, **settings)
    before = copies([task])[0]
    project_and_merge_several_(task, retention, **settings)
    assert_close(retention[-1], expected, torch.float32)
    for x, y in zip(task, before, strict=True):
        assert x is None if y is None else torch.equal(x, y), "task gradients were written to"


def test_thresholds_tell_conflicts_apart():
    """The case above has conflicts on both sides of -0.305, so that they are not all the same."""
    task, retention = make()
    products, _ = GradientSets(task, retention).inner_products()
    cosines = [gram.cos for gram in products.grams]
    assert min(cosines) < -0.305 < max(cosines) < 0.0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
def test_every_dtype_matches_the_reference(dtype, scale):
    task, retention = make(2, dtype, [1.0, scale, 1.0 / scale])
    settings = {"lams": [0.5 / scale, 0.5 * scale], "project": [True, True]}
    expected = reference_merge_several(task, copies(retention), [torch.zeros(s) for s in SHAPES], **settings)
    project_and_merge_several_(task, retention, **settings)
    assert_close(retention[-1], expected, dtype)


@pytest.mark.parametrize("scales", [[1e15, 1e-15, 1.0], [1e-15, 1e15, 1e15], [0.0, 1.0, 1.0], [1.0, 0.0, 1e15]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_scales_match_the_reference(scales, dtype):
    task, retention = make(2, dtype, scales)
    settings = {"lams": [0.7, 0.1], "project": [True, True]}
    expected = reference_merge_several(task, copies(retention), [torch.zeros(s) for s in SHAPES], **settings)
    products = project_and_merge_several_(task, retention, **settings)
    assert np.isfinite(products).all()
    assert_close(retention[-1], expected, dtype)


def test_the_norm_is_that_of_the_merged_gradient_and_is_capped():
    task, retention = make(2)
    sets = GradientSets(task, copies(retention))
    products, _ = sets.inner_products()
    settings = {"lams": [0.3, 0.1], "project": [True, True]}
    free = decide(products, **settings, rules=Rules())
    merged = sets.merge_(free.merges)
    exact = float(torch.cat([g.flatten() for g in merged]).double().norm())
    assert free.norm == pytest.approx(exact, rel=1e-5)
    assert not free.clipped
    clipped = decide(products, **settings, rules=Rules(max_grad_norm=0.5))
    capped = torch.cat([g.flatten() for g in GradientSets(task, copies(retention)).merge_(clipped.merges)])
    assert float(capped.norm()) == pytest.approx(0.5, rel=1e-5)
    assert clipped.clipped
    assert clipped.norm == 0.5
    torch.testing.assert_close(capped / 0.5, torch.cat([g.flatten() for g in merged]) / exact, rtol=1e-4, atol=1e-6)


def test_all_sums_are_read_at_once():
    """Through `reduce`: rows side by side, doubled here as two processes would."""
    task, retention = make(3)
    sets = GradientSets(task, retention, [1.0] * 5 + [0.5])
    scalars = [torch.tensor(float(i)) for i in range(20)]
    expected, values = sets.inner_products(*scalars)
    calls = []

    def reduce(rows):
        calls.append(rows.shape)
        return 2.0 * rows

    found, doubled = sets.inner_products(*scalars, reduce=reduce)
    assert calls == [(4, 20)]
    assert doubled == [2.0 * value for value in values]
    np.testing.assert_allclose(found.matrix, 2.0 * expected.matrix, rtol=1e-12)


def test_shares_weigh_each_tensors_part():
    task, retention = make(2)
    shares = [1.0, 0.5, 0.5, 1.0, 0.25, 1.0]
    found, _ = GradientSets(task, retention, shares).inner_products()
    weighted = [
        torch.cat([x.double().flatten() * share**0.5 for x, share in zip(xs, shares, strict=True)])
        for xs in (task, *retention)
    ]
    expected = torch.stack([torch.stack([x @ y for y in weighted]) for x in weighted])
    np.testing.assert_allclose(found.matrix, expected.numpy(), rtol=1e-5, atol=1e-5)


def products_of(rows):
    """Inner products of vectors, the task's first."""
    return Products(np.array(rows) @ np.array(rows).T)


def test_caps_rule_out_no_optimum():
    """At an optimum g_t + sum_j lambda_j g_j = 0: its multipliers are within the caps for rho = 1, and not scaled."""
    rng = np.random.default_rng(0)
    tight = 0.0
    for _ in range(200):
        g = rng.standard_normal((3, 4))
        lams = rng.uniform(0.0, 2.0, 3)
        products = products_of([-lams @ g, *g])
        bounds = products.caps(1.0)
        assert all(lam <= bound * (1 + 1e-9) for lam, bound in zip(lams, bounds, strict=True))
        assert products.common_factor(lams, 1.0) == pytest.approx(1.0)
        norms = np.linalg.norm(g, axis=1)
        tight = max(tight, max(lams * norms) / np.linalg.norm(lams @ g))
    assert tight > 1.5, "lambda_j |g_j| <= |g_t| would have ruled out some"


def test_together_they_do_not_outweigh_the_task():
    products = products_of([[-1.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    assert products.caps(1.5) == [0.75, 0.75]
    assert products.common_factor([0.75, 0.75], 1.5) == 0.5
    assert products.common_factor([0.2, 0.3], 1.5) == 1.0
    assert products_of([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]).caps(1.0) == [float("inf"), 0.5]


def test_one_list_is_the_function_for_one():
    task, retention = make(1)
    alone = copies(retention)[0]
    gram = project_and_merge_(task, alone, lam=0.4)
    products = project_and_merge_several_(task, retention, lams=[0.4])
    assert products.tolist() == [[gram.tt, gram.tr], [gram.tr, gram.rr]]
    assert all(torch.equal(a, b) for a, b in zip(alone, retention[0], strict=True))


def test_without_multipliers_it_is_gem():
    task, retention = make(2, torch.float64)
    kept = [torch.cat([x.flatten() for x in xs]) for xs in retention]
    assert all(float(torch.cat([x.flatten() for x in task]) @ r) < 0.0 for r in kept)
    project_and_merge_several_(task, retention, lams=[0.0, 0.0])
    v = torch.cat([x.flatten() for x in retention[-1]])
    assert [float(v @ r) / float(v.norm() * r.norm()) for r in kept] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lams": [1.0]}, "2, 1 and 1"),
        ({"lams": [1.0, -1.0]}, "must be >= 0"),
        ({"lams": [1.0, 1.0], "conflict_threshold": 0.1}, "<= 0 with several"),
        ({"lams": [1.0, 1.0], "merge": "sum"}, "merge='sum'"),
    ],
)
def test_bad_values_change_nothing(change, match):
    task, retention = make(2)
    before = copies(retention)
    with pytest.raises(ValueError, match=match):
        project_and_merge_several_(task, retention, **change)
    retention[0][3][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        project_and_merge_several_(task, retention, lams=[1.0, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(retention[1], before[1], strict=True))
