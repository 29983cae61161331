"""Building: what is stored, what is refused, and what a kill leaves behind."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCache, AnchorCacheError, HiddenRetention, Reading, build

Batches = Callable[..., list[dict[str, Any]]]


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def dying(batches: list[Any], after: int) -> Iterator[Any]:
    yield from batches[:after]
    raise KeyboardInterrupt


def test_topk_keeps_the_likeliest_classes_and_the_rest(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    cache = build(classifier, [points], tmp_path, top_k=2, dtype=torch.float32)
    features = cache.read(range(50)).features
    with torch.no_grad():
        logprobs = classifier(points).log_softmax(-1)
    assert sorted(features) == ["rest_logprob", "topk_indices", "topk_logprobs"]
    assert features["topk_indices"].dtype == torch.int32
    order = logprobs.sort(-1, descending=True)
    assert torch.equal(features["topk_logprobs"], order.values[:, :2])
    assert torch.equal(features["topk_indices"].long(), order.indices[:, :2])
    torch.testing.assert_close(features["rest_logprob"].exp(), 1 - order.values[:, :2].exp().sum(-1))
    everything = build(classifier, [points], tmp_path / "all", top_k=4)
    assert "rest_logprob" not in everything.read([0]).features


def test_the_teacher_runs_as_a_retention_pass_does(noisy: Any, points: Tensor, tmp_path: Path) -> None:
    flags = [m.training for m in noisy.modules()]
    statistics, random = noisy.body[1].running_mean.clone(), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(points, batch_size=20, shuffle=True)  # draws random numbers itself
    cache = build(noisy, loader, tmp_path, dtype=torch.float32, class_dim=-1)
    assert [m.training for m in noisy.modules()] == flags
    assert torch.equal(noisy.body[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad and p.grad is None for p in noisy.parameters())
    inputs, features = cache.read(range(50))
    noisy.eval()
    torch.testing.assert_close(features["logprobs"], noisy(inputs).log_softmax(-1).detach())


def test_tensors_that_the_model_caches_serve_training_later(points: Tensor, tmp_path: Path) -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cached = nn.Linear(6, 3), None

        def forward(self, x: Tensor) -> Tensor:
            if self.cached is None:
                self.cached = torch.arange(3.0) + 1
            return self.linear(x) * self.cached

    model = Caching()
    build(model, [points], tmp_path, class_dim=-1)
    model(points).sum().backward()


def test_a_finished_cache_is_returned_without_running_the_model(noisy: Any, points: Tensor, tmp_path: Path) -> None:
    build(noisy, points.split(10), tmp_path, class_dim=-1)
    before, noisy.calls = contents(tmp_path), 0
    cache = build(noisy, points.split(10), tmp_path, class_dim=-1)
    assert noisy.calls == 0
    assert len(cache) == 50
    assert contents(tmp_path) == before


def test_other_anchors_for_a_finished_cache_are_pointed_out(
    classifier: nn.Module, points: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(classifier, points.split(10), tmp_path, class_dim=-1)
    with caplog.at_level(logging.WARNING, "craft_optim"):
        build(classifier, points.split(7), tmp_path, class_dim=-1)
        assert not caplog.records
        build(classifier, (points + 1).split(10), tmp_path, class_dim=-1)
    assert "overwrite=True if the anchors have changed" in caplog.text


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 2}, "features.logits is 'auto' there and 'top_k' here"),
        ({"dtype": torch.bfloat16}, "features.dtype is 'float16' there and 'bfloat16' here"),
        ({"layers": ("1",)}, "features.layers"),
        ({"shard_size": 8}, "shard_size is 16 there and 8 here"),
        ({"model_id": "b"}, "model_id is 'a' there and 'b' here"),
        ({"reading": Reading(autocast=torch.bfloat16)}, "features.autocast is None there and 'bfloat16' here"),
    ],
)
def test_a_folder_of_another_build_is_refused(
    classifier: nn.Module, points: Tensor, tmp_path: Path, change: dict[str, Any], words: str, half: bool
) -> None:
    settings: dict[str, Any] = {"shard_size": 16, "model_id": "a"}
    batches = list(points.split(10))
    if half:
        with pytest.raises(KeyboardInterrupt):
            build(classifier, dying(batches, 4), tmp_path, **settings, class_dim=-1)
    else:
        build(classifier, batches, tmp_path, **settings, class_dim=-1)
    before = contents(tmp_path)
    with pytest.raises(AnchorCacheError, match=f"{words}.*overwrite=True"):
        build(classifier, batches, tmp_path, **{**settings, **change}, class_dim=-1)
    assert contents(tmp_path) == before
    cache = build(classifier, batches, tmp_path, **{**settings, **change}, overwrite=True, class_dim=-1)
    fresh = build(classifier, batches, tmp_path / "fresh", **{**settings, **change}, class_dim=-1)
    (tmp_path / "fresh" / "x").touch()
    assert contents(fresh.path).keys() - {"x"} == {p.name for p in cache.path.iterdir() if p.is_file()}


def test_another_model_is_refused(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    build(classifier, [points], tmp_path, class_dim=-1)
    with torch.no_grad():
        classifier[0].weight.mul_(1.001)
    with pytest.raises(AnchorCacheError, match=r"other weights.*AnchorCache\.open"):
        build(classifier, [points], tmp_path, class_dim=-1)


# A shard holds 16 anchors, a batch 10: batches 2, 4, 5 and 7 complete shards.
@pytest.mark.parametrize("after", range(8))
def test_a_build_that_was_stopped_goes_on(noisy: Any, tmp_path: Path, after: int) -> None:
    batches = list(torch.randn(70, 6).split(10))
    whole = build(noisy, batches, tmp_path / "whole", shard_size=16, layers=("head",), class_dim=-1)
    noisy.calls = 0
    with pytest.raises(KeyboardInterrupt):
        build(noisy, dying(batches, after), tmp_path / "half", shard_size=16, layers=("head",), class_dim=-1)
    assert noisy.calls == after
    with pytest.raises(AnchorCacheError, match="no such file"):
        AnchorCache.open(tmp_path / "half")
    noisy.calls = 0
    torch.manual_seed(5)  # the state of the generators does not matter
    build(noisy, batches, tmp_path / "half", shard_size=16, layers=("head",), class_dim=-1)
    complete = after * 10 // 16 * 16
    assert noisy.calls == 7 - complete // 10
    assert contents(tmp_path / "half") == contents(whole.path)


def test_a_kill_between_a_shard_and_its_record(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    batches = list(points.split(10))
    whole = build(classifier, batches, tmp_path / "whole", shard_size=16, class_dim=-1)
    with pytest.raises(KeyboardInterrupt):
        build(classifier, dying(batches, 4), tmp_path / "half", shard_size=16, class_dim=-1)
    record = (tmp_path / "half" / "build.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        build(classifier, dying(batches, 5), tmp_path / "half", shard_size=16, class_dim=-1)
    (tmp_path / "half" / "build.json").write_bytes(record)  # a shard more than recorded
    build(classifier, batches, tmp_path / "half", shard_size=16, class_dim=-1)
    assert contents(tmp_path / "half") == contents(whole.path)
    (tmp_path / "half" / "build.json").write_bytes(record)  # and a kill right after the manifest
    assert len(build(classifier, batches, tmp_path / "half", shard_size=16, class_dim=-1)) == 50
    assert contents(tmp_path / "half") == contents(whole.path)


def test_other_batches_do_not_continue_a_build(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    batches = list(points.split(10))
    with pytest.raises(KeyboardInterrupt):
        build(classifier, dying(batches, 4), tmp_path, shard_size=16, class_dim=-1)
    for other in (batches[::-1], [b.double() for b in batches], [b[:, :5] for b in batches]):
        with pytest.raises((AnchorCacheError, ValueError), match="number 0 differs"):
            build(classifier, other, tmp_path, shard_size=16, class_dim=-1)
    cache = build(classifier, batches[::-1], tmp_path, shard_size=16, resume=False, class_dim=-1)
    assert torch.equal(cache.read(range(50)).inputs, torch.cat(batches[::-1]))


def test_a_damaged_record_is_refused(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(AnchorCacheError, match="resume=False"):
        build(classifier, [points], tmp_path, class_dim=-1)
    assert len(build(classifier, [points], tmp_path, resume=False, class_dim=-1)) == 50


def test_a_failing_disk_leaves_what_is_complete(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    batches, save, calls = list(points.split(10)), safetensors.torch.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(AnchorCacheError, match=r"shard-00002.*No space left.*GB left: make room.*goes on"):
        build(classifier, batches, tmp_path, shard_size=16, class_dim=-1)
    complete = [f"shard-0000{i}.{suffix}" for i in (0, 1) for suffix in ("json", "safetensors")]
    assert sorted(contents(tmp_path)) == ["build.json", *complete]
    assert len(build(classifier, batches, tmp_path, shard_size=16, class_dim=-1)) == 50
    assert len(calls) == 3 + 2


class Broken(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(6, 4), value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).clone()
        out[-1, 0] += self.value
        return out


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("settings", [{"class_dim": -1}, {"top_k": 2}, {"output": None, "layers": ("",)}])
def test_outputs_that_are_not_finite_are_refused(
    points: Tensor, tmp_path: Path, value: float, settings: dict[str, Any]
) -> None:
    if value == -torch.inf and "top_k" in settings:
        settings = {"top_k": 4}  # a class without mass is no obstacle where it is one of the others
        build(Broken(value), [points], tmp_path / "others", top_k=2)
    with pytest.raises(ValueError, match="not finite"):
        build(Broken(value), [points], tmp_path / "c", **settings)
    assert not contents(tmp_path / "c")


def test_outputs_beyond_the_storage_dtype_are_refused(points: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        build(Broken(1e5), [points], tmp_path, class_dim=-1)
    with pytest.raises(ValueError, match="bfloat16"):
        build(Broken(1e5), [points], tmp_path, output=None, layers=("",))
    build(Broken(1e5), [points], tmp_path, dtype=torch.bfloat16, class_dim=-1)


def test_anchors_without_valid_positions_are_refused(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    batches = token_batches((3, 6), (3, 6))
    batches[1]["attention_mask"][2] = 0
    with pytest.raises(ValueError, match=r"output's mask.*anchor 5"):
        build(llama, batches, tmp_path)
    with pytest.raises(ValueError, match=r"'all'.*anchor 5"):
        build(llama, batches, tmp_path, output=None, layers=(1,))
    build(llama, batches, tmp_path, Reading(mask=lambda batch: torch.ones_like(batch["input_ids"]).bool()))


def test_masks_come_from_names_functions_or_the_attention(
    llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    (batch,) = token_batches((4, 6))
    batch["answer"] = torch.arange(6).expand(4, 6) > 3

    def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    for mask, expected in (
        (None, batch["attention_mask"].bool()),
        ("answer", batch["answer"]),
        (lambda b: b["input_ids"] > 30, None),
    ):
        if expected is None:
            batch["input_ids"][:, 0] = 31
            expected = batch["input_ids"] > 30
        cache = build(llama, [batch], tmp_path, Reading(forward, mask), overwrite=True)
        features = cache.read(range(4)).features
        assert torch.equal(features["mask"], expected)
        assert features["logprobs"].shape == (int(expected.sum()), 60)  # nothing is kept of the others
    with pytest.raises(ValueError, match="'nothing'"):
        build(llama, [batch], tmp_path, Reading(forward, "nothing"), overwrite=True)
    with pytest.raises(ValueError, match="shape"):
        build(llama, [batch], tmp_path, Reading(forward, lambda b: torch.ones(4, 7)), overwrite=True)


def test_spans_of_a_vision_language_model(
    vlm: nn.Module, image_text_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    cache = build(
        vlm, image_text_batches, tmp_path, Reading(pooling={"image": "masked_mean", "text": "last"}),
        output=None, layers=(2, -1), dtype=torch.float32,
    )  # fmt: skip
    assert sorted(cache.features.variances) == ["hidden.2.image", "hidden.2.text", "hidden.3.image", "hidden.3.text"]
    inputs, features = cache.read(range(4))
    vlm.eval()
    hidden = vlm(**image_text_batches[0], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(features["hidden.2.image"], hidden[:, :4].mean(1))
    torch.testing.assert_close(features["hidden.2.text"], torch.stack([hidden[0, 5], *hidden[1:, 8]]))
    assert isinstance(inputs, dict)
    assert torch.equal(inputs["pixel_values"], image_text_batches[0]["pixel_values"])
    with pytest.raises(ValueError, match=r"'wrist'.*\['all', 'image', 'text'\]"):
        build(vlm, image_text_batches, tmp_path / "b", Reading(pooling={"wrist": "first"}), layers=(2,))


def test_custom_spans(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    batches = token_batches((4, 6))

    def spans(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"head": torch.arange(6).expand(4, 6) < 2}

    cache = build(
        llama, batches, tmp_path, Reading(spans=spans, pooling={"head": "masked_mean"}), output=None, layers=(1,),
        dtype=torch.float32,
    )  # fmt: skip
    llama.eval()
    hidden = llama(**batches[0], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(cache.read(range(4)).features["hidden.1.head"], hidden[:, :2].mean(1))
    with pytest.raises(ValueError, match="masks that fit"):
        build(
            llama, batches, tmp_path / "b", layers=(1,),
            reading=Reading(spans=lambda m, b: {"x": torch.ones(4, 5).bool()}, pooling={"x": "first"}),
        )  # fmt: skip


def test_feature_maps_and_vectors_are_pooled_as_they_can_be(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    x = torch.randn(6, 3, 4, 4)
    cache = build(model, [x], tmp_path, output=None, layers=("0", "1"), dtype=torch.float32)
    features = cache.read(range(6)).features
    with torch.no_grad():
        maps = model[0](x)
    torch.testing.assert_close(features["hidden.module:0.all"], maps.mean((2, 3)))
    assert torch.equal(features["hidden.module:1.all"], maps.flatten(1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": torch.float64}, "dtype"),
        ({"images": "jpeg"}, "'jpeg'"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 5}, "top_k=5, 4 classes"),
        ({"top_k": 2, "output": None, "layers": ("1",)}, "output=None"),
        ({"output": None}, "Nothing to cache"),
        ({"reading": Reading(lambda m, b: None)}, "NoneType"),
        ({"reading": Reading(lambda m, b: m(b)[:3])}, r"\(3, 4\)"),
    ],
)
def test_arguments_out_of_range_are_refused(
    classifier: nn.Module, points: Tensor, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(
            classifier,
            [points],
            tmp_path,
            **{"class_dim": None if "output" in settings else -1, **settings},
        )
    assert not contents(tmp_path)


def test_batches_that_do_not_fit_together_are_refused(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="yielded nothing"):
        build(classifier, [], tmp_path, class_dim=-1)
    for other in ((points,), points.double(), points.unsqueeze(1)):
        with pytest.raises(ValueError, match="same tensors"):
            build(classifier, [points, other], tmp_path, class_dim=-1)


def test_autocast_is_entered_and_recorded(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    cache = build(classifier, [points], tmp_path, Reading(autocast=torch.bfloat16), dtype=torch.float32, class_dim=-1)
    assert cache.features.autocast == "bfloat16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = classifier(points).float().log_softmax(-1)
    assert torch.equal(cache.read(range(50)).features["logprobs"], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert build(classifier, [points], tmp_path, dtype=torch.float32, class_dim=-1).features.autocast == "bfloat16"
        build(classifier, [points], tmp_path, dtype=torch.float32, overwrite=True, class_dim=-1)
        # weights that were cast without gradients are not reused with
        classifier(points).float().sum().backward()
    assert classifier[0].weight.grad is not None


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress_is_shown_on_request(
    classifier: nn.Module,
    points: Tensor,
    tmp_path: Path,
    with_tqdm: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with caplog.at_level(logging.INFO, "craft_optim"):
        build(classifier, points.split(10), tmp_path / "quiet", class_dim=-1)
        assert not capsys.readouterr().err
        assert "done" not in caplog.text
        build(classifier, points.split(10), tmp_path / "shown", progress=True, model_id="a teacher", class_dim=-1)
    shown = capsys.readouterr().err if with_tqdm else caplog.text
    assert "a teacher" in shown
    assert "50" in shown


class Tables(nn.Module):
    """Keeps what it has made for the longest batch so far, in the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 4)
        self.register_buffer("table", torch.zeros(0, 6), persistent=False)
        self.by_length: dict[int, Tensor] = {}
        self.last: tuple[Tensor, ...] = ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if len(self.table) < length:
            self.table = torch.linspace(0.5, 1.5, length).unsqueeze(1).expand(length, 6).contiguous()
        if length not in self.by_length:
            self.by_length[length] = torch.arange(length) / length + 0.5
        hidden = self.embedding(input_ids) * self.table[:length] * self.by_length[length].unsqueeze(1)
        self.last = (torch.ones_like(self.table),)
        out: Tensor = self.head(hidden * self.last[0][:length])
        return out


def test_what_a_model_keeps_from_the_teachers_pass_can_be_trained_with(token_batches: Batches, tmp_path: Path) -> None:
    model, batches = Tables(), token_batches((3, 5), (3, 7), (3, 9))
    batches = [{key: x % 20 for key, x in batch.items()} for batch in batches]
    build(model, batches, tmp_path, class_dim=-1)
    assert sorted(model.by_length) == [5, 7, 9]
    kept = [model.table, *model.by_length.values(), *model.last]
    assert not any(x.is_inference() for x in kept)
    for batch in batches:
        model(**batch).sum().backward()


def test_teachers_run_without_gradients(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        out: Tensor = model(batch)
        return out

    build(classifier, points.split(20), tmp_path, Reading(forward), class_dim=-1)
    assert seen == [False, False, False]


def test_layers_that_work_with_the_batch_second(tmp_path: Path) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1), 2, enable_nested_tensor=False)
    x = torch.randn(6, 5, 8)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch.transpose(0, 1))

    cache = build(
        model, x.split(4), tmp_path, Reading(forward, batch_dim=1), output=None, layers=("layers.0",),
        dtype=torch.float32,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        expected = model.layers[0](x.transpose(0, 1)).mean(0)
    features = cache.read(range(6)).features["hidden.module:layers.0.all"]
    torch.testing.assert_close(features, expected)
    model.train()
    retention = HiddenRetention(model, cache, 3)
    assert retention().item() < 1e-6
    with pytest.raises(ValueError, match="batch_dim=2"):
        build(model, [x], tmp_path / "b", Reading(batch_dim=2), class_dim=-1)


def test_the_bar_knows_how_many_are_left(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tqdm = pytest.importorskip("tqdm.auto")
    totals = []

    class Bar(tqdm.tqdm):  # type: ignore[misc, name-defined]
        def update(self, n: int = 1) -> Any:
            totals.append((self.total, self.n + n))
            return super().update(n)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    build(classifier, points.split(20), tmp_path / "a", progress=True, class_dim=-1)
    assert totals == [(60, 20), (60, 40), (50, 50)]
    totals.clear()
    build(classifier, (x for x in points.split(20)), tmp_path / "b", progress=True, class_dim=-1)
    assert totals == [(None, 20), (None, 40), (None, 50)]


def test_what_is_no_iterable_of_batches_is_refused(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    class Rows(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return len(points)

        def __getitem__(self, i: int) -> Tensor:
            return points[i]

    class Streamed(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(points.split(10))

    for given, words in (
        (torch.utils.data.TensorDataset(points), r"Found TensorDataset: it holds single examples.*DataLoader\(dataset"),
        (Rows(), "Found Rows: it holds single examples"),
        (points, r"Found Tensor: give it in parts, batches.split\(16\)"),
        ({"x": points}, r"Found dict: one batch is given as a list of one, \[batches\]"),
        ("prompts", "Found str"),
    ):
        with pytest.raises(TypeError, match=words):
            build(classifier, given, tmp_path, class_dim=-1)
        assert not contents(tmp_path)
    assert len(build(classifier, Streamed(), tmp_path, class_dim=-1)) == len(points)


@pytest.mark.parametrize("wrapped", [False, True])
def test_batches_with_labels_are_refused_with_the_way(
    wrapped: bool, classifier: nn.Module, points: Tensor, tmp_path: Path
) -> None:
    labels = torch.zeros(len(points))
    model: Any = classifier
    if wrapped:
        model = nn.Module()
        model.module, model.forward = classifier, lambda *args, **kwargs: classifier(*args, **kwargs)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points, labels), batch_size=10)
    with pytest.raises(TypeError, match=r"batch of 2 tensors: too many.*without labels.*batch: model\(batch\[0\]\)"):
        build(model, loader, tmp_path, class_dim=-1)
    with pytest.raises(TypeError, match=r"entries \['input', 'label'\]: got an unexpected.*model\(batch\['input'\]\)"):
        build(model, [{"input": points, "label": labels}], tmp_path, class_dim=-1)
    cache = build(model, loader, tmp_path, forward=lambda model, batch: model(batch[0]), class_dim=-1)
    assert abs(cache.retention(model, batch_size=8)().item()) < 1e-3


def test_a_type_error_of_the_models_own_stays(points: Tensor, tmp_path: Path) -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match=r"^of its own$"):
        build(Broken(6, 4), [points], tmp_path, class_dim=-1)
