"""Taps, spans and pooling on unmodified models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import capture

Batches = Callable[..., list[dict[str, Any]]]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_numbers_are_the_residual_stream(name: str, request: pytest.FixtureRequest, token_batches: Batches) -> None:
    model = request.getfixturevalue(name).eval()
    (batch,) = token_batches((3, 8))
    reference = model(**batch, output_hidden_states=True).hidden_states
    of_the_library = hooks(model)
    layers = capture.resolve_layers(model, (0, 1, -2, -1))
    assert layers == (0, 1, 2, 3)
    output, hidden = capture.run(model, batch, layers=layers)
    assert torch.equal(output.logits, model(**batch).logits)
    for k in range(3):
        assert torch.equal(hidden[k], reference[k])
    decoder = capture.find_decoder(model)
    assert torch.equal(decoder.norm(hidden[3]), reference[3])  # the model's own last one is after the norm
    assert not torch.allclose(hidden[3], reference[3])
    assert hooks(model) == of_the_library


def test_a_vision_language_model_is_tapped_in_its_language_model(
    vlm: nn.Module, image_text_batches: list[dict[str, Tensor]]
) -> None:
    vlm.eval()
    batch = image_text_batches[0]
    reference = vlm(**batch, output_hidden_states=True).hidden_states
    assert "language_model" in capture.find_decoder(vlm).name
    _, hidden = capture.run(vlm, batch, layers=(1, 2), output=False)
    assert torch.equal(hidden[1], reference[1])
    assert torch.equal(hidden[2], reference[2])
    spans = capture.default_spans(vlm, batch)
    assert sorted(spans) == ["all", "image", "text"]
    assert spans["image"].sum(1).tolist() == [4, 4, 4, 4]
    assert spans["text"].sum(1).tolist() == [2, 5, 5, 5]
    assert not bool((spans["image"] & spans["text"]).any())
    assert torch.equal(spans["image"] | spans["text"], spans["all"])


def test_a_forward_ends_at_the_deepest_tap(llama: nn.Module, token_batches: Batches) -> None:
    llama.eval()
    (batch,) = token_batches((2, 7))
    calls: list[str] = []
    watched = {"head": llama.lm_head, **{f"layer {i}": layer for i, layer in enumerate(llama.model.layers)}}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)) for name, module in watched.items()
    ]
    output, whole = capture.run(llama, batch, layers=(1, 0))
    assert output is not None
    assert calls == ["layer 0", "layer 1", "layer 2", "head"]
    calls.clear()
    output, part = capture.run(llama, batch, layers=(1, 0), output=False)
    assert output is None
    assert calls == ["layer 0", "layer 1"]
    for handle in handles:
        handle.remove()
    for k in (0, 1):
        assert torch.equal(whole[k], part[k])
    assert torch.isfinite(llama(**batch).logits).all()  # the model still works


def test_a_module_is_tapped_by_name(classifier: nn.Module, points: Tensor) -> None:
    output, hidden = capture.run(classifier, points, layers=("1", "2"))
    assert torch.equal(hidden["2"], output)
    assert torch.equal(hidden["1"], torch.tanh(classifier[0](points)))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    x = torch.randn(2, 3, 6)
    model = Pair()
    _, hidden = capture.run(model, x, layers=("rnn",))  # the first of what it returns
    assert torch.equal(hidden["rnn"], model(x))


@pytest.mark.parametrize("stop", [False, True])
def test_gradients_are_those_of_the_forward(llama: nn.Module, token_batches: Batches, stop: bool) -> None:
    """With and without activation checkpointing, which runs the hooked modules twice."""
    (batch,) = token_batches((2, 7))
    llama.eval()
    reference = llama(**batch, output_hidden_states=True).hidden_states[2]
    reference.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in llama.named_parameters() if p.grad is not None}
    for checkpointing in (False, True):
        llama.zero_grad()
        if checkpointing:
            llama.gradient_checkpointing_enable()
            llama.train()
            for layer in llama.model.layers:
                layer.self_attn.eval()  # dropout of the attention weights
        before = torch.randn(3, requires_grad=True)
        _, hidden = capture.run(llama, batch, layers=(2,), output=not stop)
        # no saved-tensor hook of a forward that was left is still on the stack
        saved = before.exp()
        assert saved.grad_fn._saved_result.data_ptr() == saved.data_ptr()
        hidden[2].square().sum().backward()
        found = {n: p.grad for n, p in llama.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def test_the_first_firing_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    model, x = Twice(), torch.randn(3, 2)
    _, hidden = capture.run(model, x, layers=("inner",))
    assert torch.equal(hidden["inner"], model.inner(x))


@pytest.mark.parametrize("output", [True, False])
def test_hooks_are_removed_after_an_exception(llama: nn.Module, token_batches: Batches, output: bool) -> None:
    (batch,) = token_batches((2, 7))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = llama.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        capture.run(llama, batch, layers=(0, 2), output=output)
    handle.remove()
    assert hooks(llama) == 0
    with pytest.raises(ValueError, match="no module"):
        capture.resolve_layers(llama, ("model.nothing",))


def test_models_that_catch_exceptions_are_left_all_the_same(classifier: nn.Module, points: Tensor) -> None:
    reached = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        try:
            out: Tensor = model(x)
        except Exception:
            out = torch.zeros(1)
        reached.append(True)
        return out

    _, hidden = capture.run(classifier, points, forward=forward, layers=("0",), output=False)
    assert torch.equal(hidden["0"], classifier[0](points))
    assert not reached


def test_a_tap_that_is_never_reached_is_an_error(classifier: nn.Module, points: Tensor) -> None:
    with pytest.raises(ValueError, match=r"never reached layers \['2'\]"):
        capture.run(classifier, points, forward=lambda model, x: model[0](x), layers=("0", "2"))
    assert hooks(classifier) == 0


def test_layers_that_do_not_exist_are_refused(llama: nn.Module, classifier: nn.Module) -> None:
    assert capture.resolve_layers(llama, (-4, "lm_head")) == (0, "lm_head")
    with pytest.raises(ValueError, match=r"\[-4, 3\].*Found 4"):
        capture.resolve_layers(llama, (4,))
    with pytest.raises(ValueError, match="comes twice"):
        capture.resolve_layers(llama, (3, -1))
    with pytest.raises(TypeError, match="True"):
        capture.resolve_layers(llama, (True,))
    with pytest.raises(ValueError, match="names of modules"):
        capture.resolve_layers(classifier, (0,))
    both = nn.ModuleDict({"a": llama, "b": classifier, "c": type(llama)(llama.config)})
    with pytest.raises(ValueError, match=r"'a\.model', 'c\.model'"):
        capture.find_decoder(both)


# -- the head at valid positions ---------------------------------------------------------------------------------------


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
        with capture.head_at(model, valid) as packed:
            (head,) = {m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings")} - {
                None
            }
            handle = head.register_forward_hook(lambda m, args, out: given.append(tuple(out.shape)))
            found = model(**batch).logits
        handle.remove()
        whole = model(**batch).logits
        assert capture.head_packs(model, batch, valid)
    assert packed.used
    assert found.shape == (1, int(valid.sum()), 60)
    assert given == [tuple(found.shape)]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found[0], whole[valid], **tolerance)
    expected = torch.autograd.grad(whole[valid].float().square().mean(), weights, allow_unused=True)
    gradients = torch.autograd.grad(found.float().square().mean(), weights, allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance | {"atol": tolerance["atol"] * float(b.abs().max())}))
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


def test_a_head_that_cannot_pack_runs_everywhere() -> None:
    torch.manual_seed(0)
    ids, valid = torch.randint(0, 20, (3, 5)), torch.rand(3, 5) > 0.5
    with capture.head_at(Head(), valid) as packed:
        assert not packed.used  # not yet
        assert Head()(ids).shape == (3, 5, 20)  # another model
    assert not packed.used
    for after in ("secret", "functional", "flat", "shorter"):
        model = Head(after)
        with capture.head_at(model, valid) as packed:
            assert torch.equal(model(ids), model(ids))
        assert not packed.used
        assert not capture.head_packs(model, ids, valid)
    model = Head()
    for mask in (torch.ones_like(valid), torch.zeros_like(valid), valid.flatten(), valid[:, :4], valid[:2]):
        with capture.head_at(model, mask) as packed:
            assert model(ids).shape == (3, 5, 20)
        assert not packed.used
    with capture.head_at(nn.ModuleList([model, Head()]), valid) as packed:
        assert model(ids).shape == (3, 5, 20)
    assert not packed.used
    with capture.head_at(model, valid) as packed:
        model.head(model.embedding(ids).as_subclass(nn.Parameter))
    assert not packed.used


def test_what_a_model_does_to_its_logits_is_found_out() -> None:
    torch.manual_seed(0)
    ids, valid = torch.randint(0, 20, (3, 5)), torch.rand(3, 5) > 0.5
    assert capture.head_packs(Head(), ids, valid)
    for after in ("twice", "mixed", "last", "labels"):
        assert not capture.head_packs(Head(after), ids, valid)
    model = Head("twice")
    with capture.head_at(model, valid) as packed, pytest.raises(RuntimeError, match="size of tensor"):
        model(ids)
    assert not packed.used
    assert packed.calls == 2
    assert hooks(model) == 0
    whole = Head("labels")
    with pytest.raises(IndexError):  # an error of the model's own is no answer
        capture.head_packs(whole, ids + 20, valid)


def reference_pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    rows = []
    for states, valid in zip(hidden.double(), mask, strict=True):
        kept = [state for state, use in zip(states, valid.tolist(), strict=True) if use]
        rows.append(
            {"masked_mean": sum(kept) / len(kept), "first": kept[0], "last": kept[-1]}.get(mode, states.mean(0))
        )
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["masked_mean", "first", "last", "mean"])
def test_pooling_matches_the_reference(mode: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 9, 3).to(dtype)
    mask = torch.zeros(5, 9, dtype=torch.bool)
    mask[0] = True
    mask[1, 4] = True
    mask[2, :6] = True  # padded on the right
    mask[3, 3:] = True  # padded on the left
    mask[4, [2, 5, 6]] = True  # an offset and a hole
    pooled = capture.pool(hidden, mask, mode)
    expected = reference_pool(hidden, mask, mode)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-6)
    if mode in ("mean", "masked_mean"):
        assert pooled.dtype == torch.float32
    everything = torch.ones_like(mask)
    torch.testing.assert_close(
        capture.pool(hidden, None, mode).double(), reference_pool(hidden, everything, mode), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["masked_mean", "first", "last"])
def test_nothing_outside_of_a_span_matters(mode: str) -> None:
    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    hidden[~mask] = torch.nan
    pooled = capture.pool(hidden, mask, mode)
    assert bool(pooled.isfinite().all())
    hidden = hidden.nan_to_num().requires_grad_()
    capture.pool(hidden, mask, mode).sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[~mask] == 0).all())
    assert bool((hidden.grad[mask] != 0).any())


def test_pooling_refuses_what_it_does_not_know() -> None:
    assert capture.pool(torch.ones(1, 2, 3), None, "none").shape == (1, 2, 3)
    with pytest.raises(ValueError, match="'median'"):
        capture.pool(torch.ones(1, 2, 3), None, "median")
    with pytest.raises(ValueError, match="mask"):
        capture.pool(torch.ones(1, 2, 3), torch.ones(1, 4).bool(), "first")


def test_feature_maps_have_positions() -> None:
    maps = torch.randn(2, 5, 3, 4)
    assert torch.equal(capture.positions(maps)[1, 7], maps[1, :, 1, 3])
    with pytest.raises(ValueError, match="must be"):
        capture.positions(torch.ones(2, 3, 4, 5, 6))


def test_positions_may_come_first() -> None:
    states, maps = torch.randn(7, 2, 5), torch.randn(2, 5, 3, 4)
    assert torch.equal(capture.positions(states, batch_dim=1)[1, 6], states[6, 1])
    assert capture.positions(states) is states
    for hidden, batch_dim in ((maps, 1), (states[0], 1), (states, 2), (states, -1)):
        with pytest.raises(ValueError, match=f"batch_dim={batch_dim}"):
            capture.positions(hidden, batch_dim=batch_dim)
