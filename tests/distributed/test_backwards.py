"""Averaging begins in the retention backward, in one order everywhere, and what it gives is what one process has."""

import backwards
import pytest
import torch

RUNS = {name: {"losses": name} for name in ("whole", "missing", "tied", "checkpointed", "growing", "communicating")} | {
    "sharing": {"losses": "sharing", "bucket": 64},
    "large": {"losses": "whole", "bucket": 64},
    "failing": {"losses": "whole", "fails_before": 2},
}


@pytest.fixture(scope="module")
def ran(processes):
    return {name: processes.run(2, "backwards.passes", **arguments) for name, arguments in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_means_are_those_of_one_process(ran, name):
    for rank in ran[name]:
        for _, _, gradients, expected in rank:
            for g, e in zip(gradients, expected, strict=True):
                torch.testing.assert_close(torch.zeros_like(e) if g is None else g, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_all_ranks_have_the_same_bits_and_the_same_order(ran, name):
    for (events, more, gradients, _), (others, of_other, gradients_there, _) in zip(*ran[name], strict=True):
        assert [e for e in events if isinstance(e, int)] == [e for e in others if isinstance(e, int)]
        assert more == of_other
        for mine, other in zip(gradients, gradients_there, strict=True):
            assert (mine is None and other is None) or torch.equal(mine, other)


@pytest.mark.parametrize("name", ["whole", "tied", "checkpointed"])
def test_a_bucket_is_sent_when_its_gradients_are_there(ran, name):
    for rank in ran[name]:
        first, *others = [events for events, *_ in rank]
        assert first[:2] == [backwards.LAST, backwards.ENDED], "all have yet to agree"
        for events in others:
            assert len(events) > 9
            last = events.index(backwards.LAST)
            assert [type(e) for e in events[last + 1 : -1]] == [int, int], "the weight and the bias of the first layer"
            assert events[-1] == backwards.ENDED


def test_parts_of_one_gradient_are_awaited(ran):
    assert not any(more for rank in ran["checkpointed"] for _, more, *_ in rank)


def test_large_gradients_are_not_copied_in_the_backward(ran):
    for rank in ran["large"]:
        for events, *_ in rank[1:]:
            ended = events.index(backwards.ENDED)
            assert events[ended + 1 :] == [512] * 4
            assert 512 not in events[:ended]


def test_what_comes_after_its_bucket_was_sent_is_added(ran):
    assert any(more > 0.0 for _, more, *_ in ran["growing"][0][1:])


def test_a_step_begins_to_average_before_its_backward_has_ended(processes):
    (first, sums), (second, others) = processes.run(2, "backwards.steps")
    for events, there in zip(first, second, strict=True):
        assert [e for e in events if e != backwards.ENDED] == [e for e in there if e != backwards.ENDED]
    for rank in (first, second):
        assert rank[0].index(backwards.ENDED) == 0, "all have yet to agree"
        for events in rank[1:]:
            assert events.index(backwards.ENDED) >= 2, events
    assert sums == others


def test_a_step_waits_for_the_backward_of_a_model_that_communicates_in_it(processes):
    for rank, _ in processes.run(2, "backwards.steps", of_others=True):
        for events in rank:
            assert events.index(backwards.ENDED) == 0
