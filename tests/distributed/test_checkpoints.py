"""torch.distributed.checkpoint: a run goes on bit for bit, and on any number of ranks."""

import copy

import pytest
import torch

OPTIONS = {
    "sharded": {},
    "flattened": {"options": {"flatten_optimizer_state_dict": True}},
    "in the background": {"in_the_background": True},
    "flattened, in the background": {"options": {"flatten_optimizer_state_dict": True}, "in_the_background": True},
}


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    return a == b


# torch cannot copy FSDP1's ShardedTensors in the background, whatever the optimizer.
WAYS = [(way, o) for way in ("ddp", "fsdp2", "fsdp1") for o in OPTIONS if way != "fsdp1" or "background" not in o]


@pytest.fixture(scope="module")
def straight(processes, cache):
    """The run that is never stopped; each once."""
    runs = {}

    def run(**arguments):
        key = tuple(arguments.items())
        if key not in runs:
            runs[key] = processes.run(2, "cases.train", cache=cache, steps=5, **arguments)
        return copy.deepcopy(runs[key])

    return run


@pytest.mark.parametrize("base", ["adamw", "stateless"])  # torch primes the latter whenever it saves, too
@pytest.mark.parametrize(("parallel", "options"), WAYS)
def test_resumed_is_straight_bit_for_bit(processes, cache, straight, tmp_path, parallel, options, base):
    arguments = {"cache": cache, "parallel": parallel, "base": base}
    first = processes.run(2, "cases.train", steps=3, save=str(tmp_path / "saved"), **arguments, **OPTIONS[options])
    resumed = processes.run(
        2, "cases.train", steps=5, load=str(tmp_path / "saved"), options=OPTIONS[options].get("options"), **arguments
    )
    for a, b, c in zip(straight(parallel=parallel, base=base), first, resumed, strict=True):
        assert a["metrics"] == b["metrics"] + c["metrics"], "saving, or the priming step in it, has moved something"
        del a["metrics"], c["metrics"]
        assert identical(a, c)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, "fsdp2"), (2, "fsdp2")),
        ((2, "fsdp2"), (4, "hsdp")),
        ((4, "fsdp2 x tp"), (1, "plain")),
        ((2, "ddp"), (4, "fsdp2")),
        ((1, "plain"), (2, "ddp")),
    ],
)
def test_resumed_on_another_number_of_ranks(processes, cache, alone, assert_same_run, tmp_path, before, after):
    """With the same number of anchors in all per step, the run is the one that a single process would have made."""
    world_size, parallel = before
    processes.run(world_size, "cases.train", cache=cache, parallel=parallel, steps=3, save=str(tmp_path / "saved"))
    world_size, parallel = after
    ranks = processes.run(world_size, "cases.train", cache=cache, parallel=parallel, load=str(tmp_path / "saved"))
    assert_same_run(ranks, alone(), steps=slice(3, None))
