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
