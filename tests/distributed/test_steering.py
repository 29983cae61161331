"""What steers retention over a run is the same on all processes: its pace, the trust region, held-out anchors."""

import pytest

WAYS = ["ddp", "fsdp2", "fsdp1", "fsdp1 flat"]


@pytest.mark.parametrize("parallel", WAYS)
def test_the_pace_is_found_alike_and_resumed(processes, cache, tmp_path, parallel):
    """Stopped between two passes; the next one comes where it would have."""
    arguments = {"cache": cache, "parallel": parallel, "epsilon": 0.05}
    straight = processes.run(2, "cases.train", steps=46, **arguments)
    first = processes.run(2, "cases.train", steps=41, save=str(tmp_path / "saved"), **arguments)
    resumed = processes.run(2, "cases.train", steps=46, load=str(tmp_path / "saved"), **arguments)
    metrics = straight[0]["metrics"]
    assert [m["interval"] for m in metrics[:42]] == [1.0] * 40 + [2.0] * 2
    assert [m["fresh"] for m in metrics[:43]] == [1.0] * 41 + [0.0, 1.0]
    for a, b, c in zip(straight, first, resumed, strict=True):
        assert a["metrics"] == metrics
        assert c["metrics"][0] == {}, "no pass yet"
        assert a["metrics"] == b["metrics"] + [metrics[41]] + c["metrics"][1:]
        assert a["state"] == c["state"] == straight[0]["state"]


@pytest.mark.parametrize("parallel", WAYS)
def test_a_step_is_shortened_alike_under_several_constraints(processes, cache, alone, assert_same_run, parallel):
    both = {"closure": "logits and hidden", "epsilon": {"logits": 0.01, "hidden": 0.02}}
    one = alone(**both)
    assert all(0.01 < m["step_kept"] < 0.5 for m in one["metrics"][:5])
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel=parallel, **both), one)


@pytest.mark.parametrize("parallel", WAYS)
def test_epsilon_follows_held_out_anchors(processes, cache, heldout, alone, assert_same_run, parallel):
    """They are measured in the step: what it gathers of sharded parameters must not outlive it."""
    settings = {"heldout": heldout, "trust_region": None}
    one = alone(**settings)
    assert one["metrics"][0]["heldout"] > 1.3 * one["metrics"][0]["drift"]
    assert one["metrics"][0]["epsilon"] < one["metrics"][0]["epsilon_heldout"] / 1.3
    assert_same_run(processes.run(2, "cases.train", cache=cache, parallel=parallel, **settings), one)
