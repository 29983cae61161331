"""Several gloo processes on one machine, kept for many cases: starting them costs more than running one."""

import os
import pickle
import selectors
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from craft_optim import anchors

pytest.importorskip("torch.distributed.fsdp")

sys.path.insert(0, str(Path(__file__).parent))  # for `cases`, as in the workers


class Processes:
    """`run(world_size, "module.function", **arguments)` -> what that function returned on each rank."""

    def __init__(self, folder):
        self.folder, self.workers, self.calls = folder, [], 0

    def run(self, world_size, case, **arguments):
        while len(self.workers) < world_size:
            rank = str(len(self.workers))
            command = [sys.executable, str(Path(__file__).with_name("worker.py")), rank]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            self.workers.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            )
        self.calls += 1
        workers = self.workers[:world_size]
        for worker in workers:
            pickle.dump((world_size, str(self.folder / f"store{self.calls}"), case, arguments), worker.stdin)
            worker.stdin.flush()
        answers = {}
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(workers):
                selector.register(worker.stdout, selectors.EVENT_READ, rank)
            while len(answers) < world_size:
                ready = selector.select(timeout=120)
                if not ready:
                    self.stop()
                    pytest.fail(f"{case}: of {world_size} ranks only {sorted(answers)} answered within two minutes")
                for key, _ in ready:
                    selector.unregister(key.fileobj)
                    try:
                        succeeded, answers[key.data] = pickle.load(key.fileobj)
                    except EOFError:
                        succeeded, answers[key.data] = False, "the process died"
                    if not succeeded:  # the others may wait for it for ever
                        self.stop()
                        pytest.fail(f"{case} on rank {key.data} of {world_size}:\n{answers[key.data]}")
        return [answers[rank] for rank in range(world_size)]

    def stop(self):
        for worker in self.workers:
            worker.kill()
            worker.communicate()
        self.workers = []


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    pool = Processes(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    import cases

    path = tmp_path_factory.mktemp("anchors") / "cache"
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    anchors.build(cases.network(), inputs.split(10), path, layers=["blocks.0"], progress=False)
    return str(path)


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
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-6)
    for rank in ranks:
        for name, p in alone["parameters"].items():
            torch.testing.assert_close(
                rank["parameters"][name], p, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="session")
def assert_same_run():
    return same_run
