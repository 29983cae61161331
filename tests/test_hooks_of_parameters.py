"""Hooks on parameters: those of a retention pass are the optimizer's, and no optimizer steps in it."""

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, Retention
from craft_optim._step.gradients import without_hooks


def parts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Named(Retention):
    def __init__(self, model):
        self.model = model

    def loss(self, number):
        return self.model(torch.ones(2, 3)).square().mean()

    def parameters(self):
        return self.model.parameters()


CLOSURES = {"its class": Named, "a function": lambda model: lambda: model(torch.ones(2, 3)).square().mean()}


def in_the_backward(parameters):
    """An optimizer for each parameter, the parameters that have stepped, and the hook by which they do."""
    fused, fired = {p: torch.optim.SGD([p], lr=0.1) for p in parameters}, []

    def hook(p):
        fired.append(p)
        fused[p].step()
        fused[p].zero_grad()

    return fused, fired, hook


@pytest.mark.parametrize("register", ["register_post_accumulate_grad_hook", "register_hook"])
@pytest.mark.parametrize("kind", CLOSURES)
def test_an_optimizer_in_the_backward_of_other_parameters_steps_once(register, kind):
    model = parts()
    fused, fired, hook = in_the_backward(model[0].parameters())
    for p in fused:
        getattr(p, register)(hook if register != "register_hook" else lambda g, p=p: fired.append(p))
    optimizer = CraftOptimizer(torch.optim.AdamW(model[2].parameters(), lr=1e-3), CLOSURES[kind](model))
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        before = [p.detach().clone() for p in fused]
        optimizer.step()
        assert all(map(torch.equal, before, fused))
        assert len(fired) == 2 * (step + 1)


def test_so_it_does_where_its_parameters_are_ours_too():
    """The task's gradient is used up by the time we step: there is none, and the parameter is not touched."""
    model = parts()
    fused, fired, hook = in_the_backward(model[0].parameters())
    for p in fused:
        p.register_post_accumulate_grad_hook(hook)
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Named(model))
    for step in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert len(fired) == 2 * (step + 1)


def test_a_hook_that_steps_on_the_retention_gradient_is_refused():
    model = parts()
    fused = torch.optim.SGD(model[0].parameters(), lr=0.1)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: fused.step())
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Named(model))
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"in the retention backward \(the first has shape \(4, 3\)\)"):
        optimizer.step()


@pytest.mark.parametrize("register", ["register_post_accumulate_grad_hook", "register_hook"])
def test_hooks_of_ones_own_see_both_backwards(register):
    model = parts()
    seen = []
    for p in model.parameters():
        getattr(p, register)(lambda x: seen.append(1))
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Named(model))
    model(torch.randn(4, 3)).sum().backward()
    assert len(seen) == 4
    optimizer.step()
    assert len(seen) == 8


def test_hooks_come_back_after_an_error_and_can_be_removed():
    p, seen = nn.Parameter(torch.ones(2)), []
    handles = [
        p.register_hook(lambda g: seen.append("tensor")),
        p.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated")),
    ]

    def stopped():
        with without_hooks([p]):
            p.sum().backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert seen == []
    p.sum().backward()
    assert seen == ["tensor", "accumulated"]
    for handle in handles:
        handle.remove()
    p.sum().backward()
    assert len(seen) == 2
