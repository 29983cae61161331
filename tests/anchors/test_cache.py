"""What is written comes back bit for bit; what is damaged is refused with a clear error."""

import gc
import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCache, AnchorCacheError, LogitRetention, Reading, build
from craft_optim.anchors.kinds import Output
from craft_optim.anchors.manifest import manifest_text
from craft_optim.anchors.shards import Shard
from craft_optim.anchors.structure import flatten

Batches = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def cache(classifier: nn.Module, points: Tensor, tmp_path: Path) -> AnchorCache:
    return build(classifier, points.split(7), tmp_path / "cache", shard_size=16, layers=("1",), class_dim=-1)


def test_anchors_come_back_in_any_order(cache: AnchorCache, classifier: nn.Module, points: Tensor) -> None:
    assert len(cache) == 50
    assert sorted(p.name for p in cache.path.iterdir()) == [
        "cache.json",
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]
    order = torch.randperm(50)
    inputs, features = cache.read(order)
    assert torch.equal(inputs, points[order])
    with torch.no_grad():
        logprobs = classifier(points).log_softmax(-1)[order]
    assert features["logprobs"].dtype == torch.float16
    torch.testing.assert_close(features["logprobs"].float(), logprobs, atol=2e-3, rtol=1e-3)
    inputs, features = cache.read([49, 0, 0, 17])
    assert torch.equal(inputs, points[[49, 0, 0, 17]])
    assert torch.equal(cache.read(range(3)).inputs, points[:3])


@pytest.mark.parametrize("indices", [[50], [-1], []])
def test_indices_out_of_range_are_refused(cache: AnchorCache, indices: list[int]) -> None:
    with pytest.raises(IndexError, match="50"):
        cache.read(indices)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_every_dtype_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    def values(*shape: int) -> Tensor:
        return (torch.randn(shape) * 100).to(dtype)

    batch = (values(5), None, values(5, 3), values(5, 2, 1, 3, 2), values(5, 0), values(3, 5).t())
    cache = build(
        nn.Linear(2, 2), [batch], tmp_path, Reading(lambda m, b: m(torch.ones(5, 2))), shard_size=2, class_dim=-1
    )
    inputs, _ = cache.read([4, 1, 2])
    assert isinstance(inputs, tuple)
    assert inputs[1] is None
    for got, given in zip(inputs, batch, strict=True):
        if given is not None:
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert torch.equal(got, given[[4, 1, 2]])


def test_mappings_come_back_without_what_is_no_tensor(tmp_path: Path) -> None:
    batch = {"observation.state": torch.randn(4, 3), "task": ["push"] * 4, "none": None}
    seen = []

    def forward(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        seen.append(sorted(inputs))
        out: Tensor = model(inputs["observation.state"])
        return out

    cache = build(nn.Linear(3, 2), [batch], tmp_path, Reading(forward), class_dim=-1)
    assert seen == [["observation.state"]]  # the teacher sees what a retention pass will see
    assert cache.structure.skipped == ("task", "none")
    inputs = cache.read([2]).inputs
    assert isinstance(inputs, dict)
    assert list(inputs) == ["observation.state"]


def test_nan_inputs_survive(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, torch.nan, -0.0, torch.inf]])
    cache = build(nn.Linear(2, 2), [x], tmp_path, Reading(lambda m, b: m(torch.ones(1, 2))), class_dim=-1)
    got = cache.read([0]).inputs
    assert isinstance(got, Tensor)
    assert torch.equal(got.view(torch.int32), x.view(torch.int32))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.linear(pixels.float().flatten(1))
        return out


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4)) / 255.0 * 2.0 - 1.0


def stored_dtypes(path: Path, key: str) -> list[torch.dtype]:
    return [safetensors.torch.load_file(p)[key].dtype for p in sorted(path.glob("shard-*"))]


def test_images_are_stored_as_bytes(tmp_path: Path) -> None:
    x = pictures(10)
    cache = build(Pictures(), x.split(3), tmp_path / "bytes", shard_size=4, class_dim=-1)
    assert stored_dtypes(cache.path, "inputs.0") == [torch.uint8] * 3
    got = cache.read([9, 0, 5]).inputs
    assert isinstance(got, Tensor)
    assert got.dtype == torch.float32
    assert torch.equal(got, x[[9, 0, 5]])
    kept = build(Pictures(), x.split(3), tmp_path / "kept", shard_size=4, images="keep", class_dim=-1)
    assert stored_dtypes(kept.path, "inputs.0") == [torch.float32] * 3
    assert torch.equal(flatten(kept.read([9, 0, 5]).inputs).tensors["0"], x[[9, 0, 5]])


def test_images_that_would_lose_a_bit_are_kept_as_they_are(tmp_path: Path) -> None:
    """Shard by shard: a black image fits many formulas, a noisy one none."""
    x = torch.cat([torch.zeros(2, 3, 4, 4), pictures(2), pictures(4), torch.rand(4, 3, 4, 4)])
    x[0:2] = -1.0
    cache = build(Pictures(), x.split(2), tmp_path, shard_size=4, class_dim=-1)
    assert stored_dtypes(tmp_path, "inputs.0") == [torch.uint8, torch.uint8, torch.float32]
    order = [11, 0, 5, 3, 8]
    assert torch.equal(flatten(cache.read(order).inputs).tensors["0"], x[order])


def test_images_that_need_one_formula_for_all_get_it(tmp_path: Path) -> None:
    black, whole = torch.zeros(2, 3, 4, 4), torch.randint(0, 256, (2, 3, 4, 4)).float()
    cache = build(Pictures(), [black, whole], tmp_path, class_dim=-1)
    assert stored_dtypes(tmp_path, "inputs.0") == [torch.uint8]
    assert torch.equal(flatten(cache.read(range(4)).inputs).tensors["0"], torch.cat([black, whole]))


@pytest.mark.parametrize("shard_size", [3, 5])  # lengths differ between shards, and within one
def test_lengths_may_differ_under_a_mask(
    llama: nn.Module, token_batches: Batches, tmp_path: Path, shard_size: int
) -> None:
    batches = token_batches((3, 9), (4, 12), (2, 7))
    cache = build(llama, batches, tmp_path, Reading(pooling={"all": "none"}), shard_size=shard_size, layers=(1,))
    rows = [(batch, i) for batch in batches for i in range(len(batch["input_ids"]))]
    alone = [cache.read([i]).features for i in range(9)]
    for chosen in ([0, 8, 4], [7, 8], [2, 1], list(range(9))):
        inputs, features = cache.read(chosen)
        assert isinstance(inputs, dict)
        width = max(rows[i][0]["input_ids"].shape[1] for i in chosen)
        assert inputs["input_ids"].shape == (len(chosen), width)
        assert features["mask"].shape == (len(chosen), width)
        count = int(sum(rows[i][0]["attention_mask"][rows[i][1]].sum() for i in chosen))
        assert features["logprobs"].shape == (count, 60)  # of the positions that count
        assert features["hidden.1.all"].shape == (count, 32)
        assert torch.equal(features["logprobs"], torch.cat([alone[i]["logprobs"] for i in chosen]))
        for got, i in enumerate(chosen):
            batch, row = rows[i]
            length = batch["input_ids"].shape[1]
            for name in ("input_ids", "attention_mask"):
                assert torch.equal(inputs[name][got, :length], batch[name][row])
                assert not bool(inputs[name][got, length:].any())
            assert torch.equal(features["mask"][got, :length], batch["attention_mask"][row].bool())
            assert not bool(features["mask"][got, length:].any())


def test_lengths_that_nothing_covers_are_refused(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    batches = [batch["input_ids"] for batch in token_batches((3, 9), (4, 12))]
    with pytest.raises(ValueError, match="attention_mask"):
        build(llama, batches, tmp_path / "a")
    with pytest.raises(ValueError, match="'mean'"):
        build(llama, token_batches((3, 9), (4, 12)), tmp_path / "b", Reading(pooling={"all": "mean"}), layers=(1,))
    lengths = iter((3, 5))
    with pytest.raises(ValueError, match="no mask says"):
        build(
            nn.Linear(6, 2),
            torch.randn(4, 6).split(2),
            tmp_path / "c",
            Reading(lambda m, b: torch.ones(2, next(lengths), 4)),
            class_dim=-1,
        )


def test_a_cache_can_be_read_in_other_processes(cache: AnchorCache) -> None:
    cache.read([0])
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.read([3, 40]).inputs, cache.read([3, 40]).inputs)


def opened(cache: AnchorCache) -> list[bool]:
    """For each shard: this process holds a descriptor of it."""
    held = set()
    for number in os.listdir("/dev/fd"):
        with suppress(OSError):  # the one that listed them
            held.add(os.fstat(int(number)).st_ino)
    return [shard.path.stat().st_ino in held for shard in cache.shards]


def test_only_the_anchors_read_are_read(cache: AnchorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard is opened that holds none of them, and only their rows are copied."""
    from craft_optim.anchors import cache as module

    copied: list[tuple[str, int]] = []
    original = module.read_plain

    def spy(key: str, places: Any, out: Any, row_bytes: int) -> None:
        copied.extend((shard.path.name, row) for shard, row, _ in places)
        original(key, places, out, row_bytes)

    monkeypatch.setattr(module, "read_plain", spy)
    fresh = AnchorCache.open(cache.path)
    fresh.read([17, 33])
    assert set(copied) == {("shard-00001.safetensors", 1), ("shard-00002.safetensors", 1)}
    assert opened(fresh) == [False, True, True, False]


def test_the_manifest_says_what_is_in_it(cache: AnchorCache, classifier: nn.Module) -> None:
    assert (
        cache.describe()
        == "50 anchors, full logits of 4 classes and hidden states of layers 1 (all: masked_mean) as float16"
    )
    assert cache.features.outputs == {"": Output("classes", 1, 4)}
    assert cache.features.layers == ("1",)
    stored = torch.cat(
        [safetensors.torch.load_file(p)["features.hidden.module:1.all"] for p in cache.path.glob("shard-*")]
    )
    expected = float(stored.double().var(0, unbiased=False).mean())
    assert cache.features.variances == {"hidden.module:1.all": pytest.approx(expected, rel=1e-8)}
    cache.verify()


# Damage


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((path / "cache.json").read_text())
    del data["sha256"]
    change(data)
    (path / "cache.json").write_text(manifest_text(data))


def test_a_flipped_byte_is_found_by_verify(cache: AnchorCache) -> None:
    shard = cache.path / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(AnchorCacheError, match=r"shard-00002.*sha256"):
        AnchorCache.open(cache.path).verify()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_refused(cache: AnchorCache, keep: int) -> None:
    shard = cache.path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(AnchorCacheError, match=r"shard-00001.*bytes.*overwrite=True"):
        AnchorCache.open(cache.path)
    with pytest.raises(AnchorCacheError, match="shard-00001"):
        cache.read([20])  # opened before, not yet mapped


def test_a_missing_shard_is_refused(cache: AnchorCache) -> None:
    (cache.path / "shard-00000.safetensors").unlink()
    with pytest.raises(AnchorCacheError, match=r"shard-00000.*No such file"):
        AnchorCache.open(cache.path)


def test_another_shard_of_the_same_size_is_refused(cache: AnchorCache) -> None:
    first, second = cache.path / "shard-00000.safetensors", cache.path / "shard-00001.safetensors"
    tensors = safetensors.torch.load_file(first)
    renamed = {key.replace("logprobs", "lagprobs"): x for key, x in tensors.items()}
    size = first.stat().st_size
    safetensors.torch.save_file(renamed, first)
    assert first.stat().st_size == size
    with pytest.raises(AnchorCacheError, match=r"lacks features\.logprobs"):
        AnchorCache.open(cache.path)
    shutil.copy(second, first)
    with pytest.raises(AnchorCacheError, match="sha256"):
        AnchorCache.open(cache.path).verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema_version=1), r"schema_version 1, this library reads 4"),
        (lambda d: d.update(format="other"), "not a cache of anchors"),
        (lambda d: d.update(anchors=51), "51 anchors, its shards hold 50"),
        (lambda d: d.update(anchors=True), "'anchors' must be int"),
        (lambda d: d.pop("features"), "'features' must be dict"),
        (lambda d: d["features"].update(layers=[1.5]), "'layers'"),
        (lambda d: d["features"].update(layers=[7]), "lacks features.hidden.7.all"),
        (lambda d: d["features"].update(top_k=2, full_up_to=0), "lacks features.topk"),
        (
            lambda d: d["features"].update(logits="top_k", top_k=None),
            "'top_k' must be >= 1, at most the classes. Found None",
        ),
        (lambda d: d["features"].update(top_k=5, full_up_to=0), "'top_k' must be >= 1, .* Found 5"),
        (lambda d: d["features"].update(logits="top_k", top_k=0), "'top_k' must be"),
        (lambda d: d["features"]["outputs"][""].update(size=None), "'size' must be int"),
        (lambda d: d["features"]["outputs"][""].update(size=1 << 40), "'outputs' must be"),
        (lambda d: d["features"]["outputs"][""].update(size=-4), "'outputs' must be"),
        (lambda d: d["features"]["outputs"][""].update(size=5), "features.logprobs have 4 entries, it speaks of 5"),
        (lambda d: d["features"]["outputs"][""].update(kind="numbers"), "'outputs' must be"),
        (lambda d: d["features"]["outputs"][""].update(dim=0), "'outputs' must be"),
        (lambda d: d["features"].update(scales={"": [1.0]}), "'scales' must be"),
        (lambda d: d["features"]["variances"].update({"hidden.module:1.all": float("inf")}), "'variances' must be"),
        (lambda d: d["features"]["variances"].update({"hidden.module:1.all": float("nan")}), "'variances' must be"),
        (lambda d: d["features"]["variances"].update({"hidden.module:1.all": -1}), "'variances' must be"),
        (lambda d: d["inputs"].update(kind="list"), "'list'"),
        (lambda d: d["inputs"].update(names=["0", "1"]), "lacks inputs.1"),
        (lambda d: d["teacher"].update(fingerprint=1), "'fingerprint' must be str"),
        (lambda d: d["shards"].pop(), "50 anchors, its shards hold 48"),
        (lambda d: d.update(shards=[]), "its shards hold 0"),
        (lambda d: d.update(shards=[1]), "'file' must be str"),
        (lambda d: d["shards"][0].update(file="../../etc/passwd"), "must name a file in the folder"),
        (lambda d: d["shards"][0].update(anchors=17), "17 anchors are recorded"),
        (lambda d: d["shards"][0].update(anchors=-1), "at least one anchor"),
        (lambda d: d["shards"][0].update(images={"0": {"formula": "x", "dtype": "float32"}}), "unknown encoding"),
        (
            lambda d: d["shards"][0].update(images={"0": {"formula": "k", "dtype": "float32"}}),
            "no bytes for the images",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(cache: AnchorCache, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    edit(cache.path, change)
    with pytest.raises(AnchorCacheError, match=words):
        AnchorCache.open(cache.path)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], shard: int = 0) -> None:
    """Changes a shard, and the manifest with it, so that every checksum is right."""
    file = path / f"shard-{shard:05d}.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    size, sha256 = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    edit(path, lambda d: d["shards"][shard].update(bytes=size, sha256=sha256))


@pytest.mark.parametrize("wrong", [-1, 4, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("shard", [0, 1])
def test_indices_beyond_the_classes_are_refused(
    wrong: int, shard: int, classifier: nn.Module, points: Tensor, tmp_path: Path
) -> None:
    """On an accelerator they would cost the process its context."""
    build(classifier, [points[:8]], tmp_path, top_k=2, shard_size=4, progress=False)
    rewrite(tmp_path, lambda tensors: tensors["features.topk_indices"].view(-1)[3:4].fill_(wrong), shard)
    damaged = AnchorCache.open(tmp_path)
    damaged.verify()
    damaged.read(range(8), features=False)
    damaged.read(range(4 * (1 - shard), 4 * (1 - shard) + 4))
    with pytest.raises(AnchorCacheError, match=r"topk_indices must name classes from 0 to 3\. Found .*overwrite=True"):
        damaged.read(range(4 * shard, 4 * shard + 4))
    with pytest.raises(AnchorCacheError, match="topk_indices must name classes"):
        LogitRetention(classifier, damaged, batch_size=8)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_indices_of_another_dtype_are_refused(
    dtype: torch.dtype, classifier: nn.Module, points: Tensor, tmp_path: Path
) -> None:
    build(classifier, [points[:8]], tmp_path, top_k=2, progress=False)
    names = ("features.topk_indices", "fills.features.topk_indices")
    rewrite(tmp_path, lambda t: t.update({name: t[name].to(dtype) for name in names if name in t}))
    with pytest.raises(AnchorCacheError, match=r"topk_indices are torch\..*instead of whole numbers"):
        AnchorCache.open(tmp_path)


@pytest.mark.parametrize("width", [2**31 - 1, 2**20 + 101, -1])
def test_a_small_file_does_not_make_a_large_tensor(width: int, tmp_path: Path) -> None:
    batch = {"x": torch.randn(4, 3), "padded": torch.tensor([5, 3, 0, 0, 0, 0, 0, 0]).repeat(4, 1)}
    cache = build(
        nn.Linear(3, 2), [batch], tmp_path, Reading(lambda model, b: model(b["x"])), progress=False, class_dim=-1
    )
    assert torch.equal(cache.read([2]).inputs["padded"], batch["padded"][:1])  # type: ignore[index, call-overload]
    rewrite(tmp_path, lambda tensors: tensors["widths.inputs.padded"][2:3].fill_(width))
    damaged = AnchorCache.open(tmp_path, cache.reading)
    with pytest.raises(AnchorCacheError, match="do not fit the lengths"):
        damaged.read([2])


def test_very_long_padding_is_written_out(tmp_path: Path) -> None:
    """Left out, it could not be told from a file that lies about its lengths."""
    batch = {"x": torch.randn(2, 3), "padded": torch.zeros(2, 2**20 + 100, dtype=torch.bool)}
    cache = build(
        nn.Linear(3, 2), [batch], tmp_path, Reading(lambda model, b: model(b["x"])), progress=False, class_dim=-1
    )
    assert torch.equal(cache.read([1, 0]).inputs["padded"], batch["padded"])  # type: ignore[index, call-overload]


@pytest.mark.parametrize("shape", [[50, 0, 2**62], [50, 2**30, 0, 2**30], [50, 0, 10**400]])
def test_empty_tensors_of_impossible_shapes_are_refused(shape: list[int], cache: AnchorCache) -> None:
    file = cache.path / "shard-00000.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["inputs.more"] = {"dtype": "F32", "shape": [16, *shape[1:]], "data_offsets": [len(rest)] * 2}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    edit(cache.path, lambda d: d["shards"][0].update(bytes=file.stat().st_size))
    with pytest.raises(AnchorCacheError, match=r"'inputs\.more' contradicts itself"):
        AnchorCache.open(cache.path)


def test_an_index_has_no_index(tmp_path: Path) -> None:
    batch = {"x": torch.randn(4, 3), "padded": torch.tensor([5, 3, 0, 0, 0, 0, 0, 0]).repeat(4, 1)}
    cache = build(
        nn.Linear(3, 2), [batch], tmp_path, Reading(lambda model, b: model(b["x"])), progress=False, class_dim=-1
    )
    more = {"lengths.lengths.inputs.padded": torch.ones(4, dtype=torch.int32)}
    rewrite(tmp_path, lambda tensors: tensors.update(more))
    with pytest.raises(AnchorCacheError, match="belongs to no tensor"):
        AnchorCache.open(tmp_path, cache.reading)


def test_more_anchors_than_bytes_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"inputs.0": {"dtype": "F32", "shape": [10**12, 0], "data_offsets": [0, 0]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    (tmp_path / "shard-00000.safetensors").write_bytes(data)
    with pytest.raises(AnchorCacheError, match="cannot be those of 1000000000000 anchors"):
        Shard(tmp_path / "shard-00000.safetensors", 10**12, len(data), {})


# Moves


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def moved_and_rebuilt(folder: Path) -> None:
    moved(folder)
    build(nn.Linear(6, 4), [torch.randn(50, 6)], folder, shard_size=16, progress=False, class_dim=-1)


def copied_back(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def touched(folder: Path) -> None:
    for number, file in enumerate(folder.iterdir()):
        os.utime(file, ns=(10**18, 10**18 + number))


def synchronised(folder: Path) -> None:
    """As rsync does it: written aside, with the old time, and renamed."""
    for file in list(folder.iterdir()):
        shutil.copy2(file, file.with_name("aside"))
        os.replace(file.with_name("aside"), file)


def written_again_in_place(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes())


MOVES = [moved, moved_and_rebuilt, copied_back, touched, synchronised, written_again_in_place]


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_a_cache_that_moves_is_still_read(
    move: Callable[[Path], None], read_before: bool, cache: AnchorCache, points: Tensor
) -> None:
    if read_before:
        cache.read(range(20))
    for _ in range(1 if move in (moved, moved_and_rebuilt) else 2):
        move(cache.path)
        assert torch.equal(cache.read(range(50)).inputs, points)  # type: ignore[arg-type]


@pytest.mark.parametrize("read_before", [False, True])
def test_a_cache_that_is_built_anew_under_a_run_is_other_content(
    read_before: bool, cache: AnchorCache, points: Tensor
) -> None:
    """Its files have the same names, sizes and headers. Files that are open are still those of the old one."""
    if read_before:
        cache.read(range(50))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    build(
        model, points.split(7), cache.path, shard_size=16, layers=("1",), overwrite=True, progress=False, class_dim=-1
    )
    if read_before:
        assert torch.equal(cache.read(range(50)).inputs, points)  # type: ignore[arg-type]
    else:
        with pytest.raises(AnchorCacheError, match="has changed since the cache was opened"):
            cache.read([0])


def test_a_file_system_without_steady_times(cache: AnchorCache, points: Tensor, caplog: Any) -> None:
    """Contents are compared a few times only; they take as long as reading the file."""
    for number in range(8):
        touched(cache.path)
        os.utime(cache.path / "shard-00000.safetensors", ns=(0, number))
        assert torch.equal(cache.read([3]).inputs, points[3:4])  # type: ignore[arg-type]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    os.truncate(cache.path / "shard-00000.safetensors", 1000)
    with pytest.raises(AnchorCacheError, match=r"changed|cut short"):
        cache.read([3])


def test_a_build_on_a_file_system_without_steady_times(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_optim.anchors import build_folder as module

    variance = module.mean_variance

    def later(shards: list[Shard], key: str) -> float:
        for number, shard in enumerate(shards):
            os.utime(shard.path, ns=(0, number))
        return variance(shards, key)

    monkeypatch.setattr(module, "mean_variance", later)
    cache = build(classifier, points.split(7), tmp_path, shard_size=16, layers=("1",), progress=False, class_dim=-1)
    assert cache.features.variances["hidden.module:1.all"] > 0.0


def test_a_cache_in_another_process_is_found_by_its_path(cache: AnchorCache, points: Tensor) -> None:
    state = pickle.dumps(cache)
    moved(cache.path)
    with pytest.raises(AnchorCacheError, match="cannot be read any more"):
        pickle.loads(state).read([0])
    cache.path.with_name("elsewhere").rename(cache.path)
    assert torch.equal(pickle.loads(state).read([0]).inputs, points[:1])


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnchorCacheError, match="no such folder"):
        AnchorCache.open(tmp_path / "nowhere")
    with pytest.raises(AnchorCacheError, match="no such file"):
        AnchorCache.open(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(AnchorCacheError, match="not JSON"):
        AnchorCache.open(tmp_path)


def test_damaged_bytes_anywhere_never_crash(cache: AnchorCache) -> None:
    """Random damage to headers and manifest is refused, or harmless: never another exception, never a wrong shape."""
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for name in ["cache.json", "shard-00001.safetensors"] * 60:
        path = cache.path / name
        original = path.read_bytes()
        data = bytearray(original)
        head = min(len(data), 500)
        for _ in range(3):
            data[int(torch.randint(head, (), generator=generator))] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(data)
        try:
            damaged = AnchorCache.open(cache.path)
            assert damaged.read(range(50)).features["logprobs"].shape[0] == 50
            damaged.verify()
        except AnchorCacheError:
            refused += 1
        path.write_bytes(original)
    assert refused >= 100


def test_nothing_is_left_to_warn_of(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    """Files and folders are closed with the last who reads them; nobody is told of files left open."""
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = build(
            classifier, points.split(7), tmp_path / "c", shard_size=16, layers=("1",), progress=False, class_dim=-1
        )
        cache.read(range(50))
        cache.verify()
        del cache
        gc.collect()
    assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)] == []
    assert len(os.listdir("/dev/fd")) == before


def test_building_holds_few_descriptors(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variances are taken over all shards, of which there may be more than a process may have files."""
    from craft_optim.anchors import files as module

    most, opening = 0, module.OpenFile.__init__

    def counted(self: Any, *args: Any, **settings: Any) -> None:
        nonlocal most
        opening(self, *args, **settings)
        most = max(most, len(os.listdir("/dev/fd")))

    monkeypatch.setattr(module.OpenFile, "__init__", counted)
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    build(classifier, [points], tmp_path, shard_size=1, layers=("1",), progress=False, class_dim=-1)
    assert most <= before + 6


def test_file_descriptors_are_few(cache: AnchorCache, points: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from craft_optim.anchors import cache as module

    monkeypatch.setattr(module, "_MAX_OPEN", 2)
    for order in torch.randperm(50).split(5):
        assert torch.equal(cache.read(order).inputs, points[order])
        assert sum(opened(cache)) <= 2


def test_clips_of_images_may_differ_in_length(tmp_path: Path) -> None:
    """Padding is zero, also where zero is no byte's value."""
    batches = [
        {"clip": torch.randint(0, 256, (2, length, 3, 4, 4)) / 127.5 - 1.0, "valid": torch.ones(2, length)}
        for length in (2, 4, 3)
    ]
    model = nn.Linear(48, 5)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = model(batch["clip"].flatten(2))
        return out

    cache = build(model, batches, tmp_path, Reading(forward, "valid"), shard_size=4, class_dim=-1)
    assert stored_dtypes(tmp_path, "inputs.clip") == [torch.uint8, torch.uint8]
    inputs = cache.read([0, 3, 5]).inputs
    assert isinstance(inputs, dict)
    for row, (batch, length) in enumerate(zip(batches, (2, 4, 3), strict=True)):
        assert torch.equal(inputs["clip"][row, :length], batch["clip"][int(row != 0)])
        assert not bool(inputs["clip"][row, length:].any())
