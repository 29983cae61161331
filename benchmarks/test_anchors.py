"""What anchors cost: building beside the bare forward, reading beside numpy, and what a training thread waits for.

make bench
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCache, HiddenRetention
from craft_optim.anchors.images import decode
from craft_optim.anchors.importers import write_cache
from craft_optim.anchors.manifest import FeatureSpec, tap_key
from craft_optim.anchors.sampling import AnchorSampler

Compare = Callable[..., None]


def resident(kind: str = "VmRSS") -> float:
    """MB that the process holds; NaN where there is no /proc."""
    status = Path("/proc/self/status")
    found = re.search(rf"{kind}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


# Building


@pytest.fixture(scope="module")
def pi0_fast() -> tuple[Any, list[dict[str, Tensor]]]:
    """The shipped policy and 1,536 of its task's frames, preprocessed, in batches of 32."""
    pytest.importorskip("lerobot")
    from metaworld_pi0_fast import ASSETS, OLD_TASK
    from metaworld_pi0_fast.batches import PreparedFrames
    from metaworld_pi0_fast.demonstrations import load_frames
    from metaworld_pi0_fast.policy import load_policy, make_processors

    policy = load_policy(ASSETS / "pretrained")
    frames = load_frames(ASSETS / "demonstrations" / OLD_TASK, policy.config.chunk_size, episodes=list(range(24)))
    prepared = PreparedFrames(frames, make_processors(policy, path=ASSETS / "pretrained")[0], heldout_episodes=0)
    assert len(prepared) >= 1536
    return policy, [prepared.train_batch(part) for part in torch.split(torch.arange(1536), 32)]


def plain_forward(pi0_fast: tuple[Any, list[dict[str, Tensor]]]) -> Callable[[], None]:
    from craft_optim.lerobot.pi0_fast import action_logits

    policy, batches = pi0_fast

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                action_logits(policy, batch)

    return run


def building(
    pi0_fast: tuple[Any, list[dict[str, Tensor]]], keep: str, path: Path, **changes: Any
) -> Callable[[], None]:
    """Builds a new cache at each call, and throws the one before away."""
    from craft_optim.lerobot import adapter_for

    policy, batches = pi0_fast
    adapter, numbers = adapter_for(policy, keep=keep), count()

    def run() -> None:
        shutil.rmtree(path / str(next(numbers) - 1), ignore_errors=True)
        inputs = (adapter.inputs(batch) for batch in batches)
        adapter.build(policy, inputs, path / str(next(numbers) - 1), progress=False, **changes)

    return run


@pytest.mark.benchmark(group="building")
def test_building_logits(compare: Compare, pi0_fast: Any, tmp_path: Path) -> None:
    compare(
        "build, action-token logits / forward",
        building(pi0_fast, "logits", tmp_path),
        plain_forward(pi0_fast),
        "<= 1.05",
    )


@pytest.mark.benchmark(group="building")
@pytest.mark.parametrize("layer", [1, -1])
def test_building_hidden_states(compare: Compare, pi0_fast: Any, tmp_path: Path, layer: int) -> None:
    compare(
        f"build, prefix states of layer {layer} / full forward",
        building(pi0_fast, "prefix", tmp_path, layers=(layer,)),
        plain_forward(pi0_fast),
        rounds=5,
    )


# Reading


def pictures(path: Path, count: int, side: int, width: int) -> AnchorCache:
    """Anchors with a picture, stored as bytes, and hidden states of two layers in float16."""
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Any, dict[str, Tensor]]]:
        for start in range(0, count, 64):
            size = min(64, count - start)
            pixels = torch.randint(0, 256, (size, 3, side, side), generator=generator) / 255.0
            states = {tap_key(layer, "all"): torch.randn(size, width, generator=generator) for layer in ("a", "b")}
            yield {"pixels": pixels}, states

    return write_cache(path, batches(), FeatureSpec(layers=("a", "b"), pooling={"all": "masked_mean"}))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> AnchorCache:
    """224 px: 540 MB."""
    return pictures(tmp_path_factory.mktemp("large"), 3400, 224, 2048)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> AnchorCache:
    """64 px: 42 MB."""
    return pictures(tmp_path_factory.mktemp("small"), 3200, 64, 256)


class Maps:
    """The same rows out of numpy memmaps of the same files, into the same kind of buffers."""

    def __init__(self, path: Path) -> None:
        types = {"U8": np.uint8, "F16": np.float16}
        self.places: list[tuple[int, int]] = []
        self.maps: list[dict[str, np.memmap[Any, Any]]] = []
        for file in sorted(path.glob("*.safetensors")):
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            self.maps.append(
                {
                    key: np.memmap(
                        file, types[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
                    )
                    for key, entry in header.items()
                }
            )
            rows = len(next(iter(self.maps[-1].values())))
            self.places += [(len(self.maps) - 1, row) for row in range(rows)]

    def gather(self, indices: list[int]) -> dict[str, Tensor]:
        places = [self.places[i] for i in indices]
        tensors = {}
        for key, first in self.maps[0].items():
            dtype = torch.uint8 if first.dtype == np.uint8 else torch.float16
            tensors[key] = torch.empty((len(places), *first.shape[1:]), dtype=dtype)
            out = tensors[key].numpy()
            for i, (shard, row) in enumerate(places):
                out[i] = self.maps[shard][key][row]
        return tensors


def order(cache: AnchorCache, batches: int = 64) -> list[list[int]]:
    sampler = AnchorSampler(len(cache), 16)
    return [sampler.indices(position).tolist() for position in range(batches)]


@pytest.mark.benchmark(group="shuffled reading")
@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("size", ["large", "small"])
def test_shuffled_reading(
    compare: Compare, note: Callable[[str, float], None], request: pytest.FixtureRequest, size: str, decoded: bool
) -> None:
    cache: AnchorCache = request.getfixturevalue(size)
    batches = order(cache)
    whole, floats = cache.gather(batches[0])
    ((key, (formula, dtype)),) = floats.items()

    before = resident()
    for indices in batches:
        cache.gather(indices)
    grown = resident() - before
    maps = Maps(cache.path)
    before = resident()
    for indices in batches:
        maps.gather(indices)
    mapped = resident() - before
    for name, x in maps.gather(batches[0]).items():
        assert torch.equal(x, whole[name])

    def ours() -> None:
        for indices in batches:
            if decoded:
                cache.read(indices)
            else:
                cache.gather(indices)

    def numpys() -> None:
        for indices in batches:
            tensors = maps.gather(indices)
            if decoded:
                tensors[key] = decode(tensors[key], formula, dtype)

    what = f"{cache.nbytes / 1e6:.0f} MB cache, {cache.nbytes / len(cache) / 1e3:.0f} kB anchors"
    compare(
        f"read 64 x 16{' and decode' if decoded else ''} / numpy memmap ({what})",
        ours,
        numpys,
        "<= 1.25" if size == "large" else "",
    )
    if size == "large" and not decoded:
        note("memory grown by reading, MB", grown)
        note("memory grown by numpy memmap, MB", mapped)


@pytest.mark.benchmark(group="reading ahead")
@pytest.mark.parametrize("size", ["large", "small"])
def test_what_the_training_thread_waits_for(compare: Compare, request: pytest.FixtureRequest, size: str) -> None:
    """The next batch after a task step of 20 ms that keeps a core busy."""
    cache: AnchorCache = request.getfixturevalue(size)
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    left, right = torch.randn(256, 256), torch.randn(256, 256)

    def step() -> None:
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end:
            left @ right

    def waiting(workers: int) -> Callable[[], Any]:
        retention, positions = HiddenRetention(model, cache, 16, strict=False, workers=workers), count()
        return lambda: retention._batch(next(positions))

    anchor = cache.nbytes / len(cache) / 1e3
    compare(
        f"next 16 after a step, workers=1 / workers=0 ({anchor:.0f} kB anchors)",
        waiting(1),
        waiting(0),
        rounds=101,
        between=step,
    )
