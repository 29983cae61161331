"""Many processes, one cache: the bytes that one process would have written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from craft_optim.anchors import AnchorCache


def contents(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    assert processes.run(1, "building.build_one", path=str(path)) == [8]
    return contents(path)


# 40 anchors in batches of 5 and shards of 6
@pytest.mark.parametrize(
    ("world_size", "parallel", "forwards"),
    [
        (2, "plain", [7, 6]),
        (3, "ddp", [5, 4, 4]),
        (4, "plain", [4, 4, 3, 2]),
        (2, "fsdp2", [7, 7]),  # a forward needs all of them
        (2, "fsdp1", [7, 7]),
    ],
)
def test_many_processes_write_what_one_would(processes, tmp_path, whole, world_size, parallel, forwards):
    found = processes.run(world_size, "building.build_one", path=str(tmp_path), parallel=parallel)
    assert found == forwards, "each runs only the batches of its own shards"
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(("parallel", "forwards"), [("tp", [8, 8, 8, 8]), ("fsdp2 x tp", [7, 7, 7, 7])])
def test_processes_that_share_layers_do_the_same_and_one_writes(processes, tmp_path, whole, parallel, forwards):
    assert processes.run(4, "building.build_one", path=str(tmp_path / "c"), parallel=parallel) == forwards
    (tmp_path / "one").mkdir()
    for name, data in whole.items():
        (tmp_path / "one" / name).write_bytes(data)
    found, one = AnchorCache.open(tmp_path / "c"), AnchorCache.open(tmp_path / "one")
    assert sorted(contents(found.path)) == sorted(whole)
    assert torch.equal(found.read(range(40)).inputs, one.read(range(40)).inputs)
    for name, x in one.read(range(40)).features.items():  # parts of a product are summed in another order
        torch.testing.assert_close(found.read(range(40)).features[name], x, rtol=1e-3, atol=1e-3)


def test_rows_of_many_anchors_are_written_as_one_process_would(processes, tmp_path):
    """As pictures have them: each anchor's rows in one long tensor."""
    for world_size in (1, 2, 3):
        drifts = processes.run(world_size, "building.build_ragged", path=str(tmp_path / str(world_size)))
        assert max(map(abs, drifts)) < 1e-5
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_each_process_may_have_anchors_of_its_own(processes, tmp_path):
    cases = {"seeds": [1, 2, 3], "count": [3, 2, 8], "replicated": False}
    assert processes.run(3, "building.build_one", path=str(tmp_path), **cases) == [3, 2, 8]
    cache = AnchorCache.open(tmp_path)
    expected = [torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    assert torch.equal(
        cache.read(range(len(cache))).inputs, torch.cat([expected[0][:15], expected[1][:10], expected[2]])
    )
    assert not [name for name in contents(tmp_path) if name.endswith((".lock", ".done"))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": [1, 2]}, "pass replicated=False"),
        ({"replicated": False}, "Some first batches are the same"),
        ({"count": [8, 7]}, "saw different numbers of anchors|Rank 0 could not go on"),
    ],
)
def test_batches_that_are_not_what_was_said_are_refused_everywhere(processes, tmp_path, arguments, words):
    for complaint in processes.run(2, "building.complaint", path=str(tmp_path), **arguments):
        assert re.search(words, complaint), complaint
    assert not (tmp_path / "cache.json").exists()


def test_folders_that_are_not_shared_are_found_out(processes, tmp_path):
    first, second = processes.run(2, "building.separate_folders", path=str(tmp_path))
    assert "not one folder on all processes: rank 1 does not see" in second
    assert "not one folder" in first or "Rank 1" in first


def test_a_failure_on_one_process_ends_all_and_keeps_what_is_complete(processes, tmp_path, whole):
    first, second = processes.run(2, "building.one_fails", path=str(tmp_path / "c"))
    assert second == "RuntimeError: no such picture"
    assert "Rank 1 could not go on" in first
    assert "RuntimeError: no such picture" in first
    complete = len(list((tmp_path / "c").glob("shard-*.json")))
    assert complete >= 2
    # on another number of processes: what is complete is complete
    (forwards,) = processes.run(1, "building.build_one", path=str(tmp_path / "c"), shard_size=5)
    assert forwards == 8 - complete
    processes.run(1, "building.build_one", path=str(tmp_path / "one"), shard_size=5)
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "c") == one


def test_each_for_itself(processes, tmp_path):
    assert processes.run(2, "building.alone", path=str(tmp_path)) == [40, 40]


def test_a_killed_process_is_noticed(tmp_path):
    """By the one that waits for it, without torch.distributed's help."""
    script = """
import os
import signal
import sys
import time
from pathlib import Path
import torch
from craft_optim.anchors.build_folder import BuildFolder
from craft_optim.anchors.folders import locked
from craft_optim.anchors.processes import Team
from craft_optim.anchors.structure import flatten
from craft_optim.anchors.writing import Writer
folder = Path(sys.argv[1])
child = os.fork()
rank = 0 if child else 1
features = {"layers": [], "pooling": {}, "mask": None, "tokens": None}
settings = {"features": features, "images": "keep", "shard_size": 5, "teacher": {}}
with locked(folder, rank):
    writer = Writer(BuildFolder(folder, settings, Team(None, rank, 2)))
    if rank == 0:
        writer.folder.prepare(start_over=True)
    (folder / f"up-{rank}").touch()
    while not (folder / f"up-{1 - rank}").exists():
        time.sleep(0.01)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    x = torch.randn(10, 6)
    writer.expect(flatten(x))
    writer.add(flatten(x), {"logprobs": x}, {})
    writer.finish()
"""
    first = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert "Rank 1 was interrupted" in first.stderr
    assert (tmp_path / "shard-00000.json").exists()
