"""Caches in the layouts of the earlier implementations: what is in them comes over bit for bit, and no code runs.

The writers below mirror the original builders: file names, keys, dtypes, and how each value is computed.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from craft_optim.anchors import AnchorCache, AnchorCacheError, HiddenRetention, Reading
from craft_optim.anchors.importers import convert

PROMPT = 6  # tokens, padding included
DIM = 5
DEPTH = 18  # decoder layers


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(count: int, seed: int) -> dict[str, Tensor]:
    """Frames in [-1, 1] and prompts of 3 to 6 tokens, padded on the right, as `prepare_teacher_inputs` has them."""
    lengths = torch.arange(count) % 4 + 3
    mask = (torch.arange(PROMPT) < lengths[:, None]).long()
    return {
        "pixel_values": torch.rand(count, 3, 8, 8, generator=generator(seed)) * 2.0 - 1.0,
        "input_ids": torch.randint(3, 60, (count, PROMPT), generator=generator(seed)) * mask,
        "attention_mask": mask,
    }


def write_shards(folder: Path, shards: list[dict[str, Any]], metadata: dict[str, Any], **save: Any) -> None:
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"shard_{i:04d}.pt", **save)
    (folder / "metadata.json").write_text(json.dumps({"num_shards": len(shards), "shard_size": 3, **metadata}))


def write_tokens(folder: Path, sizes: tuple[int, ...] = (3, 2), **save: Any) -> list[dict[str, Any]]:
    """eggplantsalt-CRaFT d363f4f, src/lerobot/scripts/build_anchor_cache.py."""
    shards: list[dict[str, Any]] = []
    for i, size in enumerate(sizes):
        x = prompts(size, i)
        generated = torch.randint(3, 60, (size, 4), generator=generator(10 + i))
        generated[0, 2] = 1  # EOS
        labels = torch.full((size, PROMPT + 4), -100)
        labels[:, PROMPT:] = generated
        labels[0, PROMPT + 3 :] = -100  # after the EOS
        shards.append(
            {
                "pixel_values": x["pixel_values"],
                "input_ids": torch.cat([x["input_ids"], generated], 1),
                "attention_mask": torch.cat([x["attention_mask"], torch.ones_like(generated)], 1),
                "labels": labels,
                "prompts": ["Grasp the item"] * size,
            }
        )
    metadata = {
        "num_anchors": sum(sizes),
        "max_new_tokens": 4,
        "prompts": ["Grasp the item"],
        "image_keys": ["observation.images.top"],
        "policy_pretrained_path": "physical-intelligence/pi0-fast",
        "dataset_repo_id": "lerobot/aloha_sim_insertion_human",
        "seed": 42,
    }
    write_shards(folder, shards, metadata, **save)
    return shards


def write_states(folder: Path, asked: tuple[int, ...] = (-3, -2), sizes: tuple[int, ...] = (3, 2)) -> list[Any]:
    """eggplantsalt-CRaFT 9e78dc8, src/lerobot/scripts/build_anchor_cache.py."""
    actual = [DEPTH + k + 1 if k < 0 else k + 1 for k in asked]  # into `hidden_states`
    shards: list[dict[str, Any]] = []
    for i, size in enumerate(sizes):
        meta = {
            "layers_to_save": [k - 1 for k in actual],
            "num_vision_tokens": 256,
            "num_text_tokens": PROMPT + 1,
            "pooling_strategy": {"vision": "mean", "text": "last"},
            "hidden_dim": DIM,
            "n_vecs": 2,
        }
        hidden = torch.randn(size, len(asked), 2, DIM, generator=generator(20 + i))
        shards.append({**prompts(size, i), "teacher_hidden": hidden, "meta": meta, "prompts": ["Grasp"] * size})
    metadata = {
        "num_anchors": sum(sizes),
        "layers_to_save": list(asked),
        "policy_pretrained_path": "physical-intelligence/pi0-fast",
        "cache_type": "hidden_state_anchoring",
    }
    write_shards(folder, shards, metadata)
    return shards


def write_features(
    folder: Path,
    pooling: str = "mean_image_tokens",
    dtype: torch.dtype = torch.float16,
    layer: int = -2,
    sizes: tuple[int, ...] = (3, 2),
    features: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """eggplantsalt-CRaFT 9782dbe, src/lerobot/scripts/build_anchor_hidden_cache.py."""
    shards: list[dict[str, Any]] = []
    for i, size in enumerate(sizes):
        x = prompts(size, i)
        pooled = torch.randn(size, DIM, generator=generator(30 + i)) if features is None else features(x)
        meta = {"hidden_layer": layer, "pooling": pooling, "dtype": str(dtype).removeprefix("torch.")}
        shards.append({**x, "target_features": pooled.to(dtype), "meta": meta})
    metadata = {"teacher_policy_path": "physical-intelligence/pi0-fast", "num_samples": sum(sizes), "pooling": pooling}
    write_shards(folder, shards, metadata)
    return shards


def write_records(folder: Path, pooling: str = "mean_image_tokens", fused: bool = True) -> list[dict[str, Any]]:
    """craft4090 f520e92, vla-scripts/build_anchor_hidden_cache.py, of batches of 2 with 4 image tokens."""
    folder.mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for i, lengths in enumerate([(5, 3), (4, 4), (6, 2)]):
        ids = [torch.randint(3, 60, (length,), generator=generator(i)) for length in lengths]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=32000)
        attended = pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in ids], batch_first=True)
        image_token_mask = torch.zeros(2, input_ids.shape[1] + 4, dtype=torch.bool)
        image_token_mask[:, 1:5] = True
        for row in range(2):
            pixels = torch.randn(3, 8, 8, generator=generator(40 + 2 * i + row)).half()
            model_inputs = {
                "input_ids": input_ids[row],
                "attention_mask": attended[row],
                "multimodal_indices": torch.tensor([0]),
                "image_token_mask": image_token_mask[row],
                "pixel_values": {"dino": pixels, "siglip": pixels * 2} if fused else pixels,
            }
            meta = {"layer": -2, "pooling": pooling, "dtype": "float16", "teacher": "openvla-7b", "split": "train"}
            target = torch.randn(DIM, generator=generator(50 + 2 * i + row)).half()
            records.append({"model_inputs": model_inputs, "target_features": target, "meta": meta})
    meta = {"schema_version": 1, "retention_mode": "hidden", "pooling": pooling, "hidden_layer": -2, "dtype": "float16"}
    for i in range(2):  # shards end within a batch
        shard = {"records": records[i * 3 : i * 3 + 3], "meta": meta}
        torch.save(shard, folder / f"hidden_anchor_shard_{i:06d}.pt")
    return records


def rows(cache: AnchorCache) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs, features = cache.read(range(len(cache)))
    assert isinstance(inputs, dict)
    return inputs, features


def joined(shards: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([shard[name] for shard in shards])


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


def assert_inputs_of(cache: AnchorCache, shards: list[dict[str, Any]]) -> None:
    inputs, _ = rows(cache)
    assert list(inputs) == ["pixel_values", "input_ids", "attention_mask"]
    for name, x in inputs.items():
        assert_same(x, joined(shards, name))


@pytest.mark.parametrize("zipped", [True, False])
def test_tokens_stand_where_their_logits_are(tmp_path: Path, zipped: bool) -> None:
    shards = write_tokens(tmp_path / "old", sizes=(4, 1), _use_new_zipfile_serialization=zipped)
    cache = convert(tmp_path / "old", tmp_path / "new")
    assert_inputs_of(cache, shards)
    assert cache.model_id == "physical-intelligence/pi0-fast"
    old, mask, features = joined(shards, "labels"), joined(shards, "attention_mask"), rows(cache)[1]
    new = torch.full_like(old, -100).masked_scatter(features["mask"], features["tokens"].long())
    expected = torch.full_like(old, -100)
    for row in range(len(old)):
        for here, following in pairwise(mask[row].nonzero().flatten().tolist()):
            expected[row, here] = old[row, following]
    assert_same(new, expected)
    assert torch.equal(new[new != -100], old[old != -100])  # none is lost
    # Without padding it is the shift that Hugging Face's models do, and with it the prompt's end gives the first token
    assert mask.all(1).tolist() == [False, False, False, True, False]
    assert new[3].tolist() == [*old[3, 1:].tolist(), -100]
    first, *others = old[4, PROMPT:].tolist()
    assert new[4].tolist() == [-100, -100, first, -100, -100, -100, *others, -100]


def test_states_of_several_layers(tmp_path: Path) -> None:
    shards = write_states(tmp_path / "old")
    cache = convert(tmp_path / "old", tmp_path / "new")
    assert_inputs_of(cache, shards)
    assert cache.features.layers == (16, 17)  # hidden_states[-3] and [-2] of 19
    assert cache.features.pooling == {"image": "masked_mean", "text": "last"}
    assert cache.features.dtype == "float32"
    hidden, features = joined(shards, "teacher_hidden"), rows(cache)[1]
    for i, layer in enumerate((16, 17)):
        for j, span in enumerate(("image", "text")):
            assert_same(features[f"hidden.{layer}.{span}"], hidden[:, i, j])


def test_states_after_the_final_norm_need_its_name(tmp_path: Path) -> None:
    shards = write_states(tmp_path / "old", asked=(-2, -1))
    with pytest.raises(AnchorCacheError, match=r"final norm.*layers=\[17, '<name>'\]"):
        convert(tmp_path / "old", tmp_path / "new")
    cache = convert(tmp_path / "old", tmp_path / "new", layers=[17, "model.norm"])
    assert_same(rows(cache)[1]["hidden.module:model.norm.text"], joined(shards, "teacher_hidden")[:, 1, 1])
    with pytest.raises(ValueError, match=r"`layers` must be as many as .* 2\. Found \[17\]"):
        convert(tmp_path / "old", tmp_path / "other", layers=[17])


def test_states_counted_from_the_front(tmp_path: Path) -> None:
    write_states(tmp_path / "old", asked=(3, 0))  # outputs of layers 3 and 0
    assert convert(tmp_path / "old", tmp_path / "new").features.layers == (4, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("pooling", "span", "mode"),
    [
        ("mean_image_tokens", "image", "masked_mean"),
        ("mean_masked", "all", "masked_mean"),
        ("last_token", "all", "last"),
        ("cls_token", "all", "first"),
    ],
)
def test_features_of_one_layer(tmp_path: Path, pooling: str, span: str, mode: str, dtype: torch.dtype) -> None:
    shards = write_features(tmp_path / "old", pooling, dtype)
    cache = convert(tmp_path / "old", tmp_path / "new")
    assert_inputs_of(cache, shards)
    assert (cache.features.layers, cache.features.pooling) == ((-2,), {span: mode})
    features = rows(cache)[1]
    assert_same(features[f"hidden.-2.{span}"], joined(shards, "target_features"))
    if span == "all":
        assert_same(features.pop("span.all"), joined(shards, "attention_mask").bool())
    assert list(features) == [f"hidden.-2.{span}"]


@pytest.mark.parametrize(("layer", "name"), [(1, None), (-2, 2), (-2, None), (-1, "model.norm")])
def test_layers_are_those_of_hugging_face(llama: nn.Module, tmp_path: Path, layer: int, name: int | str | None) -> None:
    def forward(model: nn.Module, x: dict[str, Tensor], **kwargs: Any) -> Any:
        return model(input_ids=x["input_ids"], attention_mask=x["attention_mask"], **kwargs)

    def pooled(x: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = forward(llama.eval(), x, output_hidden_states=True).hidden_states[layer]
        mask = x["attention_mask"].unsqueeze(-1).float()
        return (hidden * mask).sum(1) / (mask.sum(1) + 1e-9)

    write_features(tmp_path / "old", "mean_masked", torch.float32, layer, features=pooled)
    cache = convert(tmp_path / "old", tmp_path / "new", layers=None if name is None else [name])
    retention = HiddenRetention(llama, cache, batch_size=5, reading=Reading(forward))
    assert retention.drift() < 1e-6
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert retention.drift() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pooling", ["mean_image_tokens", "mean_masked"])
def test_records_one_by_one(tmp_path: Path, pooling: str, fused: bool) -> None:
    records = write_records(tmp_path / "old", pooling, fused)
    cache = convert(tmp_path / "old", tmp_path / "new")
    assert (len(cache), cache.model_id, cache.features.layers) == (6, "openvla-7b", (-2,))
    pixels = ["pixel_values.dino", "pixel_values.siglip"] if fused else ["pixel_values"]
    assert cache.structure.names == (*pixels, "input_ids", "attention_mask")
    span = "image" if pooling == "mean_image_tokens" else "all"
    for i, record in enumerate(records):
        inputs, features = cache.read([i])
        assert isinstance(inputs, dict)
        given = record["model_inputs"]
        flat = {f"pixel_values.{k}": x for k, x in given["pixel_values"].items()} if fused else given
        for name, x in inputs.items():
            assert_same(x[0], {**given, **flat}[name])
        assert_same(features[f"hidden.-2.{span}"][0], record["target_features"])
        attended = given["attention_mask"]
        expanded = torch.cat([attended[:1], torch.ones(4, dtype=torch.bool), attended[1:]])
        assert_same(features[f"span.{span}"][0], given["image_token_mask"] if span == "image" else expanded)


class Trap:
    """Unpickled as code is, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(tmp_path: Path, zipped: bool) -> None:
    shards = write_tokens(tmp_path / "old")
    trapped, trap = tmp_path / "old/shard_0001.pt", tmp_path / "sprung"
    torch.save({**shards[1], "extra": Trap(trap)}, trapped, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AnchorCacheError, match=r"shard_0001\.pt.*running code.*save its tensors"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not trap.exists()
    assert not (tmp_path / "new").exists()
    torch.load(trapped, weights_only=False)
    assert trap.exists()  # it would have gone off


def change(folder: Path, file: str, **values: Any) -> None:
    """Replaces entries of a file's dict; None removes them."""
    path = folder / file
    data = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)
    data = {key: value for key, value in {**data, **values}.items() if value is not None}
    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    else:
        torch.save(data, path)


def cut(path: Path, parts: int) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // parts])


NORM = {"hidden_layer": -1, "pooling": "mean_image_tokens"}
BROKEN: list[tuple[Callable[[Path], Any], Callable[[Path], Any], str]] = [
    (write_tokens, lambda f: cut(f / "shard_0001.pt", 2), r"shard_0001\.pt.*damaged.*copy it again"),
    (write_tokens, lambda f: (f / "shard_0000.pt").write_bytes(b""), r"shard_0000\.pt.*damaged"),
    (write_tokens, lambda f: (f / "shard_0001.pt").unlink(), r"metadata\.json.*num_shards=2.*make that 1.*missing"),
    (write_tokens, lambda f: change(f, "metadata.json", num_anchors=6), r"num_anchors=6.*make that 5"),
    (write_tokens, lambda f: change(f, "metadata.json", num_samples=4), r"num_samples=4.*make that 5"),
    (write_tokens, lambda f: (f / "metadata.json").unlink(), r"metadata\.json.*missing"),
    (write_tokens, lambda f: (f / "metadata.json").write_text("{"), r"metadata\.json.*JSON"),
    (write_tokens, lambda f: (f / "metadata.json").write_text("[1]"), r"metadata\.json.*JSON object"),
    (write_tokens, lambda f: change(f, "shard_0001.pt", labels=None), r"shard_0001\.pt.*none of 'records'"),
    (write_tokens, lambda f: torch.save([1], f / "shard_0001.pt"), r"shard_0001\.pt.*a list, none of 'records'"),
    (write_tokens, lambda f: change(f, "shard_0000.pt", input_ids=None), r"tensor 'input_ids'.*Found NoneType"),
    (write_tokens, lambda f: change(f, "shard_0000.pt", input_ids=torch.ones(2, 10)), r"same number.*'input_ids': 2"),
    (write_tokens, lambda f: change(f, "shard_0000.pt", labels=torch.ones(3, 9)), r"'labels' \(3, 9\) do not fit"),
    (write_tokens, lambda f: change(f, "shard_0000.pt", labels=torch.ones(3)), r"'labels' of 2 dim.*shape \(3,\)"),
    (write_tokens, lambda f: change(f, "shard_0001.pt", target_features=torch.ones(2, 5)), r"meta\['pooling'\]"),
    (write_states, lambda f: change(f, "shard_0000.pt", meta=None), r"layers_to_save.*Pass `layers=`"),
    (write_states, lambda f: change(f, "metadata.json", layers_to_save=[-2]), r"layers_to_save.*Pass `layers=`"),
    (write_states, lambda f: change(f, "shard_0000.pt", teacher_hidden=torch.ones(3, 2, 9, 5)), r"\(3, 2, 9, 5\)"),
    (write_features, lambda f: change(f, "shard_0000.pt", meta={"pooling": "cls_token"}), r"'hidden_layer'.*layers="),
    (write_features, lambda f: change(f, "shard_0001.pt", meta={**NORM, "pooling": "max"}), r"Found 'max'"),
    (
        write_features,
        lambda f: change(f, "shard_0001.pt", meta=NORM),
        r"shard_0001\.pt.*final norm.*layers=\['<name>'\]",
    ),
    (write_features, lambda f: change(f, "shard_0001.pt", target_features=torch.full((2, 5), torch.inf)), r"finite"),
    (
        write_features,
        lambda f: change(f, "shard_0001.pt", meta={"hidden_layer": 1, "pooling": "mean_image_tokens"}),
        r"shard_0001\.pt.*layers \[1\].*shard_0000\.pt.*layers \[-2\].*one cache in one folder",
    ),
    (write_features, lambda f: write_records(f), r"features.*records|records.*features"),
    (write_records, lambda f: change(f, "hidden_anchor_shard_000000.pt", records=[]), r"at least one"),
    (write_records, lambda f: change(f, "hidden_anchor_shard_000000.pt", records=[3]), r"record 0 .*'model_inputs'"),
    (write_records, lambda f: change(f, "hidden_anchor_shard_000000.pt", meta=None), r"'pooling'.*Found None"),
    (lambda f: f.mkdir(), lambda f: None, r"no \.pt files.*Check the path"),
]


@pytest.mark.parametrize(("write", "damage", "message"), BROKEN)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, write: Callable[[Path], Any], damage: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / "old")
    damage(tmp_path / "old")
    with pytest.raises(AnchorCacheError, match=message) as caught:
        convert(tmp_path / "old", tmp_path / "new")
    assert str(tmp_path / "old") in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_records_that_differ_are_refused(tmp_path: Path) -> None:
    records = write_records(tmp_path / "old")
    for change_one, message in [
        (lambda r: r["model_inputs"].pop("image_token_mask"), "same tensors"),
        (lambda r: r.update(target_features=torch.ones(2, 5)), r"record 1 must have a tensor 'target_features'"),
        (lambda r: r["model_inputs"].update(image_token_mask=torch.ones(2)), r"record 1 is shorter"),
        (lambda r: r.update(target_features=torch.full((5,), torch.nan)), r"not all finite"),
    ]:
        one = {**records[1], "model_inputs": dict(records[1]["model_inputs"])}
        change_one(one)
        change(tmp_path / "old", "hidden_anchor_shard_000000.pt", records=[records[0], one])
        with pytest.raises(AnchorCacheError, match=message):
            convert(tmp_path / "old", tmp_path / "new")


def test_prompts_are_left_out_and_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokens(tmp_path / "old")
    with caplog.at_level("INFO", logger="craft_optim"):
        convert(tmp_path / "old", tmp_path / "new")
    assert "prompts are left out" in caplog.text


def test_another_cache_is_not_written_over(tmp_path: Path) -> None:
    write_tokens(tmp_path / "old")
    write_records(tmp_path / "records")
    convert(tmp_path / "old", tmp_path / "new")
    with pytest.raises(AnchorCacheError):
        convert(tmp_path / "records", tmp_path / "new")
    assert len(convert(tmp_path / "records", tmp_path / "new", overwrite=True)) == 6


def test_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shards = write_tokens(tmp_path / "old", sizes=(1, 1))
    for name in ("shard_0000.pt", "shard_0001.pt"):
        (tmp_path / "old" / name).unlink()
    torch.save(shards[0], tmp_path / "old/shard_9999.pt")
    torch.save(shards[1], tmp_path / "old/shard_10000.pt")
    assert_inputs_of(convert(tmp_path / "old", tmp_path / "new"), shards)


def test_a_token_without_an_attended_one_before_it_has_no_place(tmp_path: Path) -> None:
    write_tokens(tmp_path / "old")
    ids = torch.tensor([[7, 8, 9, 4]])
    shard = {"pixel_values": torch.zeros(1, 3, 8, 8), "input_ids": ids, "labels": ids.clone()}
    for attended, tokens in [([1, 1, 1, 1], [8, 9, 4]), ([0, 1, 0, 1], [4]), ([1, 1, 1, 0], [8, 9])]:
        torch.save({**shard, "attention_mask": torch.tensor([attended])}, tmp_path / "old/shard_0001.pt")
        change(tmp_path / "old", "metadata.json", num_anchors=4)
        cache = convert(tmp_path / "old", tmp_path / "new", overwrite=True)
        assert cache.read([3]).features["tokens"].tolist() == tokens
