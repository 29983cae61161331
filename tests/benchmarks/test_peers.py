"""Each peer of the benchmarks computes what it claims."""

import pytest
import torch
from peers import PEERS, flattened_pcgrad, plain_loop, published_loop, published_step, torchjd_aggregator

from craft_optim._step.reference import reference_gram, reference_merge

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]


def lists(cosine):
    """Task and retention gradients of this cosine, in float64."""
    t, r = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = t / t.norm(), r - (r @ t) / (t @ t) * t
    r = 2.0 * (cosine * t + (1.0 - cosine**2) ** 0.5 * r / r.norm())
    return tuple([piece.view(s) for piece, s in zip(x.split([12, 5, 1, 6]), SHAPES, strict=True)] for x in (3 * t, r))


def close(found, expected, tolerance=1e-12):
    assert [g.shape for g in found] == [torch.Size(s) for s in SHAPES]
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


def pcgrad(task, retention):
    """Both gradients without their component along the other, as the paper has it: a projection each, and the sum."""
    once = reference_merge(task, retention, task, lam=0.0)
    other = reference_merge(retention, task, task, lam=0.0)
    return [a + b for a, b in zip(once, other, strict=True)]


def peer(name):
    if name.startswith("torchjd"):
        pytest.importorskip("torchjd")
    return PEERS[name]()


@pytest.mark.parametrize("cosine", [-0.9, 0.3])
def test_the_plain_loop_is_our_surgery(cosine):
    task, retention = lists(cosine)
    close(plain_loop(task, retention, lam=0.5), reference_merge(task, retention, task, lam=0.5))


@pytest.mark.parametrize("cosine", [-0.9, -0.3])
@pytest.mark.parametrize("name", ["PCGrad by flattening", "torchjd's PCGrad"])
def test_pcgrad_removes_the_conflict_from_both(name, cosine):
    task, retention = lists(cosine)
    close(peer(name)(task, retention), pcgrad(task, retention))


@pytest.mark.parametrize("name", ["PCGrad by flattening", "torchjd's PCGrad"])
def test_pcgrad_is_the_sum_without_a_conflict(name):
    task, retention = lists(0.3)
    close(peer(name)(task, retention), [t + r for t, r in zip(task, retention, strict=True)])


@pytest.mark.parametrize("cosine", [-0.9, 0.3])
def test_upgrad_of_two_gradients_is_half_of_pcgrad(cosine):
    """It projects onto the dual cone, of two gradients the same projections, and takes the mean."""
    pytest.importorskip("torchjd")
    task, retention = lists(cosine)
    half = [g / 2.0 for g in flattened_pcgrad(task, retention)]
    # torchjd adds 1e-4 to the normalised Gramian's diagonal before it solves
    close(torchjd_aggregator("UPGrad")(task, retention), half, tolerance=1e-3)


def test_published_loop_without_a_conflict():
    task, retention = lists(0.3)
    close(published_loop(task, retention, lam=0.7), [t + 0.7 * r for t, r in zip(task, retention, strict=True)])


def test_published_loop_with_a_conflict():
    task, retention = lists(-0.5)
    close(published_loop(task, retention, lam=0.7), reference_merge(task, retention, task, lam=0.7))


def test_published_loop_compares_the_inner_product_and_not_the_cosine():
    """Gradients a hundredth as long conflict as much, and are not projected."""
    task, retention = ([g / 100.0 for g in gradients] for gradients in lists(-0.5))
    assert -0.1 < reference_gram(task, retention, task)[2] < 0.0
    close(published_loop(task, retention, lam=0.7), [t + 0.7 * r for t, r in zip(task, retention, strict=True)])


@pytest.mark.parametrize("name", PEERS)
def test_peers_change_nothing_that_they_are_given(name):
    task, retention = lists(-0.5)
    before = [g.clone() for g in task + retention]
    merge = peer(name)
    first = [g.clone() for g in merge(task, retention)]
    close(merge(task, retention), first)
    assert all(torch.equal(now, g) for now, g in zip(task + retention, before, strict=True))


@pytest.mark.parametrize("cosine", [-0.5, 0.3])
def test_published_step_steps_on_what_the_loop_merges(cosine):
    task, retention = lists(cosine)
    parameters = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    for p, t in zip(parameters, task, strict=True):
        p.grad = t.clone()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    published_step(optimizer, lambda: sum((p * r).sum() for p, r in zip(parameters, retention, strict=True)), lam=0.7)
    close([-p.detach() for p in parameters], published_loop(task, retention, lam=0.7))
