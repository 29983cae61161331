"""For the tests and the doctests alike."""

import gc
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NoReturn

import pytest
import torch
from hypothesis import HealthCheck, settings

# Doctests of modules that import what they are made for.
_INTEGRATIONS = {
    "lerobot": "craft_optim/lerobot/*",
    "scipy": "craft_optim/evaluation/statistics.py",
    "transformers": "craft_optim/transformers.py",
    "triton": "craft_optim/*kernels/fused.py",
}
collect_ignore_glob = [files for library, files in _INTEGRATIONS.items() if not find_spec(library)]

# The same examples on every run, and no limits of wall time.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")


# By what they need of a processor, so that two processes which share the files end together: `make test` hands them out
# in this order, then the others in their own.
LONGEST = ("tests/lerobot/test_train.py",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first where several processes share them."""
    if hasattr(config, "workerinput"):
        place = {config.rootpath / file: number for number, file in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What is imported by now is there to stay: no collection of garbage goes over it again, nor any search."""
    gc.collect()
    gc.freeze()


PROCESSOR_SECONDS = 150  # the longest test needs a tenth of it, without its subprocesses


@pytest.fixture(autouse=True)
def _comes_to_an_end() -> Iterator[None]:
    """Fails a test that computes for ever: by processor time, which passes no faster on a busy machine."""

    def fail(*_: object) -> NoReturn:
        pytest.fail(f"more than {PROCESSOR_SECONDS} s of processor time")

    if not hasattr(signal, "SIGPROF"):
        yield
        return
    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
