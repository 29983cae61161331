"""The order of the anchors: every epoch complete, every position reproducible, no rank another's."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_optim.anchors import AnchorSampler
from craft_optim.anchors.sampling import mixed_seed

SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, seed=st.integers(-(2**70), 2**70), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_anchor_once(sizes: tuple[int, int], seed: int, epochs: int) -> None:
    n, batch = sizes
    sampler = AnchorSampler(n, batch, seed)
    stream: list[int] = []
    position = 0
    while len(stream) < n * epochs:
        rows = sampler.indices(position)
        assert rows.shape == (batch,)
        assert rows.dtype == torch.int64
        stream += rows.tolist()
        position += 1
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99), positions=st.lists(st.integers(0, 10**6), max_size=6))
def test_it_is_a_function_of_seed_and_position(sizes: tuple[int, int], seed: int, positions: list[int]) -> None:
    sampler = AnchorSampler(*sizes, seed)
    drawn = [sampler.indices(p).tolist() for p in positions]
    torch.randn(3)
    assert [AnchorSampler(*sizes, seed).indices(p).tolist() for p in reversed(positions)] == drawn[::-1]


@settings(max_examples=100, deadline=None)
@given(world=st.integers(1, 5), batch=st.integers(1, 6), extra=st.integers(0, 20), position=st.integers(0, 50))
def test_ranks_together_draw_what_one_process_would(world: int, batch: int, extra: int, position: int) -> None:
    n = world * batch + extra
    together = [AnchorSampler(n, batch, 3, rank, world).indices(position) for rank in range(world)]
    assert torch.cat(together).tolist() == AnchorSampler(n, batch * world, 3).indices(position).tolist()
    first, last = position * batch * world, (position + 1) * batch * world - 1
    counts = Counter(torch.cat(together).tolist())
    # within an epoch no anchor is drawn twice; across its end, once from each side at most
    assert max(counts.values()) <= (1 if first // n == last // n else 2)


def test_orders_differ_between_seeds_and_epochs() -> None:
    one = AnchorSampler(100, 100, 0)
    orders = [one.indices(0), one.indices(1), AnchorSampler(100, 100, 1).indices(0), torch.arange(100)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_it_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    AnchorSampler(10, 3).indices(5)
    assert torch.equal(before, torch.get_rng_state())


def test_what_it_draws_is_frozen() -> None:
    """A change here would change the anchors of every resumed run."""
    assert mixed_seed(0, 0) == 7689419447139100721
    assert AnchorSampler(10, 4, seed=0).indices(0).tolist() == [6, 3, 2, 7]


def test_fewer_anchors_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size <= 3"):
        AnchorSampler(3, 4)
    with pytest.raises(ValueError, match="batch_size <= 1"):
        AnchorSampler(3, 2, world_size=2)


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}])
def test_numbers_out_of_range_are_refused(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Found"):
        AnchorSampler(**{"n": 10, "batch_size": 2, **kwargs})
    with pytest.raises(ValueError, match="position=-1"):
        AnchorSampler(10, 2).indices(-1)
