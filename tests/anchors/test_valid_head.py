"""The vocabulary head at valid positions, beside the whole head."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from craft_optim.anchors import LogitRetention, OnlineRetention, build, losses
from craft_optim.anchors.features import Extractor
from craft_optim.anchors.pieces import HeadRows
from craft_optim.anchors.valid_head import LinearHead, head_agrees, head_at, head_left_out, linear_head

Batches = Callable[..., list[dict[str, Any]]]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gemma2() -> nn.Module:
    """Caps its logits."""
    transformers = pytest.importorskip("transformers")
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=0.5,
        )
    )


def lora_on_the_head(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return nn.DataParallel(model)  # without devices it only wraps


def assert_same_logits(found: Tensor, expected: Tensor, weights: list[Tensor], *, coarse: bool) -> None:
    """The same numbers, and gradients of the weights."""
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if coarse else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)
    mine, its = (torch.autograd.grad(x.float().square().mean(), weights, allow_unused=True) for x in (found, expected))
    for a, b in zip(mine, its, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance | {"atol": tolerance["atol"] * float(b.abs().max())}))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vlm", "gemma2", "lora"])
def test_the_head_runs_at_valid_positions_only(
    name: str,
    autocast: bool,
    request: pytest.FixtureRequest,
    token_batches: Batches,
    image_text_batches: list[dict[str, Tensor]],
) -> None:
    torch.manual_seed(0)
    model = gemma2() if name == "gemma2" else request.getfixturevalue("llama" if name == "lora" else name)
    model = (lora_on_the_head(model) if name == "lora" else model).eval()
    batch = image_text_batches[0] if name == "vlm" else token_batches((4, 9))[0]
    valid = batch["attention_mask"].bool().clone()
    valid[:, :4] = valid[3] = False
    given: list[tuple[int, ...]] = []
    weights = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with head_at(model, valid) as seen:
            (head,) = {m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings")} - {
                None
            }
            handle = head.register_forward_hook(lambda m, args, out: given.append(tuple(out.shape)))
            found = model(**batch).logits
        handle.remove()
        whole = model(**batch).logits
        assert head_agrees(model, batch, valid)
    assert seen.used
    assert found.shape == (1, int(valid.sum()), 60)
    assert given == [tuple(found.shape)]
    assert_same_logits(found[0], whole[valid], weights, coarse=autocast)
    assert hooks(head) == 0


class Head(nn.Module):
    """A model with one vocabulary head, and what models do with it."""

    def __init__(self, after: str = "") -> None:
        super().__init__()
        self.embedding, self.head, self.after = nn.Embedding(20, 8), nn.Linear(8, 20), after

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.after == "secret" else self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        if self.after == "functional":
            return nn.functional.linear(hidden, self.head.weight)
        if self.after == "flat":
            return self.head(hidden.flatten(0, 1)).unflatten(0, ids.shape)
        if self.after == "shorter":
            return self.head(hidden[:, 1:])
        logits = self.head(hidden)
        if self.after == "twice":
            return logits + self.head(hidden.flip(1)).flip(1)
        if self.after == "mixed":
            return logits - logits.mean(1, keepdim=True)
        if self.after == "last":
            return logits[:, -1]
        if self.after == "labels":
            nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return logits * 3.0


def test_a_head_that_cannot_be_run_at_some_positions_runs_at_all() -> None:
    torch.manual_seed(0)
    ids, valid = torch.randint(0, 20, (3, 5)), torch.rand(3, 5) > 0.5
    with head_at(Head(), valid) as head:
        assert not head.used  # not yet
        assert Head()(ids).shape == (3, 5, 20)  # another model
    assert not head.used
    for after in ("secret", "functional", "flat", "shorter"):
        model = Head(after)
        with head_at(model, valid) as head:
            assert torch.equal(model(ids), model(ids))
        assert not head.used
        assert not head_agrees(model, ids, valid)
    model = Head()
    for mask in (torch.ones_like(valid), torch.zeros_like(valid), valid.flatten(), valid[:, :4], valid[:2]):
        with head_at(model, mask) as head:
            assert model(ids).shape == (3, 5, 20)
        assert not head.used
    with head_at(nn.ModuleList([model, Head()]), valid) as head:
        assert model(ids).shape == (3, 5, 20)
    assert not head.used
    with head_at(model, valid) as head:
        model.head(model.embedding(ids).as_subclass(nn.Parameter))
    assert not head.used


def test_what_a_model_does_to_its_logits_is_found_out() -> None:
    torch.manual_seed(0)
    ids, valid = torch.randint(0, 20, (3, 5)), torch.rand(3, 5) > 0.5
    assert head_agrees(Head(), ids, valid)
    for after in ("twice", "mixed", "last", "labels"):
        assert not head_agrees(Head(after), ids, valid)
    model = Head("twice")
    with head_at(model, valid) as head, pytest.raises(RuntimeError, match="size of tensor"):
        model(ids)
    assert not head.used
    assert head.calls == 2
    assert hooks(model) == 0
    whole = Head("labels")
    with pytest.raises(IndexError):  # an error of the model's own is no answer
        head_agrees(whole, ids + 20, valid)


# -- a head that is left out -------------------------------------------------------------------------------------------


def small(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes | settings)
    made: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return made.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[float, float | None]]] = {
    "plain": (lambda: small("Llama"), (1.0, None)),
    "tied": (lambda: small("Llama", tie_word_embeddings=True), (1.0, None)),
    "bias": (lambda: small("Phi"), (1.0, None)),
    "capped": (gemma2, (1.0, 0.5)),
    "scaled": (lambda: small("Cohere"), (0.0625, None)),
    "divided": (lambda: small("Granite", logits_scaling=7.0), (1.0 / 7.0, None)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_head_computes_is_known(name: str, dtype: torch.dtype, autocast: bool, token_batches: Batches) -> None:
    torch.manual_seed(0)
    make, form = MODELS[name]
    model, batch = make().eval().to(dtype), token_batches((4, 9))[0]
    valid = batch["attention_mask"].bool().clone()
    valid[3] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        known = linear_head(model, batch)
        assert known is not None
        assert (known.scale, known.cap) == form
        with head_left_out(known, valid) as seen:
            assert model(**batch).logits.shape == (1, 0, 60)
        assert seen.used
        assert seen.shape == (4, 9)
        whole, found = model(**batch).logits, known.rows(seen).logits()
    assert found.shape == (int(valid.sum()), 60)
    weights = [p for p in model.parameters() if p.requires_grad]
    assert_same_logits(found.to(whole.dtype), whole[valid], weights, coarse=autocast or dtype == torch.bfloat16)
    assert hooks(known.head) == 0


def test_a_head_is_left_out_only_where_it_is_known_what_it_computes(token_batches: Batches) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 5))
    for after in ("secret", "functional", "flat", "twice", "mixed", "last", "labels"):
        assert linear_head(Head(after), ids) is None, after
    assert linear_head(Head(), ids) is None, "three times what the head gives, and nothing says so"
    model, batch = small("Llama"), token_batches((2, 5))[0]
    assert linear_head(model, batch) == LinearHead(model.get_output_embeddings())  # type: ignore[operator]
    assert linear_head(model, batch, forward=lambda m, x: m(**x).logits[..., :50]) is None
    assert linear_head(model, batch, forward=lambda m, x: m(**x).logits.log_softmax(-1)) is None
    # Of this batch these are the logits, of another they need not be
    allowed = batch["attention_mask"].unsqueeze(-1) > -1
    assert linear_head(model, batch, forward=lambda m, x: m(**x).logits.masked_fill(~allowed, -1e4)) is None
    assert linear_head(model, batch, forward=lambda m, x: m(**x).logits * allowed) is None
    assert linear_head(model, batch, forward=lambda m, x: m(**x).logits.clamp(-50.0, 50.0)) is None
    assert linear_head(model, batch, forward=lambda m, x: m(**x).logits.float()) is not None
    handle = model.lm_head.register_forward_hook(lambda *args: None)
    assert linear_head(model, batch) is None, "something else looks at its output"
    handle.remove()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert linear_head(model, batch) is None
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small("Llama"), peft.LoraConfig(target_modules=["lm_head"]))
    assert linear_head(adapted, batch) is None


def test_a_cap_that_small_logits_do_not_tell_is_not_guessed(token_batches: Batches) -> None:
    torch.manual_seed(0)
    model, batch = gemma2().eval().bfloat16(), token_batches((2, 5))[0]
    model.config.final_logit_softcapping = 30.0
    assert linear_head(model, batch) is None


class Largest(TorchDispatchMode):
    """The largest tensor of floating numbers that an operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.found = max(self.found, x.numel())
        return out


@pytest.mark.parametrize("top_k", ["all", 8])
def test_no_tensor_has_all_logits(top_k: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 classes: pieces are of 41 positions. Before, each pass had several tensors of all of them."""
    torch.manual_seed(0)
    classes, pieces = 100_000, 41
    model = small("Llama", tie_word_embeddings=True)
    model.resize_token_embeddings(classes)
    batch = {"input_ids": torch.randint(0, classes, (6, 20)), "attention_mask": torch.ones(6, 20).long()}
    batch["attention_mask"][:2, 15:] = 0
    built, extract = Largest(), Extractor.__call__

    def measured(*args: Any, **kwargs: Any) -> Any:
        with built:  # of this thread: the teacher has one of its own
            return extract(*args, **kwargs)

    monkeypatch.setattr(Extractor, "__call__", measured)
    cache = build(model, [batch], tmp_path, top_k=top_k, progress=False)
    kept = 110 * classes if top_k == "all" else 0  # in float16, in the cache
    probe = 20 * classes  # the one anchor on which the form of the head is found out
    assert 0 < built.found <= max(kept, pieces * classes, probe)
    retention = LogitRetention(model, cache, 6, strict=False, workers=0)
    retention()
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn_like(model.lm_head.weight)
    passed = Largest()
    with passed:
        found = retention()
        found.backward()
    assert 0 < passed.found <= max(pieces * classes, kept)
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    retention.position = 1
    assert retention._run is not None
    retention._run._linear = None  # the head at valid positions
    expected = retention()
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_that_logits_are_computed_as_a_whole_is_said(
    token_batches: Batches, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    with caplog.at_level(logging.INFO, "craft_optim"):
        build(small("Llama"), token_batches((4, 9)), tmp_path / "plain", progress=False)
        assert "computed as a whole" not in caplog.text
        adapted = peft.get_peft_model(small("Llama"), peft.LoraConfig(target_modules=["lm_head"]))
        build(adapted, token_batches((4, 9), (4, 7)), tmp_path / "adapted", progress=False)
    assert caplog.text.count("The logits are computed as a whole at the valid positions") == 1


def test_rows_are_of_the_weights_as_they_are_then() -> None:
    head = nn.Linear(8, 20)
    with head_left_out(LinearHead(head, 2.0), None) as seen:
        head(torch.ones(2, 3, 8))
    rows = LinearHead(head, 2.0).rows(seen)
    assert isinstance(rows, HeadRows)
    torch.testing.assert_close(rows.logits(), 2.0 * head(torch.ones(6, 8)))


@pytest.mark.parametrize("kind", ["adapters", "module", "context"])
def test_beside_a_teacher_that_runs_along(kind: str) -> None:
    """Both heads are left out, of a teacher as long as its weights are there when they are compared."""
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    classes, pieces = 100_000, 41
    model = small("Llama", vocab_size=classes, initializer_range=0.3)
    model.requires_grad_(False)
    frozen = copy.deepcopy(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    batch = {"input_ids": torch.randint(0, classes, (6, 20)), "attention_mask": torch.ones(6, 20).long()}
    batch["attention_mask"][:2, 15:] = 0
    anchors = [{name: x[i] for name, x in batch.items()} for i in range(6)]
    teacher = {"adapters": None, "module": frozen, "context": model.disable_adapter}[kind]
    retention = OnlineRetention(model, anchors, 6, teacher=teacher)
    for _ in range(2):  # in the second the teacher's is left out, too
        assert retention().item() == 0.0, "to the bit"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.5 * torch.randn_like(p)
    passed = Largest()
    with passed:
        found = retention()
        found.backward()
    bound = 120 * classes if kind == "context" else pieces * classes
    assert 0 < passed.found <= bound
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        its = frozen(**batch).logits[valid]
    expected = losses.kl_divergence(model(**batch).logits[valid], its)
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
