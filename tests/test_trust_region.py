"""The trust region: the share of a step that is kept, where a step is looked at, and where it is not."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from craft_optim import Constraint, CraftOptimizer, Retention
from craft_optim._step import step as steps
from craft_optim._step.drift import Drift
from craft_optim._step.trust import LEAST, KeptValues, share_of_step

# -- the share -------------------------------------------------------------------------------------------------------

LOSSES = st.floats(1e-12, 1e6)


def by_bisection(before, after, drift, bound, measured=0.0):
    """Where the root of drift, which begins at that of `drift` and grows as `before` did, is that of the bound."""
    growth = math.sqrt(after) - math.sqrt(before)
    end = max(math.sqrt(drift) + growth, math.sqrt(measured))  # at the end of the step

    def root(share):
        return end - (1.0 - share) * growth

    low, high = 0.0, 1.0
    if growth <= 0.0 or root(1.0) <= math.sqrt(bound):
        return 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if root(middle) > math.sqrt(bound) else (middle, high)
    return max(low, LEAST)


@given(LOSSES, LOSSES, LOSSES, LOSSES, st.just(0.0) | LOSSES)
def test_the_root_of_drift_ends_at_that_of_the_bound(before, after, drift, bound, measured):
    found = share_of_step(before, after, drift, bound, measured)
    assert LEAST <= found <= 1.0
    scale = math.sqrt(max(before, after, drift, bound, measured))
    growth = math.sqrt(after) - math.sqrt(before)
    if growth > 1e-7 * scale:  # below that it is a difference of rounding errors
        assert found == pytest.approx(by_bisection(before, after, drift, bound, measured), abs=1e-8 * scale / growth)


@given(st.floats(0.0, 0.99), st.floats(1.0, 1e4), st.floats(1.0, 4.0))
def test_where_the_root_is_convex_the_step_ends_within_the_bound(start, end, power):
    """In units of the bound's root: r(a) = start + a^power (end - start), at or below its chord."""
    share = share_of_step(start**2, end**2, start**2, 1.0)
    assert share == LEAST or start + share**power * (end - start) <= 1.0 + 1e-9
    assert share == LEAST or start + share * (end - start) == pytest.approx(1.0)


def test_where_nothing_grows_the_whole_step_stays():
    assert share_of_step(0.3, 0.2, 9.0, 0.1) == 1.0, "it leads back, from wherever drift is"
    assert share_of_step(0.3, 0.3, 9.0, 0.1) == 1.0
    assert share_of_step(-1e-9, -2e-9, 0.0, 0.1) == 1.0, "an estimate of a divergence may be below 0"
    assert share_of_step(-1e-9, 0.4, 0.0, 0.1) == pytest.approx(0.5), "which counts as 0"
    assert share_of_step(0.0, 0.1, 0.0, 0.1) == 1.0, "just there"


def test_more_anchors_have_a_say():
    """This pass's anchors show no more than the bound, those of others four times it: half of a step from 0 is left."""
    assert share_of_step(0.0, 0.1, 0.0, 0.1, 0.4) == LEAST
    assert share_of_step(0.0, 0.2, 0.0, 0.2, 0.3) == pytest.approx(
        1.0 - (math.sqrt(0.3) - math.sqrt(0.2)) / math.sqrt(0.2)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_a_step_to_where_nothing_is_finite_the_least_is_kept(value):
    assert share_of_step(0.01, value, 0.01, 0.1) == LEAST
    assert share_of_step(0.01, 0.02, 0.01, 0.1, value) == LEAST


# -- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_a_share_of_the_way_is_left(dtype, host):
    torch.manual_seed(0)
    before = [torch.randn(7, 3, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype) for _ in "ab"]
    moves = [torch.randn_like(x) for x in before]
    for share in (0.0, LEAST, 0.3, 0.9):
        now = [x.clone() for x in before]
        kept = KeptValues(now, host=host)
        places = [x.data_ptr() for x in now]
        for x, move in zip(now, moves, strict=True):
            x.add_(move)
        ends = [x.clone() for x in now]
        kept.go_back(share)
        assert [x.data_ptr() for x in now] == places
        wide = torch.complex128 if dtype.is_complex else torch.float64
        for x, start, end in zip(now, before, ends, strict=True):
            assert x.dtype == dtype
            expected = start.to(wide) + share * (end.to(wide) - start.to(wide))
            largest = max(start.abs().max().item(), end.abs().max().item())
            assert (x.to(wide) - expected).abs().max() <= 2.0 * torch.finfo(dtype).eps * largest
            assert share > 0.0 or torch.equal(x, start)


# -- of a run --------------------------------------------------------------------------------------------------------


class Distance(Retention):
    """|w|^2, whatever the anchors; counts its calls."""

    def __init__(self, w):
        self.w, self.asked = w, []

    def loss(self, number):
        self.asked.append((number, torch.is_grad_enabled()))
        return self.w.square().sum()


def run(base, count, epsilon=0.005, w=None, closure=None, **settings):
    """Trains w towards (1, 0, 0); the drift after each step, and the optimizer."""
    w = nn.Parameter(torch.zeros(3)) if w is None else w
    retention = Distance(w) if closure is None else closure(w)
    optimizer = CraftOptimizer(base([w]), retention, epsilon=epsilon, **settings)
    drifts = []
    for _ in range(count):
        optimizer.zero_grad()
        (w - torch.tensor([1.0, 0.0, 0.0])).square().sum().backward()
        optimizer.step()
        drifts.append(w.detach().square().sum().item())
    return drifts, optimizer


adam = partial(torch.optim.Adam, lr=0.5)  # the first step leads to 0.25, fifty times epsilon


def test_a_step_that_leads_to_fifty_times_epsilon_ends_at_epsilon():
    drifts, optimizer = run(adam, 1)
    assert drifts[0] == pytest.approx(0.005, rel=1e-4)
    assert optimizer.metrics["step_kept"] == pytest.approx(math.sqrt(1 / 50), rel=1e-4)
    for trust, most in ((3.0, 6.0), (1.6, 5.0)):
        bounded, _ = run(adam, 200, retention_every=1, trust_region=trust)
        assert max(bounded[:40]) < 2.0 * 0.005, (
            "of the start; afterwards the average follows drift more slowly than Adam does"
        )
        assert max(bounded) < most * 0.005
        assert sum(bounded[-100:]) / 100 == pytest.approx(0.005, rel=0.15)
    free, optimizer = run(adam, 200, retention_every=1, trust_region=None)
    assert max(free) > 40.0 * 0.005
    assert optimizer.metrics["step_kept"] == 1.0


def test_what_is_kept_of_a_step_is_a_share_of_that_very_step():
    """Of all parameters alike, also those that the drift knows nothing of."""
    w, free, fixed = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = CraftOptimizer(torch.optim.SGD([w, free, fixed], lr=1.0), Distance(w), epsilon=0.01)
    w.grad, free.grad = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    share = optimizer.metrics["step_kept"]
    assert share == pytest.approx(0.1)
    torch.testing.assert_close(w.detach(), torch.tensor([share, 0.0, 0.0]))
    torch.testing.assert_close(free.detach(), -share * torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(fixed, torch.zeros(3))


@pytest.mark.parametrize("memory", ["copy", "bfloat16", "host"])
def test_wherever_the_gradients_wait(memory):
    drifts, optimizer = run(adam, 40, gradient_memory=memory)
    assert max(drifts) < 2.0 * 0.005
    assert optimizer.param_groups[0]["craft_step"] == 40.0


def test_in_the_start_the_anchors_of_two_more_passes_are_looked_at():
    _, optimizer = run(adam, 3)
    asked = [(n + i, i == 0) for n in range(2) for i in (0, 1, 2, 1, 2)]
    assert optimizer.retention_closure.asked[:10] == asked, "the pass, and the two to come before and after the step"
    assert optimizer.param_groups[0]["craft_anchor_position"] == 3.0


def test_where_no_step_leads_near_there_is_no_copy_and_no_forward(monkeypatch):
    made = []

    class Counted(KeptValues):
        def __init__(self, *arguments, **named):
            made.append(1)
            super().__init__(*arguments, **named)

    monkeypatch.setattr(steps, "KeptValues", Counted)
    small = partial(torch.optim.SGD, lr=1e-6)
    _, optimizer = run(small, 40, retention_every=1)
    assert len(made) == 11, "the first pass of the start, and each fourth"
    asked = len(optimizer.retention_closure.asked)
    assert asked == 40 + 4 * 11
    made.clear()
    (w,) = optimizer.param_groups[0]["params"]
    for _ in range(160):
        optimizer.zero_grad()
        (w - 1.0).square().sum().backward()
        optimizer.step()
    assert len(made) == 10, "on each sixteenth pass"
    assert len(optimizer.retention_closure.asked) == asked + 160 + 2 * 10


@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("epsilon", [1.0, 0.03])
def test_a_warm_up_within_the_start_is_bounded_as_if_each_step_was_looked_at(monkeypatch, factor, epsilon):
    """Steps of 1/500 of the way to an epsilon of 1 at first, and longer ones from each to the next."""

    def warmed_up():
        w = nn.Parameter(torch.zeros(3))
        base = torch.optim.SGD([w], lr=1.0)
        optimizer = CraftOptimizer(base, Distance(w), epsilon=epsilon, retention_every=1)
        way, kept = [], []
        for step in range(30):
            base.param_groups[0]["lr"] = min(0.002 * factor**step, 2.0)
            w.grad = torch.tensor([-1.0, 0.0, 0.0])
            optimizer.step()
            way.append(w[0].item())
            kept.append(optimizer.metrics["step_kept"])
        return way, kept, sum(not gradients for _, gradients in optimizer.retention_closure.asked)

    way, kept, looks = warmed_up()
    monkeypatch.setattr(Drift, "may_leave", lambda *_: True)
    expected = warmed_up()
    assert (way, kept) == expected[:2]
    assert looks <= expected[2] == 4 * 30
    assert max(way) > 0.7 * math.sqrt(epsilon) or factor == 1.1


def test_a_plain_function_is_not_called_again():
    calls = []

    def function(w):
        return lambda: (calls.append(1), w.square().sum())[1]

    drifts, optimizer = run(adam, 50, closure=function)
    assert len(calls) == optimizer.param_groups[0]["craft_anchor_position"]
    assert max(drifts) > 20 * 0.005, "nothing tells how far a step led"
    assert optimizer.metrics["step_kept"] == 1.0


class Sharp(torch.optim.Optimizer):
    """Evaluates its closure away from where it began."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.5})

    def step(self, closure):
        (w,) = self.param_groups[0]["params"]
        with torch.no_grad():
            w.add_(0.1)
        closure()
        with torch.no_grad():
            w.sub_(0.1).sub_(w.grad, alpha=0.5)


@pytest.mark.parametrize("base", [partial(torch.optim.LBFGS, lr=0.5, max_iter=3), Sharp])
def test_bases_that_move_the_model_have_all_of_their_steps(base):
    found = []
    for trust in (1.6, None):
        w = nn.Parameter(torch.zeros(3))
        optimizer = CraftOptimizer(base([w]), Distance(w), epsilon=0.005, trust_region=trust)

        def evaluate(w=w, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (w - torch.tensor([1.0, 0.0, 0.0])).square().sum()
            loss.backward()
            return loss

        for _ in range(8):
            optimizer.step(evaluate)
        looks = [number for number, gradients in optimizer.retention_closure.asked if not gradients]
        unknown = trust is not None and base is Sharp  # until its first step shows that it moves
        assert looks == ([1, 2] if unknown else [])
        found.append(w.detach().clone())
    assert torch.equal(*found)


def test_a_closure_that_the_base_evaluates_first_changes_nothing():
    expected, _ = run(adam, 30)
    w = nn.Parameter(torch.zeros(3))
    optimizer = CraftOptimizer(adam([w]), Distance(w), epsilon=0.005)

    def evaluate():
        optimizer.zero_grad()
        loss = (w - torch.tensor([1.0, 0.0, 0.0])).square().sum()
        loss.backward()
        return loss

    drifts = []
    for _ in range(30):
        optimizer.step(evaluate)
        drifts.append(w.detach().square().sum().item())
    assert drifts == expected
    assert drifts[0] == pytest.approx(0.005, rel=1e-4)


def test_sgd_without_momentum_does_not_stand_still():
    """Drift is at its bound, each step leads far beyond, and something that has no drift is to be learned, too."""
    w, free = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))
    optimizer = CraftOptimizer(
        torch.optim.SGD([w, free], lr=1.0), Distance(w), epsilon=1e-6, projection="never", rho=1e-3
    )
    least = 1.0
    for _ in range(30):
        optimizer.zero_grad()
        w.grad, free.grad = -torch.ones(3), -torch.ones(())
        optimizer.step()
        least = min(least, optimizer.metrics["step_kept"])
    assert least == LEAST
    assert free.item() >= 29 * LEAST


def test_a_step_to_where_the_loss_is_not_finite_is_cut_short():
    class Limited(Distance):
        def loss(self, number):
            loss = super().loss(number)
            return loss if loss < 0.1 else loss * math.inf

    drifts, optimizer = run(adam, 1, closure=Limited)
    assert optimizer.metrics["step_kept"] == LEAST
    assert drifts[0] == pytest.approx((0.5 * LEAST) ** 2)
    (floats,) = optimizer.param_groups
    assert all(math.isfinite(x) for key, x in floats.items() if key.startswith("craft_"))
    _, optimizer = run(adam, 30, closure=Limited)
    assert optimizer.metrics["skipped"] == 0.0


def test_an_epsilon_of_zero_bounds_no_step_of_another_constraint():
    shares = []
    for more in ({}, {"none": 0.0}):
        w = nn.Parameter(torch.zeros(3))
        constraints = {"held": 0.005, **more}
        optimizer = CraftOptimizer(adam([w]), {name: Constraint(Distance(w), x) for name, x in constraints.items()})
        w.grad = torch.tensor([-1.0, 0.0, 0.0])
        optimizer.step()
        shares.append(optimizer.metrics["step_kept"])
    assert shares == pytest.approx([math.sqrt(1 / 50)] * 2)


def test_of_several_constraints_the_tightest_decides():
    shares = []
    for names in (["wide"], ["tight"], ["wide", "tight"]):
        w = nn.Parameter(torch.zeros(3))
        every = {"wide": Constraint(Distance(w), 0.05), "tight": Constraint(Distance(w), 0.002)}
        optimizer = CraftOptimizer(adam([w]), {name: every[name] for name in names})
        w.grad = torch.tensor([-1.0, 0.0, 0.0])
        optimizer.step()
        shares.append(optimizer.metrics["step_kept"])
    assert shares[0] > shares[1] == shares[2]
