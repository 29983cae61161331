"""Drift on held-out anchors while training: measured without touching the run, and a warning if it runs away."""

import json
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from craft_optim import CraftOptimizer, HeldOutDrift, anchors
from craft_optim._warn import CraftWarning
from craft_optim.anchors import LogitRetention
from craft_optim.heldout import runs_away
from craft_optim.metrics import JSONLWriter


@pytest.fixture
def caches(tmp_path):
    """Of 4 anchors in one corner, and of 40 held-out ones everywhere."""
    torch.manual_seed(0)
    model = make_model()
    few, many = torch.zeros(4, 4), torch.randn(40, 4)
    return anchors.build(model, [few], tmp_path / "few", class_dim=-1), anchors.build(
        model, [many], tmp_path / "many", class_dim=-1
    )


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 3)).train()


def train(caches, steps=30, sink=None, lr=0.05, **named):
    """A run, and its weights. `sink` makes one of the closure."""
    model = make_model()
    retention = LogitRetention(model, caches[0], 2, workers=0)
    base = torch.optim.AdamW(model.parameters(), lr=lr)
    closure = {named["name"]: retention} if named else retention
    optimizer = CraftOptimizer(base, closure, epsilon=0.01, on_metrics=sink and sink(retention))
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4)
        nn.functional.cross_entropy(model(inputs), torch.full((8,), step % 2)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_it_changes_nothing_and_passes_everything_on(caches, tmp_path):
    plain = train(caches)
    rows, file = [], tmp_path / "metrics.jsonl"

    def sink(retention):
        write = JSONLWriter(file)

        def both(row):
            model = retention.model
            assert all(p.grad is not None for p in model.parameters())
            assert model.training
            assert retention.position == 0
            own = LogitRetention(model, caches[0], 4, strict=False)
            rows.append((row, own.drift(), own.drift(caches[1])))
            write(row)

        return HeldOutDrift(retention, caches[1], every=10, factor=1e9, sink=both)

    watched = train(caches, sink=sink)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(rows) == 30
    for number, (row, on_anchors, elsewhere) in enumerate(rows):
        assert row["retention_step"] == number
        assert ("drift_heldout" in row) == (number % 10 == 0)
        if number % 10 == 0:
            assert (row["drift_anchors"], row["drift_heldout"]) == pytest.approx((on_anchors, elsewhere))
    assert "drift_heldout" in json.loads(file.read_text().splitlines()[20])


def test_it_warns_once_where_drift_runs_away(caches):
    with pytest.warns(CraftWarning, match=r"on held-out anchors.*more varied ones") as caught:
        train(caches, sink=lambda retention: HeldOutDrift(retention, caches[1], every=5))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_it_is_quiet_where_it_does_not(caches):
    """The same run with the held-out anchors in the place of the anchors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train((caches[1], caches[1]), sink=lambda retention: HeldOutDrift(retention, caches[0], every=5))


def test_of_a_named_constraint(caches):
    rows = []
    train(
        caches,
        2,
        sink=lambda retention: HeldOutDrift(retention, caches[1], name="old", factor=1e9, sink=rows.append),
        name="old",
    )
    assert {"epsilon/old", "drift_anchors/old", "drift_heldout/old"} <= set(rows[0])


@pytest.mark.parametrize(
    ("on_anchors", "elsewhere", "epsilon", "warns"),
    [
        (0.03, 0.29, 0.03, False),
        (0.03, 0.31, 0.03, True),
        (0.01, 0.29, 0.03, False),  # far above the anchors' drift, and within ten times epsilon
        (0.2, 1.9, 0.03, False),  # both are above: the constraint is not met, which is another matter
        (-0.01, 0.31, 0.03, True),
    ],
)
def test_what_is_too_much(on_anchors, elsewhere, epsilon, warns):
    said = runs_away(on_anchors, elsewhere, epsilon)
    assert (said is not None) == warns
    assert runs_away(on_anchors, elsewhere, epsilon, 100.0) is None


def test_several_processes_are_told_what_to_do(caches, monkeypatch):
    retention = LogitRetention(make_model(), caches[0], 2)
    retention.shard(0, 2)
    monitor = HeldOutDrift(retention, caches[1], every=1)
    monitor({"epsilon": 0.01})  # anchors that are shared out by hand, and no processes that would wait
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"Call `measure\(\)` in your loop"):
        monitor({"epsilon": 0.01})
    assert set(monitor.measure()) == {"drift_anchors", "drift_heldout"}
    HeldOutDrift(LogitRetention(make_model(), caches[0], 2), caches[1])({"epsilon": 0.01})  # a run of its own


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("count", 0), ("every", 1.5), ("factor", 1.0)])
def test_what_cannot_be_is_refused(caches, name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*Found {name}={value}"):
        HeldOutDrift(LogitRetention(make_model(), caches[0], 2), caches[1], **{name: value})
