"""Epsilon as the drift on held-out anchors: followed by measurements, within bounds, resumed, or refused."""

import math
import warnings

import pytest
import torch
from torch import nn

from craft_optim import Constraint, CraftOptimizer, Retention
from craft_optim._warn import CraftWarning
from craft_optim.anchors import HiddenRetention, build

EPSILON = 0.01


class Held(Retention):
    """Drift w^2 on the anchors; on others so many times it as these say."""

    def __init__(self, w):
        self.w, self.measured = w, []

    def loss(self, number):
        return self.w.square().sum()

    def drift(self, anchors=None, count=None):
        self.measured.append((anchors, count))
        return float(self.w.detach().square().sum()) * (1.0 if anchors is None else anchors)


def run(heldout, count=400, lr=2e-3, epsilon=EPSILON, start=None, named=False, **settings):
    w = nn.Parameter(torch.zeros(2))
    closure, keyword = Held(w), {"epsilon": epsilon, "heldout": heldout}
    if named:
        closure, keyword = {"old": Constraint(closure, epsilon, heldout=heldout)}, {}
    optimizer = CraftOptimizer(torch.optim.SGD([w], lr=lr), closure, **keyword, **settings)
    if start is not None:
        optimizer.load_state_dict(start[1])
        with torch.no_grad():
            w.copy_(start[0])
    rows = []
    for _ in range(count):
        optimizer.zero_grad()
        (w - torch.tensor([1.0, 0.0])).square().sum().backward()
        optimizer.step()
        rows.append(dict(optimizer.metrics))
    return w.detach().square().sum().item(), optimizer, rows


@pytest.mark.parametrize("times", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("named", [False, True])
def test_drift_on_the_held_out_anchors_ends_at_epsilon(times, named):
    drift, optimizer, _ = run(times, named=named, retention_every=1)
    end = "/old" if named else ""
    assert drift * times == pytest.approx(EPSILON, rel=0.15)
    m = optimizer.metrics
    assert m["epsilon_heldout" + end] == EPSILON
    assert m["epsilon" + end] == pytest.approx(EPSILON / times, rel=0.15)
    assert m["violation" + end] == pytest.approx(m["drift" + end] / m["epsilon" + end])
    assert m["heldout" + end] == pytest.approx(EPSILON, rel=0.2)


def test_without_them_it_is_the_drift_on_the_anchors():
    drift, optimizer, _ = run(None, retention_every=1)
    assert drift == pytest.approx(EPSILON, rel=0.05)
    assert not {"heldout", "epsilon_heldout"} & set(optimizer.metrics)
    assert optimizer.retention_closure.measured == []


def test_they_are_measured_every_twenty_fifth_step_on_128():
    _, optimizer, rows = run(4.0, 140)
    assert set(optimizer.retention_closure.measured) == {(4.0, 128)}
    (group,) = optimizer.param_groups
    assert len(optimizer.retention_closure.measured) == group["craft_heldout_count"]
    first = next(n for n, row in enumerate(rows) if not math.isnan(row["heldout"]))
    assert all(row["drift"] <= 0.02 * EPSILON for row in rows[:first]), "too little to say anything of the quotient"
    changes = [n for n in range(1, 140) if rows[n]["heldout"] != rows[n - 1]["heldout"] and n > first]
    gaps = [b - a for a, b in zip([first, *changes], changes, strict=False)]
    assert gaps
    assert all(25 <= gap < 25 + 10 for gap in gaps), "on the next pass"
    assert gaps[0] == 25, "of the start, when each step has one"


def test_one_measurement_that_is_off_moves_epsilon_by_less():
    """The first is all that is known; of later ones an average in the logarithm, in which the last counts 0.3."""
    w = nn.Parameter(torch.full((2,), 0.05))
    times, retention = iter([4.0, 4.0, 4.0, 4.0, 4.0, 4.0 * math.e]), Held(w)
    retention.drift = lambda anchors, count: next(times) * retention.loss(0).item()
    optimizer = CraftOptimizer(torch.optim.SGD([w], lr=0.0), retention, epsilon=0.1, heldout=1.0, retention_every=1)
    found = []
    for step in range(126):
        w.grad = torch.ones(2)
        optimizer.step()
        if step % 25 == 0:
            found.append(0.1 / optimizer.metrics["epsilon"])
    assert found == pytest.approx([4.0] * 5 + [4.0 * math.exp(0.3)])


@pytest.mark.parametrize(("times", "quotient"), [(1e-3, 1.0 / 3.0), (0.4, 0.4), (29.0, 29.0), (1e4, 30.0)])
def test_the_quotient_has_bounds(times, quotient):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CraftWarning)
        _, optimizer, _ = run(times, 200, retention_every=1)
    assert EPSILON / optimizer.metrics["epsilon"] == pytest.approx(quotient, rel=0.1)


def test_where_it_cannot_be_reached_a_warning_says_so_once():
    with pytest.warns(CraftWarning, match=r"Drift on held-out anchors is .*, above epsilon \(0.01\)") as caught:
        run(1e4, 200, retention_every=1)
    assert sum("held-out" in str(one.message) for one in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", CraftWarning)
        run(20.0, 200, retention_every=1)


def test_a_resumed_run_goes_on_with_what_was_measured():
    straight, expected, rows = run(4.0, 150)
    _, first, _ = run(4.0, 90)
    w = first.param_groups[0]["params"][0].detach().clone()
    found, second, again = run(4.0, 60, start=(w, first.state_dict()))
    assert found == straight
    assert again[-1] == rows[-1] == expected.metrics
    assert second.param_groups[0]["craft_heldout_count"] == expected.param_groups[0]["craft_heldout_count"] > 3
    assert len(second.retention_closure.measured) < len(expected.retention_closure.measured)


def test_other_anchors_begin_without_a_measurement():
    _, optimizer, _ = run(4.0, 90)
    optimizer.retention_closure = Held(optimizer.param_groups[0]["params"][0])
    (group,) = optimizer.param_groups
    assert group["craft_heldout_count"] == group["craft_heldout_quotient"] == group["craft_drift_passes"] == 0.0
    assert group["craft_growth"] == -1.0


def test_what_cannot_be_measured_is_refused():
    w = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([w], lr=0.1)

    class Silent(Retention):
        def loss(self, number):
            return w.square().sum()

    for closure in (lambda: w.square().sum(), Silent()):
        with pytest.raises(TypeError, match=r"with a method `drift\(\)`"):
            CraftOptimizer(base, closure, heldout=4.0)
        with pytest.raises(TypeError, match=r"with a method `drift\(\)`"):
            Constraint(closure, heldout=4.0)
    held = {"a": Held(w), "b": Held(w)}
    with pytest.raises(ValueError, match=r"`heldout` is one closure's.*names 2.*Constraint\(retention, heldout=...\)"):
        CraftOptimizer(base, held, heldout=4.0)
    with pytest.raises(ValueError, match=r"`heldout` is the closures'.*1 Constraint objects. Found heldout=4.0"):
        CraftOptimizer(base, {"a": Constraint(held["a"])}, heldout=4.0)
    assert not any(key.startswith("craft_") for key in base.param_groups[0])


def test_anchors_of_another_kind_are_refused_before_the_first_step(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(8, 4)
    cache = build(model, [inputs], tmp_path / "both", class_dim=-1, layers=["0"], progress=False)
    logits = build(model, [inputs], tmp_path / "logits", class_dim=-1, progress=False)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    retention = HiddenRetention(model, cache, 4)
    with pytest.raises(ValueError, match="hidden"):
        CraftOptimizer(base, retention, heldout=logits)
    CraftOptimizer(base, retention, heldout=cache)
