"""Batches whose tensors are not [B, ...]: all pictures one long tensor, several per example, packed sequences."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim import CraftOptimizer, calibrate
from craft_optim.anchors import (
    AnchorCache,
    AnchorCacheError,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    Reading,
    Snapshot,
    build,
)

transformers = pytest.importorskip("transformers")
from pictures import END, IMAGE, START, Example, collate, examples, lengths, qwen  # noqa: E402


def batched(rows: list[Example], size: int) -> list[dict[str, Tensor]]:
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


READING = Reading(lengths=lengths)


@pytest.fixture
def cache(tmp_path: Path) -> AnchorCache:
    return build(qwen(), batched(examples(), 4), tmp_path / "anchors", READING, dtype=torch.float32, progress=False)


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.01)


def kl(teacher: nn.Module, model: nn.Module, rows: list[Example]) -> float:
    """One example after the other."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            p, q = (m.eval()(**collate([row])).logits.double().log_softmax(-1) for m in (teacher, model))
        total += float((p.exp() * (p - q)).sum())
        count += p.shape[1]
    return total / count


@pytest.mark.parametrize("kind", ["online", "cached", "opened"])
def test_it_begins_at_rounding_and_measures_the_right_drift(kind: str, cache: AnchorCache) -> None:
    model, rows = qwen(), examples()
    if kind == "online":
        retention: Any = OnlineRetention(model, rows, 4, collate=collate, teacher=Snapshot(model))
    else:  # the function is not needed again
        retention = LogitRetention(model, AnchorCache.open(cache.path) if kind == "opened" else cache, 4)
    assert abs(retention().item()) < 2e-6
    assert abs(retention.drift()) < 2e-6
    disturb(model)
    expected = kl(qwen(), model, rows)
    assert expected > 1e-3
    assert retention.drift() == pytest.approx(expected, rel=1e-3)
    assert retention.drift(batch_size=5) == pytest.approx(expected, rel=1e-3)
    retention().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "patch_embed" in name)
    assert len(retention.examples(3)) == 3


def test_what_is_read_is_what_was_given(cache: AnchorCache) -> None:
    rows = examples()
    for places in ([0], [1], [2, 0, 7, 5], [0, 3], range(12)):
        batch, expected = cache.read(places).inputs, collate([rows[i] for i in places])
        assert isinstance(batch, dict)
        assert list(batch) == list(expected)
        for name, x in expected.items():  # texts may be padded as they were when they were written
            assert torch.equal(batch[name][:, : x.shape[1]] if name in batch and x.ndim == 2 else batch[name], x), name
    told = cache.read([2, 0, 1]).lengths
    assert {name: x.tolist() for name, x in told.items()} == {
        name: [len(rows[i][name]) for i in (2, 0, 1)] for name in ("image_grid_thw", "pixel_values")
    }
    # on disk there is no padding
    patches = sum(len(row["pixel_values"]) for row in rows)
    assert cache.shards[0].entries["inputs.pixel_values"].shape == (patches, 24)
    assert ("inputs.pixel_values", "positions x 24", "float32") in cache.tensors()


def test_each_anchor_alone_has_its_drift(cache: AnchorCache) -> None:
    model, rows = qwen(), examples()
    retention = LogitRetention(model, cache, 4, strict=False)
    disturb(model)
    each = retention.drift_of_each(range(12), 5).each
    for place, drift in enumerate(each.tolist()):
        assert drift == pytest.approx(kl(qwen(), model, [rows[place]]), rel=1e-3, abs=1e-6)
    masked = LogitRetention(model, cache, 4, mask=lambda b: b["input_ids"] == IMAGE, strict=False)
    assert masked.drift() > 0


@pytest.mark.parametrize("shard_size", [1, 5, 256])
def test_a_stopped_build_goes_on_to_the_same_bytes(shard_size: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shard_size": shard_size, "progress": False, "layers": [1]}
    whole = build(qwen(), batched(examples(), 4), tmp_path / "whole", READING, **settings)

    def stops() -> Any:
        yield from batched(examples(), 4)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(qwen(), stops(), tmp_path / "stopped", READING, **settings)
    other = examples()
    other[0], other[1] = other[1], other[0]
    if shard_size < 256:
        with pytest.raises(AnchorCacheError, match="half built from other anchors"):
            build(qwen(), batched(other, 4), tmp_path / "stopped", READING, **settings)
    gone_on = build(qwen(), batched(examples(), 4), tmp_path / "stopped", READING, **settings)
    assert [s.sha256 for s in whole.shards] == [s.sha256 for s in gone_on.shards]
    assert build(qwen(), batched(examples(), 4), tmp_path / "whole", READING, **settings).path == whole.path
    model = qwen()
    assert abs(HiddenRetention(model, gone_on, 4)().item()) < 1e-5


@pytest.mark.parametrize("kind", ["online", "cached"])
def test_a_resumed_run_is_the_straight_one(kind: str, cache: AnchorCache) -> None:
    rows = examples(8, seed=5)

    def new() -> tuple[nn.Module, CraftOptimizer]:
        model = qwen()
        if kind == "online":
            retention: Any = OnlineRetention(model, examples(), 4, collate=collate, teacher=Snapshot(model))
        else:
            retention = LogitRetention(model, cache, 4)
        return model, CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), retention, epsilon=1e-3)

    def train(model: nn.Module, optimizer: CraftOptimizer, first: int, last: int) -> list[Tensor]:
        for step in range(first, last):
            batch = collate(rows[step % 4 : step % 4 + 4])
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    straight = new()
    expected = train(*straight, 0, 8)
    assert straight[1].metrics["retention_loss"] > 1e-4
    model, optimizer = new()
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = new()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert all(torch.equal(x, y) for x, y in zip(expected, train(model, optimizer, 4, 8), strict=True))


def test_two_processes_share_them(cache: AnchorCache) -> None:
    """As CraftOptimizer tells closures; building by several is that of any other batch."""
    model = qwen()
    disturb(model)
    losses = []
    for rank in range(2):
        for source in (cache, examples()):
            retention: Any = (
                LogitRetention(model, source, 3, strict=False)
                if isinstance(source, AnchorCache)
                else OnlineRetention(model, source, 3, collate=collate, teacher=qwen(), strict=False)
            )
            retention.shard(rank, 2)
            losses.append(retention().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[2] == pytest.approx(losses[3], rel=1e-3)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_a_cache_serves_online_retention_and_generation(cache: AnchorCache, tmp_path: Path) -> None:
    model = qwen()
    online = OnlineRetention(model, cache, 4, teacher=qwen())
    assert online().item() == 0.0
    reading = Reading(tokens=3, lengths=lengths)
    model.generation_config.suppress_tokens = [START, END, IMAGE, 31]  # type: ignore[union-attr]
    written = build(model, batched(examples(), 4), tmp_path / "tokens", reading, dtype=torch.float32, progress=False)
    assert set(written.kinds) == {"logits", "tokens"}
    for kind in written.kinds:
        assert written.retention(model, kind, 4)().item() < 1e-5
    assert (written.read(range(4)).features["mask"].sum(1) <= 3).all()


def test_calibrate_measures_on_them(cache: AnchorCache) -> None:
    model, rows = qwen(), examples(8, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(**collate(rows), labels=collate(rows)["input_ids"]).loss.backward()
        optimizer.step()

    for retention in (
        LogitRetention(model, cache, 4),
        OnlineRetention(model, examples(), 4, collate=collate, teacher=qwen()),
    ):
        found = calibrate(model, retention, train_step=step, steps=(2,), bfloat16=False)
        assert found.plain[0].drift > 1e-4
        assert found.overlap is None, "what belongs to which anchor is not told"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (lambda b: {}, r"same first dimension.*pass Reading\(lengths="),
        (
            lambda b: {**lengths(b), "pixel_values": [1, 2, 3, 4]},
            r"`lengths` must .* input 'pixel_values'. Found \[1, 2",
        ),
        (lambda b: {**lengths(b), "image_grid_thw": [-1, 1, 2, 1]}, r"input 'image_grid_thw'. Found \[-1"),
        (lambda b: {"pixel_values": lengths(b)["pixel_values"]}, "same first dimension"),
        (lambda b: {**lengths(b), "pixels": [1, 1, 1, 1]}, r"in all the 0 of input 'pixels'"),
        (lambda b: {name: x[:2] for name, x in lengths(b).items()}, r"`lengths` must"),
    ],
)
def test_lengths_that_do_not_add_up_are_refused(told: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build(qwen(), batched(examples(), 4), tmp_path / "anchors", Reading(lengths=told), progress=False)
    with pytest.raises(TypeError, match="`lengths` must be a function"):
        Reading(lengths=[3])  # type: ignore[arg-type]


@pytest.mark.parametrize("stopped", [False, True])
def test_batches_without_any_picture(stopped: bool, tmp_path: Path) -> None:
    rows = examples()
    ordered = [rows[i] for i in (1, 0, 3, 6, 9, 2)]  # in twos: with, without, with
    batches = [dict(sorted(batch.items())) for batch in batched(ordered, 2)]  # pictures before other inputs
    assert ["pixel_values" in batch for batch in batches] == [True, False, True]
    if stopped:

        def stops() -> Any:
            yield from batches[:2]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(qwen(), stops(), tmp_path, READING, shard_size=2, progress=False)
    cache = build(qwen(), batches, tmp_path, READING, shard_size=2, dtype=torch.float16, progress=False)
    for number, batch in enumerate(batches):
        assert list(cache.read([2 * number, 2 * number + 1]).inputs) == list(batch)
    model = qwen()
    retention = LogitRetention(model, cache, 2)
    assert all(abs(retention().item()) < 1e-4 for _ in range(3))
    disturb(model)
    assert retention.drift() == pytest.approx(kl(qwen(), model, ordered), rel=0.02)
    with pytest.raises(
        ValueError, match=r"`lengths` looks for 'image_grid_thw'.*begin with a batch that has every input"
    ):
        build(qwen(), batches[1:], tmp_path / "other", READING, progress=False)


# Others of the kind


def test_pictures_by_number_and_not_by_example(tmp_path: Path) -> None:
    """As LLaVA and Gemma 3 have them: `pixel_values` [pictures, 3, H, W], some examples with none or two."""

    class Llava(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.eye, self.head = nn.Embedding(40, 8), nn.Linear(48, 8), nn.Linear(8, 40)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
            hidden = self.words(input_ids)
            if pixel_values is not None:
                hidden = hidden.masked_scatter(input_ids.eq(IMAGE)[..., None], self.eye(pixel_values.flatten(1)))
            logits: Tensor = self.head(hidden.cumsum(1))
            return logits

    ids = torch.tensor(
        [[IMAGE, 1, 2, 0], [3, 4, 5, 6], [IMAGE, IMAGE, 7, 8], [IMAGE, 9, 1, 0], [2, 2, 2, 0], [5, 5, 0, 0]]
    )
    pictures = torch.randint(256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    numbers = (ids == IMAGE).sum(1)
    rows = [{"input_ids": x, "pixel_values": of} for x, of in zip(ids, pictures.split(numbers.tolist()), strict=True)]

    def joined(rows: list[Example]) -> dict[str, Tensor]:
        batch = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
        batch["attention_mask"] = batch["input_ids"].ne(0).long()
        flat = torch.cat([row["pixel_values"] for row in rows])
        return batch | ({"pixel_values": flat} if len(flat) else {})

    model = Llava()
    reading = Reading(lengths=lambda batch: {"pixel_values": (batch["input_ids"] == IMAGE).sum(1)})
    cache = build(model, [joined(rows[:3]), joined(rows[3:])], tmp_path, reading, dtype=torch.float32, progress=False)
    for retention in (
        LogitRetention(model, cache, 2),
        OnlineRetention(model, rows, 2, collate=joined, teacher=copy.deepcopy(model)),
    ):
        for _ in range(4):
            assert abs(retention().item()) < 1e-6
        assert abs(retention.drift(batch_size=1)) < 1e-6
    assert "pixel_values" not in cache.read([1, 4]).inputs, "as of a processor, where no example has a picture"


def test_packed_sequences_pass_through() -> None:
    """One row of tokens, and where its sequences begin: numbers and all."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.2,
        )
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(1, n)} for n in (4, 9, 6, 7)]
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def packing(rows: list[Example]) -> Any:
        return collator([{"input_ids": row["input_ids"].tolist()} for row in rows])

    retention = OnlineRetention(model, rows, 2, collate=packing, teacher=copy.deepcopy(model))
    assert retention().item() == 0.0
    assert {"input_ids", "position_ids", "cu_seq_lens_q", "max_length_q"} <= set(seen[-1])
    assert "labels" not in seen[-1]
    assert isinstance(seen[-1]["max_length_q"], int)
    assert len(seen[-1]["cu_seq_lens_q"]) == 3 != len(seen[-1]["input_ids"])
    before = copy.deepcopy(model)
    disturb(model)
    packed = {name: x for name, x in packing(rows).items() if name != "labels"}
    with torch.no_grad():
        p, q = (m.eval()(**packed).logits.double().log_softmax(-1) for m in (before, model))
    assert retention.drift(batch_size=4) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_objects_and_nested_lists_of_a_library_pass_through() -> None:
    class Graph:
        """Of nodes, as a graph library batches them; no mapping and no tuple."""

        def __init__(self, x: Tensor, edges: Tensor) -> None:
            self.x, self.edges = x, edges

        def to(self, device: torch.device) -> "Graph":
            moved.append(device)
            return Graph(self.x.to(device), self.edges.to(device))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 4)

        def forward(self, graph: Graph) -> Tensor:
            logits: Tensor = self.out(graph.x.index_add(0, graph.edges[1], graph.x[graph.edges[0]]))
            return logits[None]

    class Detector(Model):
        def forward(self, pictures: list[Tensor], targets: Any = None) -> Tensor:  # type: ignore[override]
            logits: Tensor = self.out(torch.stack([x.mean((1, 2)) for x in pictures]))
            return logits

    def one_graph(rows: list[Tensor]) -> Graph:
        x = torch.cat(rows)
        return Graph(x, torch.randint(len(x), (2, 7)))

    def ragged(rows: list[Tensor]) -> Any:
        return [x.expand(3, len(x), 3) for x in rows], [{"boxes": x} for x in rows]

    moved: list[torch.device] = []
    rows = [torch.randn(n, 3) for n in (2, 5, 3)]
    for model, joined in ((Model(), one_graph), (Detector(), ragged)):
        settings: dict[str, Any] = {"collate": joined, "reading": Reading(output="classes")}
        retention = OnlineRetention(model, rows, 3, teacher=copy.deepcopy(model), **settings)
        assert retention().item() == 0.0
        disturb(model)
        assert retention().item() > 1e-7
    assert moved
