"""A `Snapshot` as teacher on several processes: every rank swaps what it holds."""

import pytest
import torch


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, "ddp"), (2, "fsdp2"), (2, "fsdp2 no reshard"), (4, "fsdp2 x tp")],
)
def test_training_is_the_same_as_with_a_copy_of_the_model(processes, world_size, parallel):
    copied, swapped = (
        processes.run(world_size, "snapshots.run", parallel=parallel, teacher=teacher)
        for teacher in ("copy", "snapshot")
    )
    tolerance = 1e-5 if "tp" in parallel else 0.0  # there the copy, which is whole, adds in another order
    for mine, reference in zip(swapped, copied, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)
    assert swapped[0][1][-2] > 1e-3, "the model has drifted"


def test_models_that_are_sharded_in_other_ways_are_refused(processes):
    assert "Use fully_shard (FSDP2)" in processes.run(2, "snapshots.refused")[0]
    assert "and `fully_shard`, before the first step" in processes.run(2, "snapshots.sharded_later")[1]
