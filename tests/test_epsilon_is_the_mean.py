"""Epsilon is the mean drift: of noisy batches, at any scale of both losses, with and without projection."""

import math

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, Retention

EPSILON = 0.01


class Noisy(Retention):
    """factor x^2, times log-normal noise of mean 1 for each pass."""

    def __init__(self, x, spread, factor=1.0):
        self.x, self.spread, self.factor = x, spread, factor

    def loss(self, number):
        draw = torch.randn((), generator=torch.Generator().manual_seed(number), dtype=torch.float64).item()
        return self.factor * self.x.square().sum() * math.exp(self.spread * draw - self.spread**2 / 2.0)


def run(spread, count, scale=1.0, factor=1.0, **settings):
    """x is drawn to 1 by a task loss times `scale`, and is 0.1 at epsilon. The metrics of passes, x^2 of all steps."""
    x = nn.Parameter(torch.zeros((), dtype=torch.float64))
    rows, drifts = [], []
    retention = Noisy(x, spread, factor)
    base = torch.optim.SGD([x], lr=3e-4 / scale)
    optimizer = CraftOptimizer(base, retention, epsilon=EPSILON * factor, on_metrics=rows.append, **settings)
    for _ in range(count):
        optimizer.zero_grad()
        (scale * (1.0 - x)).backward()
        optimizer.step()
        drifts.append(x.item() ** 2)
    return rows, drifts


@pytest.mark.parametrize(("spread", "most"), [(0.0, 1.1), (0.25, 1.1), (0.5, 1.1), (1.0, 1.15), (1.5, 1.35)])
def test_the_mean_drift_of_noisy_batches_is_epsilon(spread, most):
    """At the widest spread a fifth of the mean is in batches above nine times epsilon, which count as nine."""
    rows, drifts = run(spread, 3000)
    assert 0.9 < sum(drifts[1000:]) / 2000 / EPSILON < most
    assert any(row["capped"] for row in rows) == (spread > 0.0), "to leave out the passes at the cap would show"


@pytest.mark.filterwarnings("ignore:.*The trust region has left less")  # until the multiplier is there
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_multiplier_alone_holds_it_with_all_other_defaults(spread):
    rows, drifts = run(spread, 3000, projection="never")
    assert 0.9 < sum(drifts[1000:]) / 2000 / EPSILON < 1.15
    assert max(row["interval"] for row in rows[len(rows) // 2 :]) > 1.0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("of", ["task", "retention"])
def test_a_run_is_the_same_at_any_scale_of_either_loss(of, scale):
    expected, path = run(0.5, 400)
    found, scaled_path = run(0.5, 400, **({"scale": scale} if of == "task" else {"factor": scale}))
    assert scaled_path == pytest.approx(path, rel=1e-6)
    by = scale if of == "task" else 1.0 / scale
    # Not of the first pass, at the teacher, where there is no gradient and so no unit
    assert [row["lambda"] for row in found[1:]] == pytest.approx([row["lambda"] * by for row in expected[1:]], rel=1e-6)
    for same in ("violation", "interval", "step_kept", "capped", "projected"):
        assert [row[same] for row in found] == pytest.approx([row[same] for row in expected], rel=1e-6)
    assert any(row["interval"] > 1.0 for row in found)
