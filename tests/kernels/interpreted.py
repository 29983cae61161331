"""Triton's kernels on the CPU, in Triton's interpreter: run by test_fused.py in a process of its own.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported.
"""

import math
import os

import pytest
import torch

from craft_optim._step import surgery
from craft_optim._step.decision import Weights
from craft_optim._step.kernels import fused
from craft_optim._step.reference import reference_gram, reference_merge
from craft_optim._step.surgery import GradientPairs, GradientSets
from craft_optim.functional import gram, project_and_merge_

assert os.environ.get("TRITON_INTERPRET") == "1"

SHAPES = [(3,), (), (0,), (7, 5), (2, 3, 4, 4), (4096,), (4097,), (300, 300)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(surgery, "_FUSED", frozenset({"cpu"}))
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", "0")


def make(dtype, scale_t=1.0, scale_r=1.0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    task = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    other = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    retention = [(b - 0.5 * a) * scale_r for a, b in zip(task, other, strict=True)]
    return [(t * scale_t).to(dtype) for t in task], [r.to(dtype) for r in retention]


def clones(gradients):
    return [None if g is None else g.clone() for g in gradients]


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e15, 1e-15), (0.0, 1.0), (1.0, 0.0), (1e15, 1e15)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("missing", [False, True])
def test_surgery_matches_the_reference(dtype, missing, scales):
    if scales != (1.0, 1.0) and (missing or dtype == torch.float16):
        pytest.skip("float16 does not hold this scale, and what is missing does not depend on it")
    task, retention = make(dtype, *scales)
    if missing:
        task[1], retention[3], task[4], retention[4], task[7] = None, None, None, None, None
    parameters = [torch.zeros(s, dtype=dtype) for s in SHAPES]
    assert GradientPairs(task, retention).ways == {"fused"}, "this is what is tested"
    before = clones(task)
    tt, rr, tr = reference_gram(task, retention, parameters)
    expected = reference_merge(task, clones(retention), parameters, lam=0.7)
    found = project_and_merge_(task, retention, lam=0.7)
    assert (found.tt, found.rr, found.tr) == pytest.approx((tt, rr, tr), rel=1e-5, abs=1e-5 * math.sqrt(tt * rr))
    for t, kept in zip(task, before, strict=True):
        assert t is kept is None or torch.equal(t, kept)
    for g, e in zip(retention, expected, strict=True):
        if g is None:
            assert not e.any()
        elif g.numel():
            assert g.dtype == dtype
            assert (g.double() - e).abs().max() <= TOLERANCE[dtype] * e.abs().max()


def test_mixed_dtypes_take_a_launch_per_pair_of_dtypes():
    task = [torch.randn(5000), torch.randn(70000).bfloat16(), torch.randn(9), torch.randn(9).half(), torch.randn(6)]
    retention = [t.float() if t.dtype == torch.bfloat16 else t.neg() for t in task]
    (pairs,) = GradientPairs(task, retention)._fused
    assert len({launch.group[:2] for launch in pairs._launches}) == 3
    sets = GradientSets(task, [retention])
    products, (scalar,) = sets.inner_products(torch.tensor(2.5))
    assert scalar == 2.5
    assert products.grams[0].tt == pytest.approx(sum(x.double().square().sum().item() for x in task), rel=1e-5)
    before = clones(retention)
    merged = sets.merge_([Weights(0.5, 0.25)])
    for t, r, g in zip(task, before, merged, strict=True):
        assert g is not t
        assert g.dtype == r.dtype
        torch.testing.assert_close(g.float(), 0.5 * t.float() + 0.25 * r.float(), rtol=1e-2, atol=1e-2)


def test_views_that_no_vector_load_may_read():
    buffer = torch.randn(2, 20_001)
    task, retention = [buffer[0, 1:]], [buffer[1, 3:]][:1]
    retention = [retention[0][:19_998]]
    task = [task[0][:19_998]]
    pairs = GradientPairs(task, retention)
    assert [launch.group.aligned for launch in pairs._fused[0]._launches] == [False]
    expected = task[0].double() + 0.5 * retention[0].double()
    assert gram(task, retention).tr == pytest.approx((task[0].double() @ retention[0].double()).item(), rel=1e-5)
    pairs.merge_(Weights(1.0, 0.5))
    torch.testing.assert_close(retention[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_transposed_gradients_are_read_where_they_lie_and_others_by_torch():
    t, r = torch.randn(70, 90).t(), torch.randn(70, 90).t()
    assert GradientPairs([t], [r]).ways == {"fused"}
    assert gram([t], [r]).tr == pytest.approx((t.double() * r.double()).sum().item(), rel=1e-5)
    assert GradientPairs([t], [r.contiguous()]).ways == {"portable"}
    assert gram([t], [r.contiguous()]).tr == pytest.approx((t.double() * r.double()).sum().item(), rel=1e-5)


def test_shares_in_one_read():
    task, retention = make(torch.float32)
    shares = [0.5 if i % 2 else 0.25 for i in range(len(task))]
    sets = GradientSets(task, [retention], shares)
    products, (value,) = sets.inner_products(torch.tensor(3.0), reduce=lambda rows: 2.0 * rows)
    exact = sum(
        2.0 * share * (t.double() * r.double()).sum().item()
        for t, r, share in zip(task, retention, shares, strict=True)
    )
    assert value == 6.0
    assert products.grams[0].tr == pytest.approx(exact, rel=1e-5)


def test_the_same_gradients_give_the_same_bits():
    task, retention = make(torch.float32, shapes=[(200_000,), (7,), (70_000,)])
    first, second = (GradientSets(task, [retention]).inner_products()[0] for _ in range(2))
    assert first.matrix.tobytes() == second.matrix.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_told_from_what_float32_cannot_hold(dtype):
    for scale, exact in [(0.0, True), (1e-30, False)]:
        task, retention = make(dtype, 1.0, scale)
        (pairs,) = GradientPairs(task, retention)._fused
        _, squares, _ = pairs.sums(torch.float32)[:, 0].tolist()
        assert squares == 0.0 if exact else 0.0 < squares < 1e-50, "and formed again in float64"
        _, squares, _ = pairs.sums(torch.float64)[:, 0].tolist()
        assert squares == pytest.approx(sum(r.double().square().sum().item() for r in retention), rel=1e-12, abs=0.0)


def test_launches_do_not_depend_on_the_number_of_tensors(monkeypatch):
    launched = []
    for name in ("_dots", "_add_up", "_merge"):
        kernel = getattr(fused, name)
        monkeypatch.setattr(fused, name, Counted(kernel, launched, name))
    for n in (2, 200):
        launched.clear()
        task, retention = make(torch.float32, shapes=[(4 + i,) for i in range(n)])
        project_and_merge_(task, retention, lam=1.0)
        aligned = {launch.group for launch in GradientPairs(task, retention)._fused[0]._launches}
        assert launched == ["_dots"] * len(aligned) + ["_add_up"] + ["_merge"] * len(aligned)
        assert len(aligned) <= 2


class Counted:
    def __init__(self, kernel, launched, name):
        self.kernel, self.launched, self.name = kernel, launched, name

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launched.append(self.name)
            self.kernel[grid](*arguments, **constants)

        return launch
