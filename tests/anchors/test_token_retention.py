"""The teacher's own words: generated greedily, kept with the positions that count, and held."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim.anchors import AnchorCacheError, AnchorMismatchError, LogitRetention, Reading, TokenRetention, build
from craft_optim.anchors.generation import greedy
from craft_optim.anchors.importers import write_cache
from craft_optim.anchors.manifest import FeatureSpec

Batches = Callable[..., list[dict[str, Any]]]
STOP = 7


def step_by_step(model: nn.Module, prompt: Tensor, count: int, stop: int = STOP, **others: Tensor) -> list[int]:
    """Greedy decoding of one unpadded prompt, by whole forwards."""
    ids, written = prompt.unsqueeze(0), []
    types = torch.zeros_like(ids)
    model.eval()
    for _ in range(count):
        extra = dict(others, token_type_ids=types) if others else {}
        with torch.no_grad():
            token = int(model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, -1].argmax())
        written.append(token)
        if token == stop:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        types = torch.cat([types, torch.ones(1, 1, dtype=types.dtype)], 1)
    model.train()
    return written


def stopping(model: nn.Module) -> nn.Module:
    """With an end-of-sequence token that comes up now and then."""
    model.generation_config.eos_token_id = STOP
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tokens_are_those_of_greedy_decoding(
    name: str, side: str, token_batches: Batches, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = stopping(request.getfixturevalue(name))
    batches = token_batches((4, 7), (3, 5))
    prompts = [row[mask.bool()] for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
    for _ in range(9):
        endless = [step_by_step(model, prompt, 6, stop=-1) for prompt in prompts]
        if any(len(set(said)) > 1 for said in endless):
            break
        for p in model.parameters():  # random models of some versions say one token for ever
            nn.init.normal_(p, std=0.5)
    for stop in (token for said in endless for token in said):  # one that the model does say in some of its answers
        expected = [said[: said.index(stop) + 1] if stop in said else said for said in endless]
        if len(set(map(len, expected))) > 1:
            break
    assert len(set(map(len, expected))) > 1, "some stop early and some do not"
    model.generation_config.eos_token_id = stop
    if side == "left":
        for batch in batches:
            order = batch["attention_mask"].sort(dim=1, stable=True).indices
            batch.update({key: x.gather(1, order) for key, x in batch.items()})
    cache = build(model, batches, tmp_path, Reading(tokens=6), shard_size=3, class_dim=-1)
    inputs, features = cache.read(range(7))
    for row, (prompt, said) in enumerate(zip(prompts, expected, strict=True)):
        length = len(prompt) + len(said)
        assert inputs["input_ids"][row, :length].tolist() == prompt.tolist() + said
        assert inputs["attention_mask"][row].nonzero().flatten().tolist() == list(range(length))
        # the logits before each generated token, and no others
        counted = list(range(len(prompt) - 1, length - 1))
        assert features["mask"][row].nonzero().flatten().tolist() == counted
    said = [token for tokens in expected for token in tokens]
    assert features["tokens"].tolist() == said
    assert features["logprobs"].shape == (len(said), 60)
    assert model.training
    again = build(model, batches, tmp_path, Reading(tokens=6), shard_size=3, class_dim=-1)  # finished: nothing runs
    assert len(again) == 7


def test_a_vision_language_model_sees_its_answer_as_it_gave_it(
    vlm: nn.Module, image_text_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    if pytest.importorskip("transformers").__version__.startswith("4."):
        pytest.skip("a PaliGemma of transformers 4 attends otherwise to a prompt with its answer")
    stopping(vlm)
    cache = build(vlm, image_text_batches[:1], tmp_path, Reading(tokens=4), output=None, dtype=torch.float32)
    inputs, features = cache.read(range(4))
    batch = image_text_batches[0]
    said = []
    for row in range(4):
        mask = batch["attention_mask"][row].bool()
        said += step_by_step(vlm, batch["input_ids"][row][mask], 4, pixel_values=batch["pixel_values"][row : row + 1])
    assert features["tokens"].tolist() == said
    assert torch.equal(inputs["pixel_values"], batch["pixel_values"])
    retention = TokenRetention(vlm, cache, 4)
    assert abs(retention().item()) < 1e-4


def test_the_loss_is_the_cross_entropy_beyond_the_teachers(
    llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"dtype": torch.float32, "output": None}
    cache = build(llama, token_batches((6, 7), (4, 5)), tmp_path, Reading(tokens=5), **settings)
    retention = TokenRetention(llama, cache, 10)
    assert retention().item() == pytest.approx(0.0, abs=1e-6)
    assert retention.drift() == pytest.approx(0.0, abs=1e-6)
    inputs, features = cache.read(range(10))
    llama.eval()
    with torch.no_grad():
        before = llama(**inputs).logits[features["mask"]]
        for p in llama.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        after = llama(**inputs).logits[features["mask"]]
    llama.train()
    tokens = features["tokens"].long()
    expected = F.cross_entropy(after, tokens) - F.cross_entropy(before, tokens)
    assert abs(expected) > 0.05
    assert retention.drift(batch_size=3) == pytest.approx(float(expected), rel=1e-4)
    loss = retention()
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in llama.parameters())


def test_one_cache_serves_distributions_and_tokens(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    cache = build(llama, token_batches((6, 7)), tmp_path, Reading(tokens=5), top_k=4)
    assert cache.describe() == (
        "6 anchors with 30 positions, the top 4 of 60 classes and tokens (greedy, at most 5) as float16"
    )
    for kind in (TokenRetention, LogitRetention):
        assert abs(kind(llama, cache, 6)().item()) < 1e-3


def test_a_resumed_build_does_not_generate_again(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    batches, calls = token_batches((4, 7), (4, 5), (4, 6)), []
    inner = greedy(3)

    def generate(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(model, batch)

    with pytest.raises(KeyboardInterrupt):
        build(llama, batches, tmp_path / "half", Reading(tokens=generate), shard_size=4)
    other = [{key: x.flip(0) for key, x in batch.items()} for batch in batches]
    with pytest.raises(AnchorCacheError, match="number 0 differs"):
        build(llama, other, tmp_path / "half", Reading(tokens=generate), shard_size=4)
    build(llama, batches, tmp_path / "half", Reading(tokens=generate), shard_size=4)
    assert len(calls) == 4, "the batches of the two complete shards are not continued a second time"
    whole = build(llama, batches, tmp_path / "whole", Reading(tokens=generate), shard_size=4)
    for name in ("cache.json", "shard-00000.safetensors", "shard-00002.safetensors"):
        assert (tmp_path / "half" / name).read_bytes() == (whole.path / name).read_bytes()


def test_imported_tokens_are_checked_by_what_the_model_would_say(
    llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    inputs, labels = greedy(4)(llama.eval(), token_batches((6, 7))[0])
    llama.train()
    cache = write_cache(tmp_path / "good", [(inputs, {"labels": labels})], FeatureSpec())
    retention = TokenRetention(llama, cache, 6)
    loss = retention().item()
    with torch.no_grad():
        logits = llama.eval()(**inputs).logits
    llama.train()
    assert loss == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-5)
    wrong = torch.where(labels == -100, labels, (labels + 1) % 60)
    with pytest.raises(AnchorMismatchError, match="only 0% are the ones"):
        TokenRetention(llama, write_cache(tmp_path / "wrong", [(inputs, {"labels": wrong})], FeatureSpec()), 6)()


@pytest.mark.parametrize(
    ("token", "error", "words"),
    [
        (60, AnchorMismatchError, "gives logits of 60 classes, the tokens in .* go up to 60"),
        (2**31 - 1, AnchorMismatchError, "go up to 2147483647"),
        (-1, AnchorCacheError, "tokens must name classes from 0"),
        (-99, AnchorCacheError, "tokens must name classes from 0"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(
    token: int, error: type[Exception], words: str, llama: nn.Module, token_batches: Batches, tmp_path: Path
) -> None:
    """The model has 60. On an accelerator they would cost the process its context, or not count without a word."""
    (inputs,) = token_batches((4, 7))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 5
    labels[2, -1] = token
    cache = write_cache(tmp_path / "anchors", [(inputs, {"labels": labels})], FeatureSpec())
    retention = TokenRetention(llama, cache, 4, strict=False)
    with pytest.raises(error, match=words):
        retention()


def test_what_cannot_be_is_refused(
    llama: nn.Module, classifier: nn.Module, points: Tensor, token_batches: Batches, tmp_path: Path
) -> None:
    batches = token_batches((4, 7))
    with pytest.raises(ValueError, match="tokens=0"):
        build(llama, batches, tmp_path / "a", Reading(tokens=0))
    with pytest.raises(ValueError, match="exclude each other"):
        build(llama, batches, tmp_path / "b", Reading(tokens=3, mask="attention_mask"))
    with pytest.raises(ValueError, match=r"needs a decoder with `generate`.*Sequential"):
        build(classifier, [points], tmp_path / "c", Reading(tokens=3), class_dim=-1)
    with pytest.raises(ValueError, match="'other'"):
        build(llama, [{**batches[0], "other": batches[0]["input_ids"]}], tmp_path / "d", Reading(tokens=3))
    with pytest.raises(ValueError, match=r"needs a cache with tokens.*full logits"):
        TokenRetention(llama, build(llama, batches, tmp_path / "e"), 2)
