"""However a model is spread over processes, training is what one process does with the whole batch."""

import pytest

WAYS = {
    1: ["fsdp2"],  # DTensors on a single process
    2: [
        "ddp",
        "ddp bucket view",
        "ddp static graph",
        "fsdp2",
        "fsdp2 no reshard",
        "tp",
        "sequence parallel",
        "fsdp1",
        "fsdp1 flat",
        "fsdp1 no shard",
    ],
    4: ["ddp", "fsdp2", "hsdp", "fsdp2 x tp", "tp", "fsdp1", "fsdp1 hybrid"],
}


@pytest.mark.parametrize("closure", ["logits", "hidden"])
@pytest.mark.parametrize(("world_size", "parallel"), [(n, way) for n, ways in WAYS.items() for way in ways])
def test_every_way_to_spread_a_model(processes, cache, alone, assert_same_run, world_size, parallel, closure):
    ranks = processes.run(world_size, "cases.train", cache=cache, parallel=parallel, closure=closure)
    assert_same_run(ranks, alone(closure=closure))


def test_the_runs_compared_are_not_trivial(alone):
    logits, hidden = (alone(closure=closure)["metrics"] for closure in ("logits", "hidden"))
    assert any(m["projected"] for m in hidden)
    assert any(m["clipped"] for m in logits)
    assert any(m["violation"] > 1.0 for m in hidden)
    assert all(0.01 < m["step_kept"] < 0.5 for m in logits)
    assert len({m["lambda"] for m in logits}) > 3


@pytest.mark.parametrize("parallel", ["ddp", "ddp bucket view", "fsdp2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"merge": "equal", "projection": "always"},
        {"retention_every": 2},
        {"base": "sgd"},
        {"micro_batches": 2},
    ],
    ids=lambda s: " ".join(s),
)
def test_settings(processes, cache, alone, assert_same_run, parallel, settings):
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel=parallel, **settings), alone(**settings))


@pytest.mark.parametrize("parallel", ["ddp", "ddp bucket view", "fsdp2", "tp", "fsdp1"])
def test_gradients_that_wait_on_the_host(processes, cache, alone, assert_same_run, parallel):
    ranks = processes.run(2, "cases.train", cache=cache, parallel=parallel, gradient_memory="host")
    assert_same_run(ranks, alone())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_gradients_that_wait_in_bfloat16(processes, cache, alone, parallel):
    ranks = processes.run(2, "cases.train", cache=cache, parallel=parallel, gradient_memory="bfloat16")
    assert ranks[0]["metrics"] == ranks[1]["metrics"], "ranks have measured, or decided, differently"
    for mine, exact in zip(ranks[0]["metrics"], alone()["metrics"], strict=True):
        for name in ("retention_loss", "task_grad_norm", "merged_grad_norm"):
            assert mine[name] == pytest.approx(exact[name], rel=0.02)
        assert mine["task_grad_norm"] != exact["task_grad_norm"], "they are rounded"


@pytest.mark.parametrize(("world_size", "parallel"), [(2, "ddp"), (4, "fsdp2"), (4, "fsdp2 x tp")])
def test_ranks_with_different_numbers_of_valid_positions(
    processes, cache, alone, assert_same_run, world_size, parallel
):
    ranks = processes.run(world_size, "cases.train", cache=cache, parallel=parallel, closure="masked")
    assert_same_run(ranks, alone(closure="masked"))


@pytest.mark.parametrize("closure", ["logits", "hidden"])
@pytest.mark.parametrize("parallel", ["ddp", "ddp bucket view", "ddp unused", "ddp static graph"])
def test_a_closure_may_run_the_module_within_ddp(processes, cache, alone, assert_same_run, parallel, closure):
    ranks = processes.run(2, "cases.train", cache=cache, parallel=parallel, closure=closure, through="module")
    assert_same_run(ranks, alone(closure=closure))


def test_gradients_averaged_by_hand(processes, cache, alone, assert_same_run):
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel="plain", average_by_hand=True), alone())


def test_torchs_own_zero_1_as_base(processes, cache, alone, assert_same_run):
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel="ddp", base="zero 1"), alone())
