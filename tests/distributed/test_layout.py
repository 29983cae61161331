"""What is averaged over whom, who may step, and who reports."""

import pytest
import torch

KINDS = {
    "dense": ["d", "d", "d"],
    "some missing": ["d", "nd", "dn", "n"],
    "sparse": ["s", "sn", "ns"],
    "sparse here, dense there": ["sd"],
    "dtypes": ["d", "h", "c", "d"],
    "none": ["n", "n"],
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kinds", KINDS)
def test_average_is_the_mean_with_missing_gradients_as_zeros(processes, kinds, world_size):
    for rank in processes.run(world_size, "cases.average_of", seed=7, kinds=KINDS[kinds]):
        for found, dense, expected in rank:
            if expected is None:
                assert found is None
            else:
                tolerance = 2e-3 if expected.dtype == torch.float16 else 1e-6
                torch.testing.assert_close(dense, expected, rtol=tolerance, atol=tolerance)


def test_sparse_gradients_stay_sparse(processes):
    assert all(
        found.is_sparse
        for rank in processes.run(2, "cases.average_of", seed=7, kinds=["s", "sn"])
        for found, *_ in rank
    )


TURNS = [["d", "n", "nd", "s", "s", "d"], ["d", "d", "dn", "s", "d", "n"], ["d", "nd", "n", "ns", "sd", "s"], ["d"] * 6]


@pytest.mark.parametrize("world_size", [2, 3])
def test_averages_of_gradients_that_come_and_go(processes, world_size):
    for rank in processes.run(world_size, "cases.averages_in_turn", seed=3, turns=TURNS):
        for found, present, expected in rank:
            assert found is not None or not present
            if found is not None:  # zero where there was one on an earlier pass
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constraints", [1, 2])
def test_a_step_waits_for_the_device_once(processes, constraints):
    for rank in processes.run(2, "cases.reads", constraints=constraints, trust_region=None):
        assert rank[0].count("tensor") >= constraints, "on the first step all agree on what there is"
        assert rank[1:] == [["cpu"]] * (len(rank) - 1)


def test_a_look_at_where_the_step_leads_is_a_wait_more(processes):
    for rank in processes.run(2, "cases.reads"):
        assert all(step == ["cpu", "tolist"] for step in rank[1:]), rank


def test_what_has_gradients_may_change_on_any_rank_at_any_step(processes):
    """As if all had asked first, on each step."""
    steady, asked = (processes.run(2, "cases.changing_reach", asks_first=first) for first in (False, True))
    assert steady[0][1] == steady[1][1]
    for (found, metrics), (expected, of_asked) in zip(steady, asked, strict=True):
        assert metrics == pytest.approx(of_asked, rel=1e-5)
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-6)
    for name, p in steady[0][0].items():
        assert torch.equal(p, steady[1][0][name]), name


def test_parameters_that_only_some_ranks_reach_stay_replicas(processes):
    (first, first_metrics), (second, second_metrics) = processes.run(2, "cases.subset_per_rank")
    assert first_metrics == second_metrics
    for name, p in first.items():
        assert torch.equal(p, second[name]), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_anchors_that_are_not_finite_on_one_rank_skip_the_step_on_all(processes, parallel):
    ranks = processes.run(2, "cases.report", parallel=parallel, poison=1)
    assert [rank["skipped"] for rank in ranks] == [1.0, 1.0]
    assert ranks[0]["lambda"] == ranks[1]["lambda"]
    assert ranks[0]["sum"] == pytest.approx(ranks[1]["sum"], abs=0)
    assert [len(rank["warnings"]) for rank in ranks] == [1, 0], "one process warns"


def test_one_process_reports(processes):
    assert [rank["sunk"] for rank in processes.run(2, "cases.report", parallel="ddp")] == [2, 0]


@pytest.mark.parametrize(
    ("world_size", "parallel", "shared"),
    [
        (2, "ddp", [(0, 2, 0.5), (1, 2, 0.5)]),
        (2, "fsdp2", [(0, 2, 0.5), (1, 2, 0.5)]),
        (2, "fsdp1", [(0, 2, 0.5), (1, 2, 0.5)]),
        (2, "tp", [(0, 1, 0.5), (0, 1, 0.5)]),
        (4, "hsdp", [(0, 4, 1.5), (1, 4, 1.5), (2, 4, 1.5), (3, 4, 1.5)]),
        (4, "fsdp2 x tp", [(0, 2, 1.5), (0, 2, 1.5), (1, 2, 1.5), (1, 2, 1.5)]),
    ],
)
def test_ranks_that_see_different_data_get_different_anchors(processes, world_size, parallel, shared):
    ranks = processes.run(world_size, "cases.report", parallel=parallel)
    assert [rank["shared"] for rank in ranks] == shared


def test_a_closure_that_is_set_later_gets_its_own_anchors_too(processes):
    first, second = processes.run(2, "cases.another_closure")
    assert first == ((0, 2, 0.5), (0, 2, 0.5))
    assert second == ((1, 2, 0.5), (1, 2, 0.5))


def test_replicas_that_nobody_averages_are_refused(processes):
    for rank in processes.run(2, "cases.report", parallel="plain"):
        assert "process_group=False" in rank["error"]


def test_processes_may_train_models_of_their_own(processes):
    ranks = processes.run(2, "cases.report", parallel="plain", process_group=False)
    assert [rank["shared"] for rank in ranks] == [None, None]
    assert [rank["sunk"] for rank in ranks] == [2, 2]
    assert ranks[0]["sum"] != ranks[1]["sum"], "each has seen other data"


def test_plain_parameters_beside_sharded_ones_need_a_group(processes):
    (refused, one), (_, two) = processes.run(2, "cases.ignored_parameter")
    assert "process_group" in refused
    for name, p in one.items():
        assert torch.equal(p, two[name]), name


def test_priming_is_agreed_on(processes):
    """All zero everywhere: the base primes its state. All zero on one shard: a step."""
    for rank in processes.run(2, "cases.priming"):
        assert rank == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize("parallel", ["plain", "ddp", "fsdp2", "fsdp1"])
def test_what_no_process_has_a_task_gradient_of_is_not_touched(processes, parallel):
    ranks = processes.run(2, "cases.left_out", parallel=parallel)
    assert ranks[0][2] == ranks[1][2]
    for before, after, _ in ranks:
        for name, p in after.items():
            untouched = name.startswith("blocks.0.") or (
                parallel == "plain" and not name.startswith("inlet") and name != "head.bias"
            )
            assert torch.equal(p, before[name]) is untouched, name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "fsdp1"])
def test_a_base_that_ascends_lowers_the_drift_all_the_same(processes, parallel):
    down = processes.run(2, "cases.ascent", parallel=parallel, maximize=False)
    up = processes.run(2, "cases.ascent", parallel=parallel, maximize=True)
    for (expected, metrics), (found, of_ascent) in zip(down, up, strict=True):
        assert metrics == of_ascent
        assert all(torch.equal(p, found[name]) for name, p in expected.items())
