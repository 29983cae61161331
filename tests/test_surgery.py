"""The fast path against the float64 reference: dtypes, scales, shapes, missing gradients, layouts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_optim import Rules
from craft_optim._step.decision import decide
from craft_optim._step.kernels import compiled, portable
from craft_optim._step.reference import reference_gram, reference_merge
from craft_optim._step.surgery import GradientSets
from craft_optim.functional import gram, project_and_merge_


@pytest.fixture(params=["compiled", "portable"], autouse=True)
def way(request, monkeypatch):
    """Every test here runs with and without the compiled pass."""
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", "1" if request.param == "compiled" else "0")
    if request.param == "compiled" and compiled.library() is None:
        pytest.skip("no C++ compiler")
    if request.param == "compiled":  # it sums in float64
        monkeypatch.setitem(TOLERANCE, torch.float32, 5e-7)
    return request.param


SHAPES = [(3,), (), (0,), (7, 5), (2, 3, 4, 4), (200, 130), (300, 300)]
# Relative to the largest element of a tensor: one rounding of the result, and in the portable way what sums in float32
# leave in the coefficient.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SCALES = [0.0, 1e-15, 1e-5, 1.0, 1e5, 1e15]


def make(dtype, scale_t=1.0, scale_r=1.0, seed=0, correlation=-0.5, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    task, retention = [], []
    for shape in shapes:
        a = torch.randn(shape, generator=g, dtype=torch.float64)
        b = torch.randn(shape, generator=g, dtype=torch.float64)
        task.append((a * scale_t).to(dtype))
        retention.append(((correlation * a + b) * scale_r).to(dtype))
    return task, retention


def with_missing(task, retention):
    task, retention = list(task), list(retention)
    task[1] = None
    retention[3] = None
    task[4] = retention[4] = None
    return task, retention


def assert_matches(merged, expected, dtype):
    for g, e in zip(merged, expected, strict=True):
        if g is None:
            assert not e.any()
            continue
        assert g.dtype == dtype
        size = e.abs().max().item() if e.numel() else 0.0
        error = (g.double() - e).abs().max().item() if e.numel() else 0.0
        assert error <= TOLERANCE[dtype] * size, (g.shape, error, size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("missing", [False, True])
def test_gram_matches_the_reference(dtype, missing):
    parameters = [torch.zeros(s, dtype=dtype) for s in SHAPES]
    task, retention = make(dtype)
    if missing:
        task, retention = with_missing(task, retention)
    found = gram(task, retention)
    tt, rr, tr = reference_gram(task, retention, parameters)
    assert found.tt == pytest.approx(tt, rel=1e-5)
    assert found.rr == pytest.approx(rr, rel=1e-5)
    assert found.tr == pytest.approx(tr, rel=1e-5)


@pytest.mark.parametrize("scale_t", SCALES)
@pytest.mark.parametrize("scale_r", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_matches_the_reference_at_every_scale(dtype, scale_t, scale_r):
    parameters = [torch.zeros(s, dtype=dtype) for s in SHAPES]
    task, retention = make(dtype, scale_t, scale_r)
    expected = reference_merge(task, [r.clone() for r in retention], parameters, lam=0.7)
    before = [t.clone() for t in task]
    measured = project_and_merge_(task, retention, lam=0.7)
    assert_matches(retention, expected, dtype)
    assert all(torch.equal(a, b) for a, b in zip(task, before, strict=True)), "task gradients were written to"
    assert math.isfinite(measured.cos)
    assert -1.0001 <= measured.cos <= 1.0001


def test_only_what_float32_cannot_hold_is_measured_again(way, monkeypatch):
    passes = []
    measured = GradientSets._measured

    def counting(self, scalars, dtype, reduce):
        passes.append(dtype)
        return measured(self, scalars, dtype, reduce)

    monkeypatch.setattr(GradientSets, "_measured", counting)
    for scale_t, scale_r, again in [(1.0, 0.0, False), (0.0, 1.0, False), (0.0, 0.0, False), (1.0, 1e-30, True)]:
        passes.clear()
        task, retention = make(torch.float32, scale_t, scale_r)
        tt, rr, _ = reference_gram(task, retention, task)
        found = gram(task, retention)
        assert (found.tt, found.rr) == pytest.approx((tt, rr), rel=1e-5, abs=0.0)
        assert passes == [torch.float32, torch.float64][: 1 + (again and way == "portable")]


@pytest.mark.parametrize("merge", ["weighted", "equal", "task_priority"])
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("correlation", [-0.5, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_mode_matches_the_reference(merge, project, correlation, lam, missing, dtype):
    parameters = [torch.zeros(s, dtype=dtype) for s in SHAPES]
    task, retention = make(dtype, correlation=correlation)
    if missing:
        task, retention = with_missing(task, retention)
    copies = [None if r is None else r.clone() for r in retention]
    expected = reference_merge(task, copies, parameters, lam=lam, project=project, merge=merge)
    project_and_merge_(task, retention, lam=lam, project=project, merge=merge)
    assert_matches(retention, expected, dtype)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_the_cap_on_the_merged_norm_needs_no_look_at_it(max_norm):
    task, retention = make(torch.float32)
    sets = GradientSets(task, [retention])
    products, _ = sets.inner_products()
    decided = decide(products, lams=[2.0], project=[True], rules=Rules(max_grad_norm=max_norm))
    merged = sets.merge_(decided.merges)
    norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in merged])).item()
    assert norm == pytest.approx(decided.norm, rel=1e-5)
    assert norm <= max_norm * (1 + 1e-5)
    assert decided.clipped == (max_norm < 1e6)


def test_lambda_zero_is_a_gem():
    task, retention = make(torch.float64)
    t = torch.cat([x.reshape(-1) for x in task])
    r = torch.cat([x.reshape(-1) for x in retention])
    assert t @ r < 0
    a_gem = t - (t @ r) / (r @ r) * r
    project_and_merge_(task, retention, lam=0.0)
    merged = torch.cat([x.reshape(-1) for x in retention])
    torch.testing.assert_close(merged, a_gem, rtol=1e-13, atol=1e-13)
    assert abs(merged @ r) < 1e-9 * (r @ r)


def test_without_conflict_and_lambda_the_task_gradient_passes_untouched():
    task, retention = make(torch.float32, correlation=0.5)
    sets = GradientSets(task, [retention])
    products, _ = sets.inner_products()
    merged = sets.merge_(decide(products, lams=[0.0], project=[True], rules=Rules()).merges)
    assert all(m is t for m, t in zip(merged, task, strict=True))


def test_the_threshold_is_a_cosine_and_not_a_dot_product():
    # dot = -0.2, cosine = -0.002: an earlier implementation projected here with its threshold of -0.1.
    task, retention = [torch.tensor([10.0, -0.02])], [torch.tensor([0.0, 10.0])]
    before = retention[0].clone()
    measured = project_and_merge_(task, retention, lam=1.0, conflict_threshold=-0.1)
    assert measured.tr == pytest.approx(-0.2)
    assert torch.equal(retention[0], task[0] + before)


def test_a_missing_gradient_is_zero_in_every_mode():
    # Earlier implementations dropped what only one of the losses touches, or did not halve it.
    for merge, of_task, of_retention in [("weighted", 1.0, 0.5), ("equal", 0.5, 0.5), ("task_priority", 1.0, 0.5)]:
        task, retention = [torch.ones(3), None, None], [None, torch.ones(3), None]
        project_and_merge_(task, retention, lam=0.5, merge=merge)
        assert torch.equal(retention[0], torch.full((3,), of_task))
        assert torch.equal(retention[1], torch.full((3,), of_retention))
        assert retention[2] is None
        assert torch.equal(task[0], torch.ones(3))


def test_bfloat16_dots_are_summed_in_float32():
    # Summed in bfloat16 this stops growing at 256.
    x = [torch.ones(1 << 18, dtype=torch.bfloat16)]
    assert gram(x, x).tt == float(1 << 18)


def test_sums_that_float32_cannot_hold():
    big, small = [torch.full((64,), 1e30)], [torch.full((64,), 1e-30)]
    found = gram(big, small)
    assert found.tt == pytest.approx(64e60, rel=1e-6)
    assert found.rr == pytest.approx(64e-60, rel=1e-6)
    assert found.cos == pytest.approx(1.0)


def test_nonfinite_gradients_are_seen_and_refused():
    bad = [torch.tensor([1.0, math.nan])]
    good = [torch.tensor([1.0, 2.0])]
    assert not gram(bad, good).finite
    assert not gram(good, [torch.tensor([1.0, math.inf])]).finite
    with pytest.raises(ValueError, match="NaN or inf"):
        project_and_merge_(bad, good, lam=1.0)
    assert torch.equal(good[0], torch.tensor([1.0, 2.0]))


def test_zero_gradients_give_no_division_by_zero():
    zero, one = [torch.zeros(3)], [torch.ones(3)]
    assert gram(zero, one).cos == 0.0
    task, retention = [torch.ones(3)], [torch.zeros(3)]
    project_and_merge_(task, retention, lam=2.0, conflict_threshold=1.0)
    assert torch.equal(retention[0], torch.ones(3))


def test_complex_gradients_use_the_real_inner_product():
    t, r = torch.randn(5, dtype=torch.complex64), torch.randn(5, dtype=torch.complex64)
    found = gram([t], [r])
    assert found.tr == pytest.approx((t * r.conj()).sum().real.item(), rel=1e-5)
    expected = reference_merge([t], [r.clone()], [torch.zeros(5, dtype=torch.complex64)], lam=0.4)
    project_and_merge_([t], merged := [r.clone()], lam=0.4)
    torch.testing.assert_close(merged[0], expected[0].to(torch.complex64))


def sparse(rows, values):
    return torch.sparse_coo_tensor(torch.tensor([rows]), torch.tensor(values), (6, 2), check_invariants=True)


@pytest.mark.parametrize("kinds", ["sparse-sparse", "sparse-dense", "dense-sparse"])
def test_sparse_gradients_match_their_dense_form(kinds):
    t = sparse([0, 3, 3], [[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])  # not coalesced
    r = sparse([3, 5], [[-2.0, 1.0], [4.0, 4.0]])
    dense = [t.to_dense()], [r.to_dense()]
    left, right = kinds.split("-")
    task = [t if left == "sparse" else t.to_dense()]
    retention = [r if right == "sparse" else r.to_dense()]
    found, expected = gram(task, retention), gram(*dense)
    assert (found.tt, found.rr, found.tr) == pytest.approx((expected.tt, expected.rr, expected.tr))
    project_and_merge_(task, retention, lam=0.5)
    project_and_merge_(*dense, lam=0.5)
    assert retention[0].is_sparse == (kinds == "sparse-sparse")
    torch.testing.assert_close(retention[0].to_dense() if retention[0].is_sparse else retention[0], dense[1][0])


def test_layouts_may_differ():
    t = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    r = torch.randn(4, 4, 3, 2).permute(3, 2, 0, 1)
    expected = reference_merge([t], [r.clone()], [torch.zeros_like(t)], lam=0.5)
    project_and_merge_([t], merged := [r], lam=0.5)
    assert_matches(merged, expected, torch.float32)


def test_mixed_dtypes_in_one_list():
    task = [torch.randn(4, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    retention = [torch.randn(4, dtype=t.dtype) for t in task]
    expected = reference_merge(task, [r.clone() for r in retention], task, lam=0.5)
    project_and_merge_(task, retention, lam=0.5)
    for g, e, t in zip(retention, expected, task, strict=True):
        assert g.dtype == t.dtype
        # The coefficient holds float32 sums, so no tensor is better than that.
        assert (g.double() - e).abs().max() <= max(TOLERANCE[t.dtype], 1e-6) * e.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.floats(0, 100),
    st.sampled_from(["weighted", "equal", "task_priority"]),
)
def test_the_merged_norm_in_closed_form_is_the_norm(sizes, seed, lam, merge):
    task, retention = make(torch.float64, seed=seed, shapes=[(n,) for n in sizes])
    sets = GradientSets(task, [retention])
    products, _ = sets.inner_products()
    decided = decide(products, lams=[lam], project=[True], rules=Rules(merge=merge))
    merged = sets.merge_(decided.merges)
    square = torch.cat(list(merged)).square().sum().item()
    # The terms of the closed form may cancel: its error is relative to them, not to their sum.
    (gram,), ((a, w),) = products.grams, decided.merges
    assert decided.norm**2 == pytest.approx(square, abs=1e-12 * (a * a * gram.tt + w * w * gram.rr))


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 and 1"):
        gram([torch.ones(1), torch.ones(1)], [torch.ones(1)])


@pytest.mark.parametrize(("argument", "value"), [("merge", "sum"), ("lam", -1.0), ("lam", math.nan)])
def test_bad_arguments_of_the_functional_form(argument, value):
    arguments = {"lam": 1.0} | {argument: value}
    with pytest.raises(ValueError, match=argument):
        project_and_merge_([torch.ones(1)], [torch.ones(1)], **arguments)


@pytest.mark.parametrize("reduce", [None, lambda sums: 0.5 * sums], ids=["one process", "several"])
def test_a_device_that_is_read_once_gives_the_same(monkeypatch, reduce):
    """The path of accelerators, taken by a CPU."""
    generator = torch.Generator().manual_seed(3)
    task = [torch.randn(n, generator=generator) for n in (5, 100_000, 3)] + [None]
    retention = [torch.randn(5, generator=generator), torch.randn(100_000, generator=generator), None, None]
    scalars = torch.tensor(0.25), torch.tensor(4.0)
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", "0")
    expected, values = GradientSets(task, [retention]).inner_products(*scalars, reduce=reduce)
    assert values == ([0.25, 4.0] if reduce is None else [0.125, 2.0])
    monkeypatch.setattr(portable, "_READ_AT_ONCE", frozenset())
    products, read = GradientSets(task, [retention]).inner_products(*scalars, reduce=reduce)
    assert read == values
    np.testing.assert_allclose(products.matrix, expected.matrix, rtol=1e-12)
