"""A closure that may be asked, and others, which are not."""

import copy

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, HeldOutDrift, calibrate
from craft_optim.anchors import build
from craft_optim.retention import Retention, as_retention, measurable


class Own(Retention):
    """Mean squared difference of outputs on numbered inputs."""

    unit = "squares"

    def __init__(self, model):
        self.model, self.teacher, self.asked = model, copy.deepcopy(model), []

    def loss(self, number):
        self.asked.append(number)
        return self.on(torch.randn(8, 3, generator=torch.Generator().manual_seed(number)))

    def on(self, x):
        return (self.model(x) - self.teacher(x).detach()).square().mean()

    def drift(self, anchors=None, count=None):
        with torch.no_grad():
            return float(self.on(torch.eye(3) if anchors is None else anchors)) if count is None else 0.25

    def parameters(self):
        return self.model.parameters()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def train(model, optimizer, steps=5):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((4, 3), float(step))).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_cache_is_no_closure(model, tmp_path):
    cache = build(model, [torch.randn(8, 3)], tmp_path, class_dim=-1, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    words = r"Found AnchorCache: pass what runs the model on it, cache.retention\(model\), such as LogitRetention\("
    for given in (cache, {"held": cache}):
        with pytest.raises(TypeError, match=words):
            CraftOptimizer(optimizer, given)
    with pytest.raises(TypeError, match=r"Found str\.$"):
        CraftOptimizer(optimizer, "anchors/")


def test_its_own_count_is_for_loops_of_ones_own(model):
    own = Own(model)
    train(model, CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), own, trust_region=None))
    assert own.asked == [0, 1, 2, 3, 4]
    assert own.position == 0
    own(), own()
    assert own.asked[5:] == [0, 1]
    again = Own(model)
    again.load_state_dict(own.state_dict())
    again()
    assert again.asked == [2]
    for bad in (-1, 0.5):
        with pytest.raises(ValueError, match=f"`position` must be a whole number >= 0. Found position={bad}"):
            again.position = bad
    with pytest.raises(KeyError):
        again.load_state_dict({})
    own.model = nn.Linear(9, 9)
    with pytest.raises(RuntimeError):
        own()
    assert own.position == 2, "a call that fails does not count"


def test_what_it_does_not_say_has_a_default():
    class Least(Retention):
        def loss(self, number):
            return torch.ones(())

    least = Least()
    assert (least.unit, least.tolerance, least.shared) == ("the closure's own unit", float("inf"), False)
    assert (list(least.parameters()), least.examples(3)) == ([], [])
    with pytest.raises(TypeError, match="Least has no `drift`"):
        least.drift()
    least.shard(1, 2, lambda x: x)
    assert least.shared
    with pytest.raises(TypeError):
        Retention()


def test_attributes_of_other_objects_are_neither_read_nor_written(model):
    """A user's object may be called `position`, have a `shard`, or anything."""

    class Others:
        def __init__(self):
            self.position, self.parameters, self.shard, self.loss = "left of the door", None, "3 of 4", 0.5
            self.unit, self.tolerance, self.shared, self.drift, self.state_dict = 1, "none", [], (), None

        def __call__(self):
            return model.weight.square().sum()

    def function():
        return model.weight.square().sum()

    start, found = copy.deepcopy(model.state_dict()), []
    for closure in (Others(), function):
        model.load_state_dict(start)
        before = copy.copy(vars(closure))
        optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), closure, epsilon=0.1)
        found.append(train(model, optimizer))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert vars(closure) == before
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("closure", [3, Own, None], ids=str)
def test_what_is_no_closure_is_refused(closure):
    with pytest.raises(TypeError, match=r"`mine` must be callable without arguments"):
        as_retention(closure, "mine")


@pytest.mark.parametrize(("name", "value"), [("unit", 3), ("tolerance", -1.0), ("tolerance", None)])
def test_what_it_says_is_checked(model, name, value):
    own = Own(model)
    setattr(own, name, value)
    with pytest.raises(TypeError, match=rf"`retention\.{name}` must be .*{value}"):
        measurable(own)


def test_a_closure_of_ones_own_is_watched_and_calibrated(model):
    own, rows = Own(model), []
    sink = HeldOutDrift(own, 3.0 * torch.eye(3), every=2, count=None, factor=1e9, sink=rows.append)
    train(model, CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), own, on_metrics=sink))
    assert ["drift_heldout" in row for row in rows] == [True, False, True, False, True]
    assert rows[4]["drift_anchors"] == own.drift()
    assert rows[4]["drift_heldout"] == own.drift(3.0 * torch.eye(3)) > rows[4]["drift_anchors"]
    assert HeldOutDrift(own, None).measure() == {"drift_anchors": 0.25, "drift_heldout": 0.25}, "on so many"
    own.tolerance = 0.01
    with pytest.raises(ValueError, match=r"must be rounding, at most 0\.01"):
        calibrate(model, own)
    found = calibrate(model, Own(model))
    assert found.unit == "squares"


@pytest.mark.parametrize("measure", [lambda c, m: HeldOutDrift(c, None), lambda c, m: calibrate(m, c)])
def test_what_cannot_be_measured_is_refused_before_anything_runs(model, measure):
    class Silent(Retention):
        def loss(self, number):
            raise AssertionError("ran")

    for closure, name in ((lambda: None, "function"), (Silent(), "Silent")):
        with pytest.raises(TypeError, match=rf"`retention` must be .* a method `drift\(\)` .* Found {name}"):
            measure(closure, model)
