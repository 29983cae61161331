"""Several constraints on several processes: as one process has them, and resumed from a sharded checkpoint."""

import pytest

BOTH = {"closure": "logits and hidden", "epsilon": {"logits": 0.01, "hidden": 0.02}, "trust_region": None}


@pytest.mark.parametrize("parallel", ["ddp", "ddp bucket view", "fsdp2", "fsdp1 flat"])
def test_every_constraint_is_decided_alike(processes, cache, alone, assert_same_run, parallel):
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel=parallel, **BOTH), alone(**BOTH))


def test_gradients_that_wait_on_the_host(processes, cache, alone, assert_same_run):
    settings = BOTH | {"gradient_memory": "host"}
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel="fsdp2", **settings), alone(**settings))


def test_the_run_compared_is_not_trivial(alone):
    metrics = alone(**BOTH)["metrics"]
    for name in ("logits", "hidden"):
        assert any(m[f"projected/{name}"] for m in metrics)
        assert any(m[f"violation/{name}"] > 1.0 for m in metrics)
        assert len({m[f"lambda/{name}"] for m in metrics}) > 3


def test_resumed_is_straight(processes, cache, tmp_path):
    arguments = {"cache": cache, "parallel": "fsdp2", **BOTH}
    straight = processes.run(2, "cases.train", steps=4, **arguments)
    first = processes.run(2, "cases.train", steps=2, save=str(tmp_path / "saved"), **arguments)
    resumed = processes.run(2, "cases.train", steps=4, load=str(tmp_path / "saved"), **arguments)
    for a, b, c in zip(straight, first, resumed, strict=True):
        assert a["metrics"] == b["metrics"] + c["metrics"]
        assert a["state"] == c["state"]
        assert a["state"]["craft_anchor_position/hidden"] == 4.0
