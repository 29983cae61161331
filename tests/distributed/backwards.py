"""What the ranks run to see when, and in which order, a retention backward's gradients are averaged."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from cases import Drift, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from craft_optim import CraftOptimizer
from craft_optim._step.averaging import Averaging
from craft_optim._step.gradients import gradients_of

LAST, ENDED = "the backward comes to the first layer", "the backward has ended"


@contextmanager
def events():
    """Sizes of what is averaged, by collectives for which nobody waits at once, and the ends of backwards."""
    found, reduce, backward = [], dist.all_reduce, torch.Tensor.backward

    def reducing(tensor, *arguments, async_op=False, **named):
        if async_op:
            found.append(tensor.numel())
        return reduce(tensor, *arguments, async_op=async_op, **named)

    def running(loss, *arguments, **named):
        backward(loss, *arguments, **named)
        found.append(ENDED)

    dist.all_reduce, torch.Tensor.backward = reducing, running
    try:
        yield found
    finally:
        dist.all_reduce, torch.Tensor.backward = reduce, backward


def reentrant(function, x):
    return checkpoint(function, x, use_reentrant=True)


def at_once(function, x):
    return function(x)


def whole(model, x, rank, step, run):
    return model(x)


def missing(model, x, rank, step, run):
    """Without the last block on one rank, and without the head's bias on each in turn."""
    h = model.inlet(x)
    for block in model.blocks[: 1 if rank == 1 else 2]:
        h = block(h)
    return h @ model.head.weight.T if step % 2 == rank else model.head(h)


def tied(model, x, rank, step, run):
    h = model.inlet(x)
    for _ in range(3):
        h = model.blocks[0](h)
    return model.head(h)


def checkpointed(model, x, rank, step, run):
    """One block in two checkpoints and outside of them: its gradients come in three parts."""
    h = run(model.blocks[0], run(model.blocks[0], model.inlet(x)))
    return model.head(run(model.blocks[1], model.blocks[0](h)))


def growing(model, x, rank, step, run):
    """A block that one rank uses once more than ever before, after it has been sent."""
    h = model.inlet(x)
    for _ in range(1 + step if rank == 1 else 1):
        h = run(model.blocks[1], h)
    return model.head(run(model.blocks[0], h))


class Told(torch.autograd.Function):
    """Counts the processes, in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        number = torch.ones(3)
        dist.all_reduce(number)
        assert (number == dist.get_world_size()).all(), "another collective was taken for this one"
        return g


def communicating(model, x, rank, step, run):
    """A model with collectives of its own in the backward; what comes before them differs from rank to rank."""
    h = model.inlet(x)
    h = model.blocks[0](h if run is at_once else Told.apply(h))
    h = h if rank == 1 and step > 0 else model.blocks[1](h)
    return model.head(h)


def sharing(model, x, rank, step, run):
    """Autograd gives a leaf a view of the gradient that has yet to go on to the weights."""
    return (model.inlet(x[0]).view(-1) + model.blocks[0].norm.weight.view(-1)) * torch.arange(16.0)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("on purpose")


def fail(averaging, model, rank, parameters):
    """A backward that fails on all ranks: early in it on one, late on the other."""
    h = model.inlet(torch.ones(2, 6))
    for block in model.blocks:
        h = block(Failing.apply(h) if rank == 0 or block is model.blocks[0] else h)
    with pytest.raises(RuntimeError, match="on purpose"), averaging.during_backward(parameters):
        model.head(h).sum().backward()


def passes(losses, steps=4, bucket=256, fails_before=None):
    """Of each pass the events, whether any rank had more, the means, and what they should be."""
    model, rank, size = network(), dist.get_rank(), dist.get_world_size()
    parameters = sorted(model.parameters(), key=lambda p: p.ndim)  # as they are in groups with and without decay
    averaging = Averaging(dist.group.WORLD, bucket=bucket)
    outcomes = []
    for step in range(steps):

        def loss(of_rank, run, step=step):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + of_rank))
            return globals()[losses](model, x, of_rank, step, run).square().mean()

        expected = [torch.zeros_like(p) for p in parameters]
        for of_rank in range(size):
            of_one = torch.autograd.grad(loss(of_rank, at_once), parameters, allow_unused=True)
            expected = [e if g is None else e + g / size for e, g in zip(expected, of_one, strict=True)]
        for p in parameters:
            p.grad = None
        if step == fails_before:
            fail(averaging, model, rank, parameters)
            for p in parameters:
                p.grad = None
        wanted = [True] * len(parameters)
        with events() as found:

            def told(module, given, output, found=found):
                output.register_hook(lambda g: found.append(LAST))

            hook = model.inlet.register_forward_hook(told)
            with averaging.during_backward(parameters):
                loss(rank, reentrant).backward()
            hook.remove()
            means = averaging.means(gradients_of(parameters), parameters, wanted)
            gradients, more = means.gradients, torch.tensor(float(means.more))
            dist.all_reduce(more)
            if more > 0:
                rest, _ = averaging.added(means.rest, parameters, wanted)
                gradients = [
                    g if r is None else r if g is None else g + r for g, r in zip(gradients, rest, strict=True)
                ]
        outcomes.append((found, float(more), gradients, expected))
    return outcomes


class Wide(nn.Module):
    """Two matrices of more than a bucket each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 2048), nn.Linear(2048, 4200)
        self.third = nn.Linear(4200, 2048)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def steps(count=3, of_others=False):
    """The events of each step's retention pass, and the parameters' sums; `of_others`: a layer communicates, too."""
    model = DistributedDataParallel(Wide())
    if of_others:  # no CPU runs it, nor wraps a model that has it
        model.module.norm = nn.SyncBatchNorm(4, affine=False, track_running_stats=False)
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = CraftOptimizer(base, Drift(model), retention_every=1, trust_region=None)
    outcomes = []
    for step in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 6), step + dist.get_rank() + 1.0)).square().mean().backward()
        with events() as found:
            optimizer.step()
        assert optimizer.metrics["fresh"] == 1.0
        outcomes.append(found)
    return outcomes, [p.double().sum().item() for p in model.parameters()]
