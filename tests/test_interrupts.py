"""Ctrl-C at any line of ours in a step, and an error of any operation: nothing is left halfway, the next step works."""

import copy
import dataclasses
import itertools
import random
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import craft_optim
from craft_optim import CraftOptimizer
from craft_optim._interrupts import interrupts_wait
from craft_optim.anchors import HiddenRetention, LogitRetention, OnlineRetention, Reading, Snapshot, build
from craft_optim.metrics import JSONLWriter

OURS = str(Path(craft_optim.__file__).parent)
INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, checkpoints):
        super().__init__()
        self.checkpoints = checkpoints
        self.first, self.drop, self.norm = nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        def noisy(h):
            return self.norm(self.drop(h)).tanh()

        h = self.first(x)
        h = checkpoint(noisy, h, use_reentrant=False) if self.checkpoints else noisy(h)
        return self.head(self.body(h))


class Run:
    """A model and its optimizer, before a step whose task gradients are there."""

    def __init__(self, kind, folder, first, checkpoints=True):
        torch.manual_seed(0)
        self.model = model = Net(checkpoints)
        model(INPUTS)
        cache = build(model, INPUTS.split(8), folder, class_dim=-1, layers=["body"])
        settings, base = {}, torch.optim.AdamW
        if kind == "online":
            reading = Reading(class_dim=-1)
            retention = OnlineRetention(model, INPUTS, 8, teacher=Snapshot(model), reading=reading)
        elif kind == "several":
            retention = {"logits": LogitRetention(model, cache, 8), "hidden": HiddenRetention(model, cache, 8)}
            settings = {"max_grad_norm": 1.0}
        else:
            retention = LogitRetention(model, cache, 8, workers=2 if kind == "ahead" else 0)
        if kind == "ahead":
            settings = {"gradient_memory": "bfloat16"}
        if kind == "sink":
            settings = {"on_metrics": JSONLWriter(folder.parent / "metrics.jsonl")}
        if kind == "closure":
            base = partial(torch.optim.LBFGS, max_iter=3)
        self.optimizer = CraftOptimizer(base(model.parameters(), lr=0.01), retention, epsilon=0.01, **settings)
        self.by_closure, self.number = kind == "closure", 0
        if not first:
            self.step()
        self.task()

    def task(self):
        self.number += 1
        torch.manual_seed(self.number)
        self.model.zero_grad()
        loss = (self.model(INPUTS[:8]) - 1.0).square().mean()
        loss.backward()
        return loss

    def step(self):
        if self.by_closure:
            self.number = 0
            self.optimizer.step(self.task)
        else:
            self.optimizer.step()

    def values(self):
        """Parameters, buffers and the state of the base and of ours."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def surroundings(self):
        """Everything that is to be after a step as it was before it."""
        model = self.model
        tables = [
            [len(table) for name, table in sorted(vars(m).items()) if name.endswith("_hooks") and table]
            for m in model.modules()
        ]
        return {
            "modes": [(m.training, getattr(m, "p", None)) for m in model.modules()],
            "needs": [p.requires_grad for p in model.parameters()],
            "hooks": tables + [len(p._backward_hooks or ()) for p in model.parameters()],
            "of all optimizers": [len(torch_optimizer._global_optimizer_pre_hooks)],
            "forwards": ["forward" in vars(m) for m in model.modules()],
            "random": self.by_closure
            or [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],  # noqa: NPY002
            "autograd": [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()],
            "stance": torch._dynamo.eval_frame._stance.stance,
            "positions": [c.closure.position for c in self.optimizer.constraints.values()],
        }

    @staticmethod
    def random_state():
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002

    def gradients(self):
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("first", [0, 2])
def test_memory_for_one_gradient_only_is_missing(first, tmp_path, monkeypatch):
    """Of those that wait in bfloat16, after the base's step: the others are there, and the step is counted."""
    run, twin = (Run("ahead", tmp_path / "anchors", True) for _ in range(2))
    twin.step()
    to = torch.Tensor.to
    count = itertools.count()

    def fails(self, *arguments, **named):
        if self.dtype == torch.bfloat16 and torch.float32 in arguments and next(count) == first:
            raise RuntimeError("out of memory")
        return to(self, *arguments, **named)

    step = run.optimizer.base_optimizer.step

    def then(*arguments):
        step(*arguments)
        monkeypatch.setattr(torch.Tensor, "to", fails)

    run.optimizer.base_optimizer.step = then
    with pytest.raises(RuntimeError, match="out of memory"):
        run.step()
    monkeypatch.undo()
    assert same(run.values(), twin.values())
    lost = [g is None for g in run.gradients()]
    assert lost == [number == first for number in range(len(lost))]


def pressed_at(function, at=None):
    """Calls it, with Ctrl-C before line `at` of ours; returns how many lines there are."""
    count = itertools.count()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line" and next(count) == at:
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return next(count)


class Memory(TorchDispatchMode):
    """Runs out at operation `at`, of those that need some; those of the base's step are left out."""

    def __init__(self, at, base):
        super().__init__()
        self.at, self.count, self.others = at, 0, False
        step = base.step

        def theirs(*arguments):
            self.others = True
            try:
                return step(*arguments)
            finally:
                self.others = False

        base.step = theirs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (self.others or any(name in str(function) for name in ("copy_", "lerp_", "is_pinned"))):
            self.count += 1
            if self.count - 1 == self.at:
                raise RuntimeError("out of memory")
        return function(*args, **(kwargs or {}))


def out_of_memory_at(run, at=None):
    with Memory(at, run.optimizer.base_optimizer) as memory:
        run.step()
    return memory.count


def faults(make, fail, keep=True):
    """What is not as it has to be after a step that failed. Its error is kept, as a notebook does, with its frames.

    A step may have been made already when it is measured how far it led: then all of it stays.
    """
    run, twin, whole = make(), make(), make()
    before, around, gradients = run.values(), run.surroundings(), run.gradients()
    twin.step()
    after = twin.values()
    whole.optimizer.rules = dataclasses.replace(whole.optimizer.rules, trust_region=None)
    whole.step()
    kept = None
    try:
        fail(run)
    except (KeyboardInterrupt, RuntimeError, TypeError) as error:  # the last one where a message says more
        kept = error if keep else type(error)
    now, values = run.surroundings(), run.values()
    found = [name for name, value in around.items() if not same(value, now[name])]
    if not run.by_closure:  # which makes gradients, and draws
        rounded = run.optimizer.rules.gradient_memory == "bfloat16"
        for g, w in zip(run.gradients(), gradients, strict=True):
            if not (same(g, w) or (rounded and g is not None and same(g.bfloat16(), w.bfloat16()))):
                found.append("gradients")
    if not any(same(values, allowed) for allowed in (before, after, whole.values())):
        found.append("values in between")
    elif not found and same(values, before) and kept is not None:
        run.step()
        if not same(run.values(), after):
            found.append("the next step")
    return found


KINDS = ["plain", "ahead", "online", "several", "sink", "closure"]


@pytest.mark.filterwarnings("ignore:Running statistics have moved")  # the model has them to see that they are put back
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_not_cut_in_two(kind, first, tmp_path):
    def make():
        return Run(kind, tmp_path / "anchors", first)

    make()
    total = pressed_at(make().step)
    places = range(0, total, 1 + total // 16)
    bad = {at: found for at in places if (found := faults(make, lambda run, at=at: pressed_at(run.step, at)))}
    assert not bad


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("kind", ["plain", "online", "several"])
def test_an_error_leaves_everything_as_it_was(kind, checkpoints, first, tmp_path):
    """With activation checkpointing as long as nobody keeps the error: torch's hooks live as long as its frames."""

    def make():
        return Run(kind, tmp_path / "anchors", first, checkpoints)

    make()
    total = out_of_memory_at(make())
    places = range(0, total, 1 + total // 25)
    bad = {
        at: found
        for at in places
        if (found := faults(make, lambda run, at=at: out_of_memory_at(run, at), keep=not checkpoints))
    }
    assert not bad


def test_the_second_one_does_not_wait():
    reached = []

    def hangs():
        with interrupts_wait():
            for number in range(3):
                reached.append(number)
                signal.raise_signal(signal.SIGINT)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            hangs()
    assert reached == [0, 1, 0, 1]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, "own"])
def test_who_handles_it_is_asked_at_the_end(handler):
    calls = []

    def own(number, frame):
        calls.append((number, frame is not None))

    before = signal.signal(signal.SIGINT, own if handler == "own" else handler)
    try:
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == ([(signal.SIGINT, True)] if handler == "own" else [])
        assert signal.getsignal(signal.SIGINT) == (own if handler == "own" else handler)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_was_set_in_the_block_stays():
    before = signal.getsignal(signal.SIGINT)
    try:
        with interrupts_wait():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_step_as_ever(tmp_path):
    run, errors = Run("plain", tmp_path / "anchors", True), []

    def step():
        try:
            run.step()
        except ValueError as error:  # of signal.signal
            errors.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert errors == []
    assert run.optimizer.param_groups[0]["craft_step"] == 1.0
