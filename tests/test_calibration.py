"""What epsilon means for a model and its anchors; and that finding out leaves nothing behind."""

import copy
import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import craft_optim
from craft_optim import CraftOptimizer, anchors
from craft_optim._warn import CraftWarning
from craft_optim.anchors import (
    AnchorCache,
    CombinedRetention,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    Reading,
)
from craft_optim.calibration import calibrate, suggest
from craft_optim.retention import Retention


class Net(nn.Module):
    """With everything that a pass could leave behind: dropout, statistics, a buffer that is no state, a frozen part."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.frozen, self.last = nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 5)
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x):
        if torch.is_grad_enabled() and self.training:
            self.calls = self.calls + 1  # another tensor under the same name
        return self.last(self.frozen(self.drop(self.norm(self.first(x)).relu())))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
    return model.train()


@pytest.fixture
def batches():
    return list(torch.randn(60, 6, generator=torch.Generator().manual_seed(1)).split(12))


@pytest.fixture
def caches(net, batches, tmp_path):
    """Of 36 anchors and 24 held-out ones."""
    return anchors.build(net, batches[:3], tmp_path / "a", class_dim=-1), anchors.build(
        net, batches[3:], tmp_path / "held", class_dim=-1
    )


@pytest.fixture
def closure(net, caches):
    return LogitRetention(net, caches[0], batch_size=8, workers=0)


def task_batch(number):
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(8, 6, generator=generator), torch.randint(5, (8,), generator=generator)


class Loop:
    """A plain one, whose batches come from an iterator."""

    def __init__(self, model, optimizer=None, lr=1e-2, after=None):
        self.model = model
        self.optimizer = optimizer or torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
        self.number, self.after = 0, after

    def __call__(self):
        inputs, labels = task_batch(self.number)
        self.number += 1
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        loss.backward()
        self.optimizer.step()
        random.random(), np.random.random()  # noqa: NPY002
        if self.after is not None:
            self.after(self.number)
        return loss


def bits(value):
    """Everything in it, comparable."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().clone().reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {(id(k) if isinstance(k, torch.Tensor) else k): bits(x) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [bits(x) for x in value]
    return value


def everything(model, optimizer, closure):
    return {
        "tensors": bits({n: (id(x), bits(x)) for n, x in [*model.named_parameters(), *model.named_buffers()]}),
        "gradients": [None if p.grad is None else (id(p.grad), bits(p.grad)) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "state": bits(dict(optimizer.state)),
        "places": [id(x) for state in optimizer.state.values() for x in state.values()],
        "groups": bits(optimizer.param_groups),
        "random": (bits(torch.get_rng_state()), random.getstate(), bits(torch.from_numpy(np.random.get_state()[1]))),  # noqa: NPY002
        "position": closure.position,
    }


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [None, Stopped, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_all_is_as_before_to_the_bit(net, closure, caches, error, begun):
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-2)
    if begun:  # state and gradients are there, and the closure is in the middle
        start = copy.deepcopy(net.state_dict())
        Loop(net, optimizer)()
        net.load_state_dict(start)
        closure.position = 3
    net.drop.eval()

    held = [p.grad for p in net.parameters() if p.grad is not None]

    def stop(number):
        net.train(number == 1)
        for grad in held:  # as DDP does, whose gradients are views of its buckets
            grad.zero_()
        if error is not None and number == 3:
            raise error

    before = everything(net, optimizer, closure)
    assert any(x is not None for x in before["gradients"]) == begun
    loop = Loop(net, optimizer, after=stop)
    if error is None:
        calibrate(net, closure, train_step=loop, steps=(1, 5), heldout=caches[1])
    else:
        with pytest.raises(error):
            calibrate(net, closure, train_step=loop, steps=(1, 5))
    assert loop.number == (5 if error is None else 3)
    assert everything(net, optimizer, closure) == before
    assert not _global_optimizer_pre_hooks


def test_training_goes_on_as_if_nothing_had_been(net, closure):
    twin, loops = copy.deepcopy(net), []
    for model in (net, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loops.append((Loop(model, optimizer, after=lambda _, s=schedule: s.step()), schedule))
    for loop, _ in loops:
        torch.manual_seed(7)
        start = copy.deepcopy(loop.model.state_dict())
        loop()
        loop.model.load_state_dict(start)
    (loop, schedule), (other, _) = loops
    calibrate(net, closure, train_step=Loop(net, loop.optimizer, after=loop.after), steps=(4,), restore=[schedule])
    torch.manual_seed(8)
    loop()
    torch.manual_seed(8)
    other()
    assert bits(net.state_dict()) == bits(twin.state_dict())
    assert schedule.last_epoch == 2


def test_numbers_are_those_of_a_run(net, closure, caches):
    twin = copy.deepcopy(net)
    torch.manual_seed(3)
    found = calibrate(net, closure, train_step=Loop(net), steps=(1, 20), heldout=caches[1], anchors=1000)

    own = LogitRetention(twin, caches[0], batch_size=8, workers=0)
    assert found.noise == abs(own.drift())
    loop, losses = Loop(twin), []
    torch.manual_seed(3)
    for number in range(1, 21):
        losses.append(loop().item())
        if number in (1, 20):
            plain = found.plain[number // 20]
            assert plain.steps == number
            assert (plain.drift, plain.heldout) == pytest.approx((own.drift(), own.drift(caches[1])))
            assert plain.loss == pytest.approx(sum(losses[-10:]) / len(losses[-10:]))
    assert found.learning_rate == 1e-2
    assert found.suggestion == suggest(found.floor, found.plain[1].drift, nats=True)


def test_drifts_of_bfloat16(net, closure, caches):
    found = calibrate(net, closure)
    rounded = copy.deepcopy(net)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
    assert found.bfloat16_weights == pytest.approx(LogitRetention(rounded, caches[0], strict=False).drift())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found.bfloat16_autocast == pytest.approx(closure.drift())
    assert found.noise < found.bfloat16_weights < found.bfloat16_autocast
    assert found.floor == 10 * found.bfloat16_autocast
    assert found.suggestion is None
    assert calibrate(net, closure, bfloat16=False).floor == 10 * found.noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert calibrate(net, LogitRetention(net, caches[0], tolerance=0.1, strict=False)).bfloat16_autocast is None


def test_it_prints_and_goes_into_json(net, closure, caches):
    found = calibrate(net, closure, train_step=Loop(net), steps=(1, 30), heldout=caches[1])
    assert json.loads(json.dumps(found.to_dict()))["plain"][1]["drift"] == found.plain[1].drift
    text = str(found)
    for part in ("unchanged", "weights in bfloat16", "1 plain step ", "30 plain steps", "on held-out", "task loss"):
        assert part in text
    assert f"epsilon: try {found.suggestion.epsilon:.2g} (tight" in text
    assert max(map(len, text.splitlines())) < 130
    alone = str(calibrate(net, closure))
    assert "task loss" not in alone
    assert "`train_step=` makes it a suggestion" in alone


class Own(Retention):
    """A closure of the user's."""

    def __init__(self, model):
        self.model, self.start = model, [p.detach().clone() for p in model.parameters()]

    def loss(self, number):
        return sum((p - q).square().sum() for p, q in zip(self.model.parameters(), self.start, strict=True))

    def drift(self, anchors=None, count=None):
        with torch.no_grad():
            return float((1.0 if anchors is None else anchors) * self.loss(0))


def closures(net, batches, path):
    hidden = anchors.build(net, batches, path / "hidden", output=None, layers=["norm"])
    logits = anchors.build(net, batches, path / "logits", class_dim=-1)
    both = anchors.build(net, batches, path / "both", layers=["norm"], class_dim=-1)
    yield "hidden cache", hidden, "variance"
    yield "hidden", HiddenRetention(net, hidden, 8, loss="l1"), "deviation"
    yield "top-k cache", anchors.build(net, batches, path / "top", top_k=2), "nats"
    yield (
        "online",
        OnlineRetention(
            net,
            torch.cat(batches),
            8,
            teacher=copy.deepcopy(net).requires_grad_(False),
            reading=anchors.Reading(class_dim=-1),
        ),
        "nats",
    )
    yield "on a cache", OnlineRetention(net, logits, 8, teacher=copy.deepcopy(net).requires_grad_(False)), "nats"
    members = {"logits": LogitRetention(net, both, 8), "hidden": HiddenRetention(net, both, 8)}
    yield "combined", CombinedRetention(members, {"hidden": 0.5}), "own unit"
    yield "own", Own(net), "own unit"


def test_every_closure(net, batches, tmp_path):
    for name, closure, unit in closures(net, batches, tmp_path):
        heldout = {"own": 2.0, "online": torch.cat(batches)}.get(name)
        if isinstance(closure, AnchorCache):
            heldout = closure
        found = calibrate(net, closure, train_step=Loop(net), steps=(1, 10), anchors=16, heldout=heldout)
        assert unit in found.unit, name
        assert found.noise < 1e-3 < found.plain[1].drift, name
        assert found.noise < found.plain[0].drift < found.plain[1].drift, name
        tight, epsilon, loose = found.suggestion.tight, found.suggestion.epsilon, found.suggestion.loose
        assert found.floor <= tight <= epsilon <= loose <= found.plain[1].drift, name
        if heldout is not None:
            assert found.plain[1].heldout == pytest.approx(found.plain[1].drift * (2.0 if name == "own" else 1.0)), name


def test_drift_on_part_of_the_anchors(net, batches, tmp_path):
    """Evenly apart: of the 60 those with the numbers 7, 22, 37 and 52."""
    some = torch.cat(batches)[[7, 22, 37, 52]]
    for name, closure, _ in closures(net, batches, tmp_path):
        if isinstance(closure, AnchorCache) or name == "own":
            continue
        position = closure.position
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.01)
        part = closure.drift(count=4)
        if name == "online":
            assert part == pytest.approx(closure.drift(some), rel=1e-5), name
        assert part != pytest.approx(closure.drift(), rel=1e-5), name
        assert closure.drift(None, 60) == pytest.approx(closure.drift(), rel=1e-5), name
        assert closure.position == position
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.01)


@pytest.mark.parametrize(
    ("floor", "plain", "nats", "expected"),
    [
        (1e-4, 2.4, True, (0.003, 0.02, 0.1)),
        (1e-4, 0.05, True, (0.003, 0.02, 0.05)),  # never above what plain training does
        (0.01, 2.4, True, (0.01, 0.02, 0.1)),  # nor below rounding
        (1e-4, 2.0, False, (0.006, 0.02, 0.2)),
        (1e-4, 0.2, False, (0.0006, 0.002, 0.02)),
        (0.01, 0.2, False, (0.01, 0.01, 0.02)),
        (0.1, 0.1, True, None),
        (0.1, -0.5, True, None),
    ],
)
def test_suggestions(floor, plain, nats, expected):
    found = suggest(floor, plain, nats=nats)
    assert (found and (found.tight, found.epsilon, found.loose)) == (expected and pytest.approx(expected))


def test_nothing_to_suggest_where_nothing_moves(net, closure):
    found = calibrate(net.eval(), closure, train_step=Loop(net, lr=1e-9), steps=(2,))
    assert found.suggestion is None
    assert "none to suggest" in str(found)


# What is refused


def refused(net, closure, match, error=ValueError, **settings):
    before = bits(net.state_dict())
    with pytest.raises(error, match=match):
        calibrate(net, closure, **settings)
    assert bits(net.state_dict()) == before


def test_what_cannot_be_is_refused(net, closure, caches, tmp_path, batches):
    refused(net, closure, r"`steps`.*Found steps=\(5, 1\)", steps=(5, 1))
    refused(net, closure, r"`steps`.*Found steps=\(\)", steps=())
    refused(net, closure, r"`anchors`.*Found anchors=0", anchors=0)
    refused(copy.deepcopy(net), closure, "closure of another one")
    refused(net, lambda: None, r"method `drift\(\)`.*Found function", TypeError)
    refused(net, closure, r"`restore`.*Found object", TypeError, restore=[object()])
    both = anchors.build(net, batches, tmp_path / "both", layers=["norm"], class_dim=-1)
    refused(net, both, r"logits and hidden.*cache.retention\(model, 'logits'\) or cache.retention\(model, 'hidden'\)")
    refused(net, closure, "none has stepped", train_step=lambda: None, steps=(1,))
    refused(net, closure, r"After 3 steps the drift is nan", train_step=Loop(net, lr=math.inf), steps=(3,))
    craft = CraftOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), closure)
    refused(net, closure, "step its `base_optimizer`", TypeError, train_step=Loop(net, craft))
    calibrate(net, closure, train_step=Loop(net, craft.base_optimizer), steps=(1,))


def test_a_sharded_model_is_refused():
    class FullyShardedDataParallel(nn.Linear):
        pass

    model = FullyShardedDataParallel(2, 2)
    refused(model, Own(model), "sharded over processes", TypeError)


def test_a_model_that_has_moved_is_refused(net, closure, caches):
    Loop(net, lr=0.1)()
    refused(net, closure, "has other weights", anchors.AnchorMismatchError)
    refused(net, LogitRetention(net, caches[0], strict=False), "before it is fine-tuned")


def test_a_scheduler_that_is_not_named_is_refused(net, closure):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    match = r"restore=\[scheduler\]"
    refused(net, closure, match, train_step=Loop(net, optimizer, after=lambda _: schedule.step()))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_warm_up_is_told(net, closure):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    with pytest.warns(CraftWarning, match=r"at most 0.002, where a schedule begins from 0.1: it is warming up"):
        calibrate(net, closure, train_step=Loop(net, optimizer), steps=(1,))


def test_parameters_outside_of_the_model(net, closure):
    """A head that the task adds, in the same optimizer."""
    head = nn.Linear(5, 2)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
    before = bits(head.state_dict())

    def step():
        optimizer.zero_grad()
        head(net(task_batch(0)[0])).square().mean().backward()
        optimizer.step()

    found = calibrate(net, closure, train_step=step, steps=(2,))
    assert found.plain[0].loss is None
    assert bits(head.state_dict()) == before
    assert head.weight.grad is None


# Anchors that are inputs of the new task


def test_anchors_of_the_new_task_are_told(net, closure, batches):
    loop = Loop(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrate(net, closure, train_step=loop, steps=(2,))
    assert (found.overlap.anchors, found.overlap.looked_for, found.overlap.task_rows) == (0, 36, 16)

    def step():
        loop.optimizer.zero_grad()
        net(batches[2].flip(0)[:5]).square().mean().backward()
        loop.optimizer.step()

    with pytest.warns(CraftWarning, match="5 of 36 anchors are inputs of the new task"):
        calibrate(net, closure, train_step=step, steps=(1,))


def test_task_batches_are_looked_through(net, tmp_path):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.last = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids, mask=None):
            return self.last(self.embed(ids))

    model = Tokens()
    rows = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 0, 0, 0]])
    cache = anchors.build(
        model, [{"ids": rows, "mask": rows.ne(0)}], tmp_path / "c", Reading(mask="mask"), class_dim=-1
    )
    retention = LogitRetention(model, cache, 3)
    shorter = {"ids": rows[1:, :2], "mask": rows[1:, :2].ne(0), "labels": torch.zeros(2, 2)}
    with pytest.warns(CraftWarning, match="2 of 3 anchors"):
        calibrate(model, retention, task_batches=[shorter])
    other = {"ids": rows[1:], "mask": torch.ones(2, 4, dtype=torch.bool)}
    assert calibrate(model, retention, task_batches=[other]).overlap.anchors == 0
    refused(model, retention, "without mask they cannot be compared", task_batches=[{"ids": rows}])


def test_it_is_a_public_name():
    assert craft_optim.calibrate is calibrate
    assert {"calibrate", "Calibration", "HeldOutDrift"} <= set(craft_optim.__all__)
