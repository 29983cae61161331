"""What the ranks run to build one cache together."""

from pathlib import Path

import torch
import torch.distributed as dist
from cases import network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from craft_optim.anchors import Reading, build

SETTINGS = {"layers": ["blocks.0"], "shard_size": 6, "progress": False}


def batches(seed=1):
    return list(torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).split(5))


def spread(parallel):
    model, mesh = network(), None
    if parallel in ("fsdp2", "tp", "fsdp2 x tp"):
        size = dist.get_world_size()
        shape = {"fsdp2": (size, 1), "tp": (1, size), "fsdp2 x tp": (size // 2, 2)}[parallel]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    if parallel in ("tp", "fsdp2 x tp"):
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if parallel in ("fsdp2", "fsdp2 x tp"):
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    if parallel == "fsdp1":
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
        )
    return DistributedDataParallel(model) if parallel == "ddp" else model


class Counting:
    """A forward that counts, and fails."""

    def __init__(self, calls, fails_at=None):
        self.calls, self.fails_at = calls, fails_at

    def __call__(self, model, batch):
        self.calls.append(len(batch))
        if len(self.calls) == self.fails_at:
            raise RuntimeError("no such picture")
        return model(batch)


class Summing(torch.nn.Module):
    """Adds up the rows of each anchor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, counts, rows=None):
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        sums = torch.zeros(len(counts), 6)
        return self.head(sums if rows is None else sums.index_add(0, owners, rows))


def build_ragged(path):
    """The first loss of a closure on a cache whose anchors have 0 to 3 rows each, some batches none."""
    counts = torch.arange(24) % 4
    counts[8:12] = 0
    rows = torch.randn(int(counts.sum()), 6, generator=torch.Generator().manual_seed(1)).split(counts.tolist())
    given = []
    for first in range(0, 24, 4):
        part = torch.cat(rows[first : first + 4])
        category = [f"{count} rows" for count in counts[first : first + 4].tolist()]
        given.append(
            {"counts": counts[first : first + 4], "category": category} | ({"rows": part} if len(part) else {})
        )
    model = Summing()
    lengths = lambda batch: {"rows": batch["counts"]}  # noqa: E731 - its name is in the cache
    cache = build(model, given, path, lengths=lengths, class_dim=-1, dtype=torch.float32, **SETTINGS | {"layers": []})
    assert cache.categories == [f"{count} rows" for count in counts.tolist()]
    retention = cache.retention(model, batch_size=4)
    if dist.is_initialized():
        retention.shard(dist.get_rank(), dist.get_world_size())
    return retention().item()


def build_one(path, parallel="plain", seeds=None, count=None, **settings):
    """How many forwards each rank needed; the cache is what it is about. `seeds`: of each rank's own batches."""
    model = spread(parallel)
    calls: list[int] = []
    given = batches(1 if seeds is None else seeds[dist.get_rank()])[: count and count[dist.get_rank()]]

    reading = Reading(Counting(calls))
    cache = build(model, given, path, reading, **{**SETTINGS, **settings}, class_dim=-1)
    assert len(cache) == len(build(model, given, path, reading, **{**SETTINGS, **settings}, class_dim=-1))  # finished
    return len(calls)


def complaint(path, **arguments):
    """The error that building ends with, on each rank."""
    try:
        build_one(path, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def separate_folders(path):
    """As if every process had a disk of its own."""
    return complaint(str(Path(path) / str(dist.get_rank())))


def one_fails(path):
    """Rank 1 fails at its third batch."""
    model, rank = network(), dist.get_rank()
    try:
        build(
            model,
            batches(),
            path,
            Reading(Counting([], fails_at=3 if rank == 1 else None)),
            **{**SETTINGS, "shard_size": 5},
            class_dim=-1,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def alone(path, parallel="plain", **settings):
    """Every rank for itself."""
    own = Path(path) / str(dist.get_rank())
    return len(build(spread(parallel), batches(), own, process_group=False, **{**SETTINGS, **settings}, class_dim=-1))
