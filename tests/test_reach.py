"""A warning when the retention gradient reaches little of what is trained; none when it only seems so at first."""

import warnings

import torch
from torch import nn

from craft_optim import CraftOptimizer


class Parts(nn.Module):
    """Two tensors, of 5 and 95 elements."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(95))


def train(model, drift=None, named=False, optimizer=None):
    """What is said, and at which retention step; on every second step there is retention."""
    base = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.01)
    optimizer = optimizer or CraftOptimizer(base, drift, retention_every=2)
    said = []
    for step in range(40):
        optimizer.zero_grad()
        sum(p.sin().sum() for p in model.parameters() if p.requires_grad).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [(step // 2 + 1, str(warning.message)) for warning in caught]
        if caught:
            assert caught[0].filename == __file__
    return said


def test_zeros_reach_nothing():
    """Gradients that exist and are zero, as behind a frozen backbone."""
    model = Parts()
    ((step, message),) = train(model, lambda: 0.3 + 0.0 * (model.small.sum() + model.large.sum()))
    assert step == 10
    assert "0.0% of the trainable elements (0 of 2 tensors)" in message


def test_little_reach_is_named():
    model = Parts()
    ((step, message),) = train(model, lambda: model.small.square().sum(), named=True)
    assert step == 10
    assert "5.0% of the trainable elements (1 of 2 tensors; not in large)" in message


def test_half_of_a_decoder_is_enough():
    """A tap in the middle: later layers have no gradient, and of an embedding only a few rows."""
    model = nn.ModuleList([nn.Embedding(1000, 8), *[nn.Linear(8, 8) for _ in range(4)]])
    ids = torch.arange(5)
    assert train(model, lambda: model[2](model[1](model[0](ids))).square().mean()) == []


def test_what_is_zero_only_at_first():
    """LoRA: of A there is no gradient until B has moved; of a drift there is none at all until the model has."""
    model = nn.ParameterDict({"A": torch.ones(95, 1), "B": torch.zeros(1, 5)})
    assert train(model, lambda: ((model["A"] @ model["B"]) - 1.0).square().mean()) == []
    model = Parts()
    assert train(model, lambda: (model.small - 1.0).square().sum() + (model.large - 1.0).square().sum()) == []


def test_frozen_parameters_of_the_optimizer_do_not_count():
    model = Parts()
    model.large.requires_grad_(False)
    assert train(model, lambda: model.small.square().sum()) == []


def test_what_has_no_task_gradient_does_not_count():
    """It is not touched, and so does not drift."""
    model = Parts()
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), lambda: model.small.square().sum())
    for _ in range(12):
        optimizer.zero_grad()
        model.small.sum().backward()
        optimizer.step()


def test_another_closure_is_looked_at_anew():
    model = Parts()
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), retention_every=2)
    for part, expected in ((model.large, []), (model.small, [10])):
        optimizer.retention_closure = lambda part=part: part.square().sum()
        assert [step for step, _ in train(model, optimizer=optimizer)] == expected
