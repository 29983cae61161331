"""Every optimizer and configuration of torch's own test data through the wrapper, against its bare twin."""

import itertools
import math

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer
from craft_optim.dual import DualAscent

pytest.importorskip("expecttest", reason="torch's test data imports it: pip install --group dev")
from torch.testing._internal.common_optimizers import optim_db


def configurations():
    for info in optim_db:
        implementations = [{}, *({name: True} for name in info.supported_impls if name != "differentiable")]
        for given, implementation in itertools.product(info.optim_inputs_func(device="cpu"), implementations):
            kwargs = {**given.kwargs, **implementation}
            # The same twice over, or what torch itself refuses.
            if (given.kwargs.get("foreach") or given.kwargs.get("fused")) and implementation:
                continue
            if kwargs.get("capturable") or kwargs.get("differentiable"):  # of CUDA graphs, and of meta-learning
                continue
            label = ",".join(f"{k}={v}" for k, v in kwargs.items() if not isinstance(v, torch.Tensor))
            yield pytest.param(info, kwargs, id=f"{info.optim_cls.__name__}({label})")


CONFIGURATIONS = list(configurations())


def model_for(info):
    torch.manual_seed(0)
    if info.only_supports_sparse_grads:
        return nn.Embedding(7, 3, sparse=True)
    bias = info.optim_cls.__name__ != "Muon"  # it takes matrices only
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)).double()


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    if isinstance(model, nn.Embedding):
        return model(torch.randint(7, (4,), generator=generator)).square().sum()
    return model(torch.randn(8, 5, generator=generator, dtype=torch.float64)).square().mean()


def run(info, kwargs, wrap, steps=6):
    model = model_for(info)
    kwargs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    optimizer = wrap(info.optim_cls(model.parameters(), **kwargs), model)
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if info.step_requires_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    state = [
        value
        for p in model.parameters()
        for value in optimizer.state[p].values()
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    ]
    return [p.detach().clone() for p in model.parameters()], state, optimizer


def with_a_closure(base, model):
    """The whole active path: stash, second backward, inner products, restore; with lambda = 0, and no projection."""

    def drift():
        if isinstance(model, nn.Embedding):
            return model(torch.tensor([0, 1])).square().sum()
        return sum(p.square().sum() for p in model.parameters())

    return CraftOptimizer(base, drift, dual=DualAscent(0.0, 0.0), projection="never", rho=math.inf)


def test_the_data_is_of_all_that_torch_has():
    found = {c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert found - {torch.optim.Optimizer} == {param.values[0].optim_cls for param in CONFIGURATIONS}


@pytest.mark.parametrize(("info", "kwargs"), CONFIGURATIONS)
def test_it_is_the_bare_optimizer(info, kwargs):
    """One run of each kind: bare, wrapped without a closure, and with one that weighs nothing."""
    expected, expected_state, bare = run(info, kwargs, lambda base, model: base)
    found, found_state, craft = run(info, kwargs, lambda base, model: CraftOptimizer(base))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), "without a closure"
    assert all(torch.equal(a, b) for a, b in zip(expected_state, found_state, strict=True)), "without a closure"

    found, _, active = run(info, kwargs, with_a_closure)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), "the base gets the task gradients"
    assert active.metrics["fresh"] == 1.0
    assert active.metrics["retention_grad_norm"] > 0.0

    saved = craft.state_dict()
    craft.load_state_dict(bare.state_dict())
    bare.load_state_dict(saved)
    twin_groups = [{k: v for k, v in g.items() if not k.startswith("craft_")} for g in saved["param_groups"]]
    for group, twin in zip(bare.state_dict()["param_groups"], twin_groups, strict=True):
        assert {k: v for k, v in group.items() if not k.startswith("craft_")}.keys() == twin.keys()
