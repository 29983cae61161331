"""Where the task gradients wait: what is the same as with a plain copy, what is stated as different, what is freed."""

import copy
import math
import statistics
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from craft_optim import CraftOptimizer, stash
from craft_optim._step.reference import reference_merge
from craft_optim._warn import CraftWarning
from craft_optim.dual import Update

INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


class Fixed:
    """A controller that always says the same."""

    def __init__(self, multiplier):
        self.multiplier = multiplier

    def initial_state(self):
        return {}

    def __call__(self, state, *, loss, epsilon, cap):
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
    monkeypatch.setattr(stash, "_is_host", lambda device: False)


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


# Streaming


def test_streaming_with_a_decision_per_tensor_is_exact():
    model, optimizer = setup("streaming", granularity="tensor", epsilon=1e-4, dual=Fixed(0.3), rho=math.inf)
    steps = seen_by_the_base(optimizer, model)
    blocks = [[i] for i in range(6)]
    projected = 0.0
    for step in range(6):
        optimizer.zero_grad()
        task_backward(model, step)
        task, retention = gradients(model), retention_gradients(optimizer, model)
        optimizer.step()
        if step == 0:
            assert all(torch.equal(g, t) for g, t in zip(steps[0], task, strict=True)), "the first only measures"
        if step < 2:
            continue
        expected = reference_merge(
            task, list(retention), list(model.parameters()), lam=0.3,
            project=optimizer.metrics["violation"] > 1.0, blocks=blocks,
        )  # fmt: skip
        for g, e in zip(steps[-1], expected, strict=True):
            torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-8)
        projected += optimizer.metrics["projected"]
        norm = math.sqrt(sum(g.square().sum().item() for g in steps[-1]))
        assert optimizer.metrics["merged_grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert projected > 0.0


def test_streaming_for_all_tensors_uses_the_products_of_the_last_step():
    model, optimizer = setup("streaming", epsilon=1e-4, dual=Fixed(100.0), rho=0.5)
    steps = seen_by_the_base(optimizer, model)
    last = None
    projected = []
    for step in range(6):
        optimizer.zero_grad()
        task_backward(model, step)
        task, retention = gradients(model), retention_gradients(optimizer, model)
        optimizer.step()
        metrics = optimizer.metrics
        dot = sum((t * r).sum().item() for t, r in zip(task, retention, strict=True))
        assert metrics["grad_dot"] == pytest.approx(dot, rel=1e-4, abs=1e-9), "what is reported is this step's"
        if last is not None and last["retention_grad_norm"] > 0.0:
            cap = 0.5 * last["task_grad_norm"] / last["retention_grad_norm"]
            assert metrics["lambda"] == pytest.approx(cap)
            p = last["grad_dot"] / last["retention_grad_norm"] ** 2 if metrics["projected"] else 0.0
            for g, t, r in zip(steps[-1], task, retention, strict=True):
                torch.testing.assert_close(g, t + (cap - p) * r, rtol=1e-4, atol=1e-7)
            projected.append(metrics["projected"])
        last = dict(metrics)
    assert 1.0 in projected


def test_streaming_frees_each_task_gradient_as_its_partner_arrives():
    model, optimizer = setup("streaming")
    for step in range(3):  # the drift is zero at first, and there is nothing to merge
        optimizer.zero_grad()
        task_backward(model, step)
        if step < 2:
            optimizer.step()
    watched = [weakref.ref(p.grad) for p in model.parameters()]
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(found() is not None for found in watched)))
    optimizer.step()
    # A user's hooks run before ours: each finds its own tensor's task gradient, and those of the tensors to come.
    assert alive == [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_streaming_holds_epsilon(granularity):
    drifts = []
    model, optimizer = setup("streaming", epsilon=0.05, granularity=granularity, lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        task_backward(model, 0)
        optimizer.step()
        drifts.append(optimizer.metrics["retention_loss"])
    assert statistics.mean(drifts[-100:]) == pytest.approx(0.05, rel=0.1)


def test_streaming_caps_the_merged_norm():
    model, optimizer = setup("streaming", max_grad_norm=0.01)
    steps = seen_by_the_base(optimizer, model)
    for step in range(3):
        optimizer.zero_grad()
        task_backward(model, step)
        optimizer.step()
        norm = math.sqrt(sum(g.square().sum().item() for g in steps[-1]))
        assert norm == pytest.approx(0.01, rel=1e-4)
        assert optimizer.metrics["clipped"] == 1.0


def test_streaming_resumes_bit_for_bit():
    model, optimizer = setup("streaming", base=torch.optim.AdamW, lr=1e-2)
    saved = None
    for step in range(8):
        if step == 4:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.zero_grad()
        task_backward(model, step)
        optimizer.step()
    again, resumed = setup("streaming", base=torch.optim.AdamW, lr=1e-2)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for step in range(4, 8):
        resumed.zero_grad()
        task_backward(again, step)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert optimizer.metrics == resumed.metrics


def test_streaming_leaves_a_tensor_with_nan_alone_to_the_task():
    model, optimizer = setup("streaming", dual=Fixed(0.5), rho=math.inf)
    steps = seen_by_the_base(optimizer, model)
    for step in range(2):
        optimizer.zero_grad()
        task_backward(model, step)
        optimizer.step()
    spoil = model[2].bias.register_hook(lambda g: g * math.nan if steps_done == 2 else g)
    steps_done = 1
    optimizer.zero_grad()
    task_backward(model, 2)
    task = gradients(model)
    steps_done = 2
    with pytest.warns(CraftWarning, match="for 1 tensors"):
        optimizer.step()
    spoil.remove()
    for i, (g, t) in enumerate(zip(steps[-1], task, strict=True)):
        assert g.isfinite().all()
        assert torch.equal(g, t) == (i == 3)
    assert optimizer.metrics["skipped"] == 1.0
    assert all(math.isfinite(optimizer.param_groups[0][f"craft_last_{k}"]) for k in ("tt", "rr", "tr"))


def test_streaming_with_a_loss_that_is_nan_uses_the_task_gradients():
    model, optimizer = setup("streaming")
    steps = seen_by_the_base(optimizer, model)
    inner = optimizer.retention_closure
    optimizer.retention_closure = lambda: inner() * math.nan
    task_backward(model, 0)
    task = gradients(model)
    with pytest.warns(CraftWarning, match="task gradient alone"):
        optimizer.step()
    assert all(torch.equal(g, t) for g, t in zip(steps[0], task, strict=True))


def test_an_error_in_a_streaming_backward_leaves_no_half_merged_gradients():
    model, optimizer = setup("streaming")
    task_backward(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    task_backward(model, 1)

    def fail(gradient):
        raise RuntimeError("out of memory")

    hook = model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hook.remove()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["craft_step"] == 1.0
    task_backward(model, 1)
    optimizer.step()
    assert optimizer.param_groups[0]["craft_step"] == 2.0


def test_a_gradient_that_arrives_in_parts_is_refused():
    shared = nn.Linear(6, 6)

    def twice(x):
        for _ in range(2):
            x = checkpoint(shared, x.requires_grad_(), use_reentrant=True)
        return x

    optimizer = CraftOptimizer(
        torch.optim.SGD(shared.parameters(), lr=0.1),
        lambda: twice(INPUTS.clone()).square().mean(),
        gradient_memory="streaming",
    )
    shared(INPUTS).sum().backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step()


def test_streaming_in_float16_drops_its_scale():
    model, optimizer = setup("streaming", granularity="tensor", epsilon=1e-4, dual=Fixed(0.3), rho=math.inf)
    inner = optimizer.retention_closure
    optimizer.retention_closure = lambda: inner().half().float()
    steps = seen_by_the_base(optimizer, model)
    for step in range(4):
        optimizer.zero_grad()
        task_backward(model, step)
        task, retention = gradients(model), retention_gradients(optimizer, model)
        with pytest.warns(CraftWarning, match="6 tensors") if step == 0 else nullcontext():
            optimizer.step()  # 2^16, where the scale begins, is more than float16 holds
    expected = reference_merge(
        task, list(retention), list(model.parameters()), lam=0.3,
        project=optimizer.metrics["violation"] > 1.0, blocks=[[i] for i in range(6)],
    )  # fmt: skip
    assert optimizer.param_groups[0]["craft_scale_passes"] == 3.0
    for g, e in zip(steps[-1], expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-2, atol=1e-5)


# Arguments


def test_streaming_does_not_decide_for_groups():
    with pytest.raises(ValueError, match="granularity"):
        setup("streaming", granularity="group")


def test_unknown_memory():
    with pytest.raises(ValueError, match="gradient_memory='disk'"):
        setup("disk")


def test_streaming_is_for_one_process():
    model, optimizer = setup("streaming")
    task_backward(model, 0)
    before = gradients(model)

    class TwoProcesses:
        size = 2

    optimizer._find_layout = lambda parameters: TwoProcesses()
    optimizer._is_priming = lambda step: False
    with pytest.raises(ValueError, match="Found 2"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True))
