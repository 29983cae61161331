"""How the cost grows: surgery over its memory traffic by the number of elements and of tensors, a step by processes.

make bench GROUP=scaling
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from floor import AXPY_COUNTS, axpy
from ranks import Ranks
from shapes import pair, same_size

from craft_optim.functional import project_and_merge_

Compare = Callable[..., None]

MILLION = 1 << 20


def compare_with_floor(compare: Compare, name: str, device: torch.device, count: int, total: int) -> None:
    task, retention = pair(same_size(count, total), device)
    rounds = 51 if max(count / 1000, total / MILLION) <= 4 else 15
    compare(
        name, lambda: project_and_merge_(task, retention, lam=0.5), axpy(task), rounds=rounds, peer_counts=AXPY_COUNTS
    )


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("millions", [1, 4, 16, 64])
def test_over_elements(compare: Compare, device: torch.device, millions: int) -> None:
    compare_with_floor(compare, f"surgery, {millions} M elements in 100 tensors", device, 100, millions * MILLION)


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("count", [1, 10, 1000, 10_000])
def test_over_tensors(compare: Compare, device: torch.device, count: int) -> None:
    name = f"surgery, 16 M elements in {count:,} tensor{'s' if count > 1 else ''}"
    compare_with_floor(compare, name, device, count, 16 * MILLION)


@pytest.fixture(scope="module")
def ranks(device: torch.device) -> Iterator[Ranks]:
    if device.type != "cpu":
        pytest.skip("measures gloo processes")
    with Ranks(2) as running:
        yield running


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("name", ["AdamW", "CRaFT"])
def test_over_processes(compare: Compare, ranks: Ranks, name: str) -> None:
    """The same step, with as much data per process, on two processes and on one."""
    compare(
        f"step of {name}, 2 processes",
        lambda: ranks.step(name, together=True),
        lambda: ranks.step(name, together=False),
        rounds=31,
        elsewhere=True,
    )
