"""Where the task gradients wait: what is the same as with a plain copy, what is stated as different, what is freed."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer
from craft_optim._step import gradients as gradient_lists
from craft_optim._step.reference import reference_merge
from craft_optim.dual import Update

INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


class Fixed:
    """A controller that always says the same."""

    def __init__(self, multiplier):
        self.multiplier = multiplier

    def initial_state(self):
        return {}

    def __call__(self, state, *, cap, **_):
        return Update(min(self.multiplier, cap), {}, self.multiplier > cap)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 2))


def setup(memory, *, base=torch.optim.SGD, lr=0.1, **settings):
    model = network()
    teacher = copy.deepcopy(model)
    optimizer = CraftOptimizer(
        base(model.parameters(), lr=lr), lambda: (model(INPUTS) - teacher(INPUTS).detach()).square().mean(),
        gradient_memory=memory, **settings,
    )  # fmt: skip
    return model, optimizer


def task_backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    (model(x) - torch.tensor([2.0, -2.0])).square().mean().backward()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def seen_by_the_base(optimizer, model):
    """The gradients of every step that the base takes."""
    steps = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: steps.append(gradients(model)))
    return steps


def retention_gradients(optimizer, model):
    return torch.autograd.grad(optimizer.retention_closure(), list(model.parameters()))


@pytest.fixture
def away(monkeypatch):
    """A CPU whose main memory counts as another device's."""
    monkeypatch.setattr(gradient_lists, "_is_host", lambda device: False)


# Host


def test_gradients_that_wait_on_the_host_change_no_bit(away):
    runs = []
    for memory in ("copy", "host"):
        model, optimizer = setup(memory, base=torch.optim.AdamW, lr=1e-2, epsilon=0.05)
        for step in range(20):
            optimizer.zero_grad()
            task_backward(model, step)
            before = gradients(model)
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))
        runs.append(([p.detach().clone() for p in model.parameters()], dict(optimizer.metrics)))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))


@pytest.mark.parametrize("memory", ["host", "bfloat16"])
def test_the_memory_is_free_while_the_pass_runs(away, memory):
    model, optimizer = setup(memory)
    alive = []
    inner = optimizer.retention_closure

    def watching():
        alive.append(sum(reference() is not None for reference in watched))
        return inner()

    optimizer.retention_closure = watching
    for step in range(2):
        optimizer.zero_grad()
        task_backward(model, step)
        watched = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
    assert alive == [0, 0]


def test_gradients_that_are_views_stay_where_they_are():
    model, optimizer = setup("bfloat16")
    task_backward(model, 0)
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    views = [
        v.view_as(p)
        for v, p in zip(flat.split([p.numel() for p in model.parameters()]), model.parameters(), strict=True)
    ]
    for p, v in zip(model.parameters(), views, strict=True):
        p.grad = v
    before = flat.clone()
    optimizer.step()
    assert all(p.grad is v for p, v in zip(model.parameters(), views, strict=True))
    assert torch.equal(flat, before)


# bfloat16


def test_rounded_gradients_are_off_by_what_is_stated():
    model, optimizer = setup("bfloat16", epsilon=0.01, dual=Fixed(0.5), rho=math.inf)
    steps = seen_by_the_base(optimizer, model)
    for step in range(3):
        optimizer.zero_grad()
        task_backward(model, step)
        task, retention = gradients(model), retention_gradients(optimizer, model)
        optimizer.step()
        rounded = [t.bfloat16().float() for t in task]
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        assert all(torch.equal(g, r) for g, r in zip(gradients(model), rounded, strict=True))
        assert any(not torch.equal(r, t) for r, t in zip(rounded, task, strict=True))
        for t, r in zip(task, rounded, strict=True):
            assert ((r - t).abs() <= 2.0**-8 * t.abs()).all()
        expected = reference_merge(
            rounded, list(retention), list(model.parameters()), lam=0.5, project=optimizer.metrics["projected"] > 0
        )
        for g, e in zip(steps[-1], expected, strict=True):
            torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-7)


def test_a_rounded_gradient_without_a_partner_keeps_its_dtype():
    model = network()
    optimizer = CraftOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda: model[0](INPUTS).square().mean(),
        gradient_memory="bfloat16",
    )
    steps = seen_by_the_base(optimizer, model)
    task_backward(model, 0)
    optimizer.step()
    assert all(g.dtype == torch.float32 for g in steps[0])


def test_unknown_memory():
    with pytest.raises(ValueError, match="gradient_memory='disk'"):
        setup("disk")
