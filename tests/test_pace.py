"""K of `retention_every="auto"`: found from the drift that passes measure, kept in the state, told in the metrics."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from craft_optim import CraftOptimizer, Retention, Rules
from craft_optim._step.pace import PACE, due, halved, paced, starting
from craft_optim.dual import MultiplicativePI

AUTO = Rules()


def passes(violations, rules=AUTO, **state):
    """The step of each pass, and the steps that it stands for; the last state."""
    state, found = {**PACE, "craft_step": 0.0, **state}, []
    for violation in violations:
        while not due(state, rules):
            state["craft_step"] += 1.0
        new, steps = paced(state, violation, rules)
        assert new.keys() == PACE.keys()
        found.append((int(state["craft_step"]), steps))
        state |= new
        state["craft_step"] += 1.0
    return found, state


def test_the_start_has_a_pass_on_each_step():
    found, state = passes([0.9] * 40)
    assert found == [(step, 1) for step in range(40)]
    assert not starting(state)
    assert state["craft_every"] == 1.0


@pytest.mark.parametrize(("near", "length"), [(0, 40), (10, 40), (25, 45), (39, 59), (60, 80)])
def test_the_start_lasts_for_twenty_passes_from_where_drift_is_near_epsilon(near, length):
    found, state = passes([0.1] * near + [0.5] + [0.9] * 300)
    assert not starting(state)
    # From then on K grows, to 1.75, which is rounded to 2: the first pass that stands for more than one step
    if near <= 40:
        assert [steps for _, steps in found[:length]] == [1] * length
        assert found[length][1] == 2
    else:  # the start was over before: it comes back
        assert [steps for _, steps in found[near : near + 20]] == [1] * 20
        assert found[near - 1][1] > 1
        assert found[near + 20][1] == 2


def test_k_halves_above_epsilon_grows_below_and_rests_between():
    began = {"craft_start": 0.0, "craft_near": 1.0}
    for before, violation, after in [
        (8.0, 1.11, 4.0),
        (8.0, math.inf, 4.0),
        (1.5, 1.2, 1.0),
        (1.0, 5.0, 1.0),
        (8.0, 1.05, 8.0),
        (8.0, 1.0, 8.0),
        (4.0, 0.99, 4.1875),
        (1.0, 0.2, 1.75),
        (9.99, 0.9, 10.0),
        (10.0, 0.0, 10.0),
    ]:
        state, steps = paced({**PACE, **began, "craft_step": 7.0, "craft_every": before}, violation, AUTO)
        assert state["craft_every"] == after
        assert steps == round(after)
        assert state["craft_next"] == 7.0 + steps


@pytest.mark.parametrize(("steps", "fewer"), [(10, 5), (5, 2), (3, 1), (2, 1)])
def test_a_pass_for_half_of_the_steps_moves_the_next_one_forward(steps, fewer):
    state = {**PACE, "craft_start": 0.0, "craft_near": 1.0, "craft_every": steps + 0.4, "craft_next": 20.0 + steps}
    found, left = halved(state, steps)
    assert left == fewer
    assert found == {**state, "craft_every": float(fewer), "craft_next": 20.0 + fewer}


def test_k_comes_to_ten_where_nothing_is_violated():
    """K^2 grows by about 1.5 for each pass: from 1 to 10 in about sixty."""
    found, _ = passes([0.9] * 200)
    assert found[-1][1] == 10
    assert next(n for n, (_, steps) in enumerate(found) if steps == 10) == pytest.approx(40 + 60, abs=5)


@pytest.mark.parametrize("total", [1, 30, 41, 63, 100, 211])
def test_the_last_step_has_a_pass(total):
    rules = Rules(total_steps=total)
    state, at = {**PACE, "craft_step": 0.0}, []
    for step in range(total + 25):
        state["craft_step"] = float(step)
        if due(state, rules):
            at.append(step)
            state |= paced(state, 0.9, rules)[0]
    assert total - 1 in at
    assert max(at) >= total + 10, "a run that goes on has passes, too"


@pytest.mark.parametrize("every", [1, 3, 25])
def test_a_fixed_k_is_kept_whatever_the_drift(every):
    rules = Rules(retention_every=every, total_steps=60)
    found, _ = passes([0.1, 3.0, 0.9, 0.1, 5.0] * 12, rules)
    assert found == [(every * number, every) for number in range(60)]


@given(st.lists(st.one_of(st.floats(0.0, 20.0), st.just(math.inf)), max_size=300), st.integers(1, 500) | st.none())
def test_no_run_waits_longer_than_ten_steps(violations, total):
    found, state = passes(violations, Rules(total_steps=total))
    for (step, steps), (following, _) in pairwise(found):
        assert 1 <= steps <= 10
        assert following == step + steps
    assert 1.0 <= state["craft_every"] <= 10.0
    assert all(type(x) is float and math.isfinite(x) for x in state.values())


# -- of a run --------------------------------------------------------------------------------------------------------


class Drift(Retention):
    def __init__(self, model):
        self.model, self.teacher = model, copy.deepcopy(model)

    def loss(self, number):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            target = self.teacher(x)
        return (self.model(x) - target).square().mean()


def run(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, CraftOptimizer(base, Drift(model), epsilon=0.02, **settings)


def train(model, optimizer, first, last, seen=None):
    for step in range(first, last):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 + step))
        nn.functional.cross_entropy(model(x), x[:, :3].argmin(1)).backward()
        optimizer.step()
        if seen is not None and optimizer.metrics["fresh"]:
            seen.append((step, int(optimizer.metrics["interval"])))


def test_the_interval_is_the_steps_that_really_pass():
    model, optimizer = run(total_steps=260)
    seen = []
    train(model, optimizer, 0, 260, seen)
    assert [b - a for (a, _), (b, _) in pairwise(seen)] == [steps for _, steps in seen[:-1]]
    assert max(steps for _, steps in seen) > 2
    assert len(seen) == optimizer.param_groups[0]["craft_anchor_position"] < 200
    assert seen[-1][0] == 259
    assert 0.6 < optimizer.metrics["violation"] < 1.6


def test_a_run_that_is_resumed_between_passes_goes_on_to_the_bit(tmp_path):
    straight, expected = run()
    train(straight, expected, 0, 220)

    model, first = run()
    train(model, first, 0, 160)
    while first.param_groups[0]["craft_step"] + 1 >= first.param_groups[0]["craft_next"]:
        train(model, first, int(first.param_groups[0]["craft_step"]), int(first.param_groups[0]["craft_step"]) + 1)
    at = int(first.param_groups[0]["craft_step"])
    assert first.param_groups[0]["craft_every"] > 1.5
    torch.save((model.state_dict(), first.state_dict()), tmp_path / "c.pt")

    resumed, second = run()
    weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    train(resumed, second, at, 220)
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))
    ours = [key for key in expected.param_groups[0] if key.startswith("craft_")]
    assert {k: second.param_groups[0][k] for k in ours} == {k: expected.param_groups[0][k] for k in ours}


def test_a_pass_that_is_skipped_is_made_up_for_on_the_next_step():
    model, optimizer = run()
    train(model, optimizer, 0, 160)
    (group,) = optimizer.param_groups
    step = int(group["craft_next"])
    train(model, optimizer, 160, step)
    before = group["craft_every"]
    assert before > 1.5
    position = group["craft_anchor_position"]
    loss = optimizer.retention_closure.loss
    optimizer.retention_closure.loss = lambda number: loss(number) * math.nan
    with pytest.warns(UserWarning, match="retention pass is not finite"):
        train(model, optimizer, step, step + 1)
    assert (group["craft_every"], group["craft_next"]) == (before, float(step))
    del optimizer.retention_closure.loss
    train(model, optimizer, step + 1, step + 2)
    assert group["craft_anchor_position"] == position + 2.0
    assert optimizer.metrics["retention_step"] == step + 1


class HeldDown:
    """Like "pi", but lambda is held down wherever a pass stands for more than two steps. Keeps what it is told."""

    def __init__(self):
        self.pi, self.asked = MultiplicativePI(), []

    def initial_state(self):
        return self.pi.initial_state()

    def __call__(self, state, *, steps, **values):
        self.asked.append(steps)
        return self.pi(state, steps=steps, **values)._replace(capped=steps > 2)


def test_a_pass_stands_for_no_more_steps_than_its_cap_allows():
    """Before, K stayed, and one pass added up to rho K times the task's gradient."""
    held, seen = HeldDown(), []
    model, optimizer = run(dual=held)
    train(model, optimizer, 0, 260, seen)
    assert {steps for _, steps in seen} == {1, 2}
    assert [b - a for (a, _), (b, _) in pairwise(seen)] == [steps for _, steps in seen[:-1]]
    assert 3 in held.asked, "K would have grown"


def test_a_fixed_k_does_not_follow_the_cap():
    held, seen = HeldDown(), []
    model, optimizer = run(dual=held, retention_every=5, trust_region=None)
    train(model, optimizer, 0, 50, seen)
    assert seen == [(step, 5) for step in range(0, 50, 5)]
    assert held.asked == [5] * 10
