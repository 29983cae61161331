"""The watch over a run: what counts as violated is the mean drift, and each warning comes once."""

import math
import warnings

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, Retention, Rules
from craft_optim._step.watch import CapWatch, HeldOutWatch, StepWatch
from craft_optim._warn import CraftWarning


def look(watch, rows, *more):
    """The messages, each with the number of its row."""
    found = []
    for number, row in enumerate(rows):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch(row, *more)
        found += [(number, str(one.message)) for one in caught]
    return found


def capped(count, **more):
    row = {"capped": 1.0, "drift": 0.2, "epsilon": 0.1, "retention_loss": 0.2, "interval": 1.0, "violation": 2.0}
    return [row | more] * count


def at_cap(rows, name=None):
    watch = CapWatch()
    return look(lambda row: watch.look(name, row, Rules()), rows)


@pytest.mark.parametrize(("every", "patience"), [(1, 100), (3, 34), (10, 20)])
def test_a_cap_is_told_of_by_the_mean_drift(every, patience):
    """Batches below epsilon, whose mean is above: most of what a heavy tail has; and the other way round."""
    below = capped(300, retention_loss=0.01, interval=float(every))
    ((at, message),) = at_cap(below)
    assert at == patience - 1
    assert f"for {patience} retention steps while the drift (0.2) is above epsilon (0.1)" in message
    assert at_cap(capped(300, retention_loss=5.0, drift=0.09, interval=float(every))) == []


def test_it_counts_steps_in_a_row():
    met, free = capped(1, drift=0.1), capped(1, capped=0.0)
    for other in (met, free):
        assert at_cap((capped(99) + other) * 4) == []
        assert [at for at, _ in at_cap(capped(99) + other + capped(250))] == [199]


def test_a_step_that_is_cut_short_for_long_is_told_of_once():
    def found(rows):
        watch = StepWatch()
        return look(watch.look, rows)

    short, whole = [{"step_kept": 0.2, "epsilon": 0.05}], [{"step_kept": 0.25, "epsilon": 0.05}]
    ((at, message),) = found(short * 150 + whole + short * 250)
    assert at == 99
    assert "less than 0.25 of each of the last 100 steps" in message
    assert "(0.05). Lower the learning rate" in message
    assert found((short * 99 + whole) * 3) == []


def test_held_out_drift_that_cannot_be_reached_is_told_of_once():
    asked = 0.03
    bad = {"epsilon_heldout": asked, "heldout": 0.05, "epsilon": asked / 30.0}

    def found(rows, name=None):
        watch = HeldOutWatch()
        return look(lambda row: watch.look(name, row), rows)

    def measured(**more):
        """Eight measurements, each told by two passes."""
        return [bad | {"heldout": bad["heldout"] + 1e-5 * (i // 2)} | more for i in range(16)]

    ((at, message),) = found(measured())
    assert at == 8, "the fifth measurement"
    assert found([*measured()[:8], bad | {"heldout": 0.01}, *measured()[:8]]) == [], "in a row"
    assert "Drift on held-out anchors is 0.05, above epsilon (0.03), and more than 30 times" in message
    assert found(measured(epsilon=asked / 29.0)) == [], "it can still be lowered"
    assert found([row | {"heldout": row["heldout"] - 0.05 + 1.2 * asked} for row in measured()]) == [], (
        "within what noise does"
    )
    assert found(measured(heldout=math.nan)) == [], "not measured yet"
    assert found([{"epsilon": 0.001}]) == [], "without held-out anchors"
    named = [{f"{key}/old": value for key, value in row.items()} for row in measured()]
    assert found(named, "old")[0][1].startswith("Constraint 'old': ")


def test_of_a_run_whose_steps_all_lead_too_far():
    w = nn.Parameter(torch.zeros(3))

    class Distance(Retention):
        def loss(self, number):
            return w.square().sum()

    optimizer = CraftOptimizer(
        torch.optim.SGD([w], lr=1.0), Distance(), epsilon=1e-6, projection="never", rho=1e-3, retention_every=1
    )

    def train():
        for _ in range(250):
            w.grad = torch.tensor([-1.0, 0.0, 0.0])
            with torch.no_grad():
                w.fill_(1e-6)
            optimizer.step()

    with pytest.warns(CraftWarning, match="has left less than 0.25") as caught:
        train()
    assert sum("has left less" in str(one.message) for one in caught) == 1


# -- the mean is what is held ----------------------------------------------------------------------------------------


def alternating(high, **settings):
    """Runs 40 passes of which each fifth has a drift of `high`, the others of 0.01, whatever the model does."""
    x, factors = nn.Parameter(torch.ones(2)), iter([0.01, 0.01, high, 0.01, 0.01] * 100)
    rows = []
    optimizer = CraftOptimizer(
        torch.optim.SGD([x], lr=1e-9), lambda: 0.5 * x.square().sum() * next(factors), epsilon=0.1, retention_every=1,
        on_metrics=rows.append, **settings,
    )  # fmt: skip
    for _ in range(40):
        x.grad = -torch.ones(2)  # against what retention wants
        optimizer.step()
    return rows[10:]


def test_batches_below_epsilon_do_not_hide_a_mean_above_it():
    rows = alternating(2.0)
    assert sum(row["retention_loss"] < row["epsilon"] for row in rows) == 0.8 * len(rows)
    assert all(row["violation"] > 1.0 for row in rows)
    assert all(row["projected"] == row["conflict"] == 1.0 for row in rows)


def test_batches_above_epsilon_do_not_make_a_mean_below_it_violated():
    rows = alternating(0.25)
    assert sum(row["retention_loss"] > row["epsilon"] for row in rows) == 0.2 * len(rows)
    assert all(row["violation"] < 1.0 and row["projected"] == 0.0 for row in rows)


def test_drift_is_the_average_of_the_passes():
    rows = alternating(2.0)
    (first, *_), losses = rows, [row["retention_loss"] for row in rows]
    average = first["drift"]
    for row, loss in zip(rows[1:], losses[1:], strict=True):
        average = 0.8 * average + 0.2 * loss
        assert row["drift"] == pytest.approx(average)
        assert row["violation"] == pytest.approx(average / 0.1)


def test_the_first_drift_is_that_of_the_first_pass():
    x = nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(torch.optim.SGD([x], lr=1e-9), lambda: x.square().sum(), epsilon=0.1)
    x.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.metrics["drift"] == optimizer.metrics["retention_loss"] == 2.0
