"""Activation checkpointing changes memory, not what a pass over anchors gives, dropout and early exit included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craft_optim.anchors import capture, passes
from craft_optim.anchors.valid_head import head_at

Batches = Callable[..., list[dict[str, Any]]]

reentrant_or_not = pytest.mark.parametrize("reentrant", [False, True])


def checkpointing(model: nn.Module, reentrant: bool) -> list[int]:
    """Turns it on; the returned list has the number of the layer of every run of one."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    runs: list[int] = []
    for number, layer in enumerate(capture.find_decoder(model).layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    return runs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def loss_of(model: nn.Module, batch: dict[str, Tensor], layers: tuple[Any, ...], output: bool) -> Tensor:
    result, hidden = capture.run(model, batch, layers=layers, output=output)
    terms = [x.float().square().mean() for x in hidden.values()]
    return torch.stack(terms + ([result.logits.float().square().mean()] if output else [])).sum()


@reentrant_or_not
@pytest.mark.parametrize(("layers", "output"), [((), True), ((1, 2), False), ((3,), False), ((2,), True)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_without_it(
    name: str,
    layers: tuple[int, ...],
    output: bool,
    reentrant: bool,
    request: pytest.FixtureRequest,
    token_batches: Batches,
) -> None:
    model = request.getfixturevalue(name)
    (batch,) = token_batches((3, 8))
    batch["use_cache"] = False
    model.eval()
    loss_of(model, batch, layers, output).backward()
    expected = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    runs = checkpointing(model.train(), reentrant)
    with passes.steady(model) as remember:
        loss = remember(loss_of(model, batch, layers, output))
    ran = len(runs)
    loss.backward()
    assert set(runs[:ran]) <= set(runs[ran:])  # once more in the backward
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


@reentrant_or_not
def test_a_tap_within_a_checkpoint(reentrant: bool, llama: nn.Module, token_batches: Batches) -> None:
    """A reentrant one runs it without gradients: its drift could be measured, but not held."""
    (batch,) = token_batches((2, 6))
    checkpointing(llama, reentrant)
    with passes.steady(llama) as remember:
        if reentrant:
            with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp' is computed without .*use_reentrant"):
                loss_of(llama, batch, ("model.layers.1.mlp",), False)
            with torch.no_grad():  # the teacher
                loss_of(llama, batch, ("model.layers.1.mlp",), False)
            return
        remember(loss_of(llama, batch, ("model.layers.1.mlp",), False)).backward()
    found = {n: g.clone() for n, g in gradients(llama).items()}
    llama.zero_grad()
    llama.gradient_checkpointing_disable()
    loss_of(llama.eval(), batch, ("model.layers.1.mlp",), False).backward()
    for key, gradient in gradients(llama).items():
        torch.testing.assert_close(found.pop(key), gradient)
    assert not found


def test_reentrant_with_frozen_embeddings_needs_inputs_that_require_gradients(
    llama: nn.Module, token_batches: Batches
) -> None:
    """A known trap of torch's: without them nothing within the checkpoints gets a gradient."""
    (batch,) = token_batches((2, 6))
    llama.requires_grad_(False)
    llama.model.layers[0].self_attn.q_proj.requires_grad_(True)
    loss_of(llama.eval(), batch, (2,), False).backward()
    expected = {n: g.clone() for n, g in gradients(llama).items()}
    llama.zero_grad()
    checkpointing(llama.train(), True)
    hooks = llama.get_input_embeddings()._forward_hooks
    by_itself = dict(hooks)  # transformers 5 makes them require gradients
    hooks.clear()
    warns = pytest.warns(UserWarning, match="requires_grad")
    with passes.steady(llama), warns, pytest.raises(ValueError, match="Layer 2 is computed without"):
        loss_of(llama, batch, (2,), False)
    hooks.update(by_itself)
    if not by_itself:
        llama.enable_input_require_grads()
    with passes.steady(llama) as remember:
        remember(loss_of(llama, batch, (2,), False)).backward()
    found = gradients(llama)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


@reentrant_or_not
def test_the_head_at_valid_positions(reentrant: bool, llama: nn.Module, token_batches: Batches) -> None:
    (batch,) = token_batches((2, 6))
    valid = torch.zeros(2, 6, dtype=torch.bool)
    valid[0, 2] = valid[1, 3:5] = True
    llama.eval()(**batch).logits[valid].square().mean().backward()
    expected = {n: g.clone() for n, g in gradients(llama).items()}
    llama.zero_grad()
    checkpointing(llama.train(), reentrant)
    with passes.steady(llama) as remember, head_at(llama, valid) as head:
        loss = remember(llama(**batch, use_cache=False).logits.square().mean())
    assert head.used
    loss.backward()
    for key, gradient in gradients(llama).items():
        torch.testing.assert_close(gradient, expected.pop(key))
    assert not expected


@reentrant_or_not
def test_a_head_within_a_checkpoint_runs_everywhere(reentrant: bool, llama: nn.Module, token_batches: Batches) -> None:
    """Its second run, in the backward, would be another: the first is left as it is."""
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") and not reentrant:
        pytest.skip("this torch does not tell: the backward raises CheckpointError")
    (batch,) = token_batches((2, 6))
    embeddings = llama.get_input_embeddings()(batch["input_ids"])
    with passes.steady(llama) as remember, head_at(llama, batch["attention_mask"].bool()) as head:
        logits = checkpoint(lambda x: llama(inputs_embeds=x).logits, embeddings, use_reentrant=reentrant)
        loss = remember(logits.square().mean())
    assert not head.used
    assert logits.shape == (2, 6, 60)
    loss.backward()
