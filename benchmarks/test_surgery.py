"""Surgery on lists of gradients, and its peers, over the memory traffic that it cannot do without.

make bench GROUP=surgery
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from floor import AXPY_COUNTS, axpy
from gpu_memory import require_gpu
from kept_memory import kept_memory
from peers import PEERS
from shapes import Pair, gpt2, pair, paligemma, same_size

from craft_optim._step.surgery import GradientPairs
from craft_optim.functional import project_and_merge_

Compare = Callable[..., None]

SIZES = {
    "GPT-2 124M": gpt2,
    "2,000 x 4,096": lambda: same_size(2000, 2000 * 4096),
    "2,000 x 1,024": lambda: same_size(2000, 2000 * 1024),
    "PaliGemma 3B": paligemma,
}
ROUNDS = {"GPT-2 124M": 15, "2,000 x 4,096": 51, "2,000 x 1,024": 101, "PaliGemma 3B": 31}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if not name.startswith("2,000"):
        pytest.importorskip("transformers")
    if name == "PaliGemma 3B":
        require_gpu(device)
    return name


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if name != "float32":
        require_gpu(device)
    return name


@pytest.fixture(scope="module")
def gradients(size: str, dtype: str, device: torch.device) -> tuple[Pair, Callable[[], Any]]:
    """Task and retention gradients, and the axpy to measure them by."""
    if size == "PaliGemma 3B":  # five lists or vectors of 2.9 billion elements, and some air
        require_gpu(device, 6 * 2.9 * DTYPES[dtype].itemsize)
    lists = pair(SIZES[size](), device, DTYPES[dtype])
    return lists, axpy(lists[0])


@pytest.mark.benchmark(group="surgery")
@pytest.mark.parametrize("compiler", [True, False], ids=["compiled", "interpreted"])
def test_surgery(
    compare: Compare,
    monkeypatch: pytest.MonkeyPatch,
    gradients: tuple[Pair, Callable[[], Any]],
    size: str,
    dtype: str,
    device: torch.device,
    compiler: bool,
) -> None:
    (task, retention), peer = gradients
    monkeypatch.setenv("CRAFT_OPTIM_COMPILE", "1" if compiler else "0")
    if not compiler:
        monkeypatch.setattr("craft_optim._step.surgery._FUSED", frozenset())
    elif "portable" in GradientPairs(task, retention).ways:
        pytest.skip("needs Triton on a GPU, a C++ compiler elsewhere")
    merged = [g.clone() for g in retention]
    # What it writes is what it reads on the next round: with this multiplier that stays bounded.
    compare(
        f"surgery{'' if compiler else ' without a compiler'}, {size}, {dtype}",
        lambda: project_and_merge_(task, merged, lam=0.5),
        peer,
        rounds=ROUNDS[size],
        peer_counts=AXPY_COUNTS,
    )


@pytest.mark.benchmark(group="surgery")
@pytest.mark.parametrize("name", PEERS)
def test_peers(compare: Compare, gradients: tuple[Pair, Callable[[], Any]], size: str, dtype: str, name: str) -> None:
    if size == "PaliGemma 3B":
        pytest.skip("the peers' copies would fill the GPU")
    (task, retention), peer = gradients
    merge = PEERS[name]()
    with kept_memory():  # to their benefit: they make new vectors, which cost more than half of their time otherwise
        for _ in range(3):
            merge(task, retention)
        compare(
            f"{name}, {size}, {dtype}",
            lambda: merge(task, retention),
            peer,
            rounds=ROUNDS[size] // 2,
            peer_counts=AXPY_COUNTS,
        )
