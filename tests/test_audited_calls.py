"""A step does not ask for the `id` of each parameter: it is audited, and filelock, which we import, has a hook."""

import builtins

import torch

from craft_optim import CraftOptimizer


def ids_asked_for(monkeypatch, count):
    """In a step with that many parameters and one that is another's; the base looks up none."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
    other, start = torch.nn.Parameter(torch.ones(2)), torch.cat([p.detach() for p in parameters]) + 0.1
    other.grad = kept = torch.ones(2)
    optimizer = CraftOptimizer(
        torch.optim.SGD(parameters, lr=1e-3),
        lambda: (other.sum() * torch.cat(parameters) - start).square().mean(),
        retention_every=1,
    )
    asked, real = [], id

    def noted(x):
        asked.append(x)
        return real(x)

    for _ in range(3):  # of the last one, when all that a first step finds out is known
        for p in parameters:
            p.grad = torch.ones_like(p)
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "id", noted)
            asked.clear()
            optimizer.step()
    assert optimizer.metrics["fresh"] == 1.0
    assert other.grad is kept
    return len(asked)


def test_what_is_asked_does_not_grow_with_the_parameters(monkeypatch):
    assert ids_asked_for(monkeypatch, 50) == ids_asked_for(monkeypatch, 3)
