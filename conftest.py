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
_INTEGRATIONS = (
    ("lerobot", "craft_optim/lerobot/*"),
    ("scipy", "craft_optim/evaluation/statistics.py"),
    ("transformers", "craft_optim/transformers.py"),
    ("transformers", "craft_optim/demo/*chat.py"),
    ("triton", "craft_optim/*kernels/fused.py"),
)
collect_ignore_glob = [files for library, files in _INTEGRATIONS if not find_spec(library)]

# The same examples on every run, and no limits of wall time.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")


# By what they need of a processor, so that two processes which share the files end together: `make test` hands them out
# in this order, then the others in their own.
LONGEST = (
    "tests/lerobot/test_train.py",
    "tests/evidence/test_six_experiments.py",
    "tests/examples/test_small_llama.py",
    # One after the other: in each process they share ranks
    "tests/distributed/test_equals_one_process.py",
    "tests/distributed/test_checkpoints.py",
    "tests/distributed/test_frameworks.py",
    "tests/distributed/test_building.py",
    "tests/distributed/test_snapshot.py",
    "tests/distributed/test_constraints.py",
    "tests/distributed/test_layout.py",
    "tests/distributed/test_reach.py",
    "tests/lerobot/test_plugin.py",
    "tests/examples/test_metaworld_pi0_fast.py",
    "tests/examples/test_pi0_fast_craft.py",
    "tests/anchors/test_robustness.py",
    "tests/evidence/test_how_many_anchors.py",
    "tests/integrations/test_transformers.py",
    "tests/planning/test_peaks.py",
    "tests/lerobot/test_planning.py",
    "tests/test_docs_build.py",
    "tests/lerobot/test_pi0_fast.py",
    "tests/lerobot/test_adapters.py",
    "tests/integrations/test_checkpoints.py",
    "tests/anchors/test_compile.py",
    "tests/lerobot/test_command_line.py",
    "tests/integrations/test_bases.py",
    "tests/kernels/test_fused.py",
    "tests/evidence/test_retention_budget.py",
    "tests/examples/test_llm_lora_trainer.py",
    "tests/constraints/test_constraints.py",
    "tests/test_cli.py",
    "tests/lerobot/test_drift.py",
    "tests/lerobot/test_opening.py",
    "tests/kernels/test_compiled.py",
    "tests/test_optimizer.py",
)


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
