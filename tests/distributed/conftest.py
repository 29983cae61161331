"""Several gloo processes on one machine, kept for many cases: starting them costs more than running one."""

import os
import pickle
import signal
import subprocess
import sys
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from craft_optim import anchors

pytest.importorskip("torch.distributed.fsdp")

sys.path.insert(0, str(Path(__file__).parent))  # for `cases`, as in the workers

RANKS = 4  # at most


class Processes:
    """`run(world_size, "module.function", **arguments)` -> what that function returned on each rank."""

    def __init__(self, folder, modules=("cases",)):
        self.folder, self.modules, self.parent, self.ranks, self.calls = folder, modules, None, [], 0

    running: ClassVar = []

    def start(self):
        self.running.append(self)
        self.ranks, theirs = zip(*(Pipe() for _ in range(RANKS)), strict=True)
        descriptors = [end.fileno() for end in theirs]
        worker = str(Path(__file__).with_name("worker.py"))
        self.parent = subprocess.Popen(
            [sys.executable, worker, ",".join(self.modules), *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for end in theirs:
            end.close()

    def run(self, world_size, case, **arguments):
        if self.parent is None:
            self.start()
        self.calls += 1
        ranks = self.ranks[:world_size]
        for rank in ranks:
            rank.send_bytes(pickle.dumps((world_size, str(self.folder / f"store{self.calls}"), case, arguments)))
        answers = {}
        while len(answers) < world_size:
            for ready in connection.wait([rank for rank in ranks if ranks.index(rank) not in answers]):
                rank = ranks.index(ready)
                try:
                    succeeded, answers[rank] = pickle.loads(ready.recv_bytes())
                except EOFError:
                    succeeded, answers[rank] = False, "the process died"
                if not succeeded:  # the others may wait for it for ever
                    self.stop()
                    if "no attribute 'record_event'" in answers[rank]:
                        pytest.skip("FSDP2 of torch 2.6 does not run on CPUs")
                    if "Cannot writeback when the gradient shape changes" in answers[rank]:
                        pytest.skip("torch 2.6 cannot collect the parameters of FSDP1 without shards")
                    pytest.fail(f"{case} on rank {rank} of {world_size}:\n{answers[rank]}")
        return [answers[rank] for rank in range(world_size)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.parent is not None:
            self.running.remove(self)
            os.killpg(self.parent.pid, signal.SIGKILL)
            self.parent.wait()
            for rank in self.ranks:
                rank.close()
        self.parent, self.ranks = None, []


def pytest_runtest_teardown(item, nextitem):
    """Ends the ranks where the tests of other folders begin: threads that torch leaves in them never quite rest."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        for pool in [*Processes.running]:
            pool.stop()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    with Processes(tmp_path_factory.mktemp("stores")) as pool:
        yield pool


@pytest.fixture(scope="module")
def framework_processes(tmp_path_factory):
    """Others, which share what importing the frameworks costs."""
    modules = ("cases", "accelerate", "lightning.pytorch", "peft", "transformers.trainer")
    with Processes(tmp_path_factory.mktemp("stores"), modules) as pool:
        yield pool


def build(path, seed, scale=1.0):
    import cases

    inputs = scale * torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    anchors.build(cases.network(), inputs.split(10), path, layers=["blocks.0"], progress=False, class_dim=-1)
    return str(path)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return build(tmp_path_factory.mktemp("anchors") / "cache", seed=1)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory):
    """Others, on which drift is larger."""
    return build(tmp_path_factory.mktemp("anchors") / "heldout", seed=2, scale=4.0)


@pytest.fixture(scope="session")
def alone(processes, cache):
    """The same run in one process; each once."""
    runs = {}

    def run(**arguments):
        key = repr(sorted(arguments.items()))
        if key not in runs:
            runs[key] = processes.run(1, "cases.train", cache=cache, **arguments)[0]
        return runs[key]

    return run


def same_run(ranks, alone, steps=slice(None)):
    """Asserts that all ranks have decided alike, and as one process has, and that they hold the same parameters."""
    for rank in ranks[1:]:
        assert rank["metrics"] == ranks[0]["metrics"], "ranks have measured, or decided, differently"
        assert rank["state"] == ranks[0]["state"]
    for what, value in ranks[0]["state"].items():
        if what.startswith("craft_anchor_position"):
            assert value == alone["state"][what]
    for mine, reference in zip(ranks[0]["metrics"], alone["metrics"][steps], strict=True):
        rest, of_one = ({k: v for k, v in row.items() if k != "step_kept"} for row in (mine, reference))
        # The cosine of gradients that are all but orthogonal is what rounding in float32 leaves of it
        assert rest == pytest.approx(of_one, rel=3e-4, abs=3e-5)
        # A difference of roots: rounding counts for more
        assert mine.get("step_kept") == pytest.approx(reference.get("step_kept"), rel=1e-3)
    for rank in ranks:
        for name, p in alone["parameters"].items():
            torch.testing.assert_close(
                rank["parameters"][name], p, rtol=0, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="session")
def assert_same_run():
    return same_run
