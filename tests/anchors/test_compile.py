"""A pass over anchors through a compiled model; training's compiled code does not notice."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from craft_optim.anchors import capture, frozen, passes
from craft_optim.anchors.valid_head import head_at

dynamo = pytest.importorskip("torch._dynamo.testing")

HOWS = ["wrapped", "in place", "method", "by block"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.drop(self.linear(self.norm(x)).tanh()), 0.3, self.training)


class Stack(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.checkpointing = nn.Linear(8, 5), checkpointing

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


def compiled(model: nn.Module, how: str, backend: Any) -> nn.Module:
    if how == "wrapped":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "method":
        model.forward = torch.compile(model.forward, backend=backend)
    else:
        for block in model.blocks:
            block.compile(backend=backend)
    return model


def trained(how: str, backend: Any = "aot_eager", **settings: Any) -> tuple[nn.Module, Stack, Tensor]:
    """A model that has been through a step, the same model as written, and inputs of the shape it was compiled for."""
    torch.manual_seed(0)
    model, plain, x = Stack(**settings), Stack(**settings), torch.randn(2, 4, 8)
    plain.load_state_dict(model.state_dict())
    model = compiled(model, how, backend)
    model(x).sum().backward()
    model.zero_grad()
    return model, plain, x


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("output", [True, False])
def test_taps_fire_and_nothing_is_compiled_for_them(how: str, output: bool) -> None:
    counter = dynamo.CompileCounterWithBackend("aot_eager")
    model, plain, x = trained(how, counter)
    frames = counter.frame_count
    assert frames
    name = "blocks.1"
    for inputs in (x, torch.randn(3, 7, 8)):
        with passes.steady(model):
            logits, hidden = capture.run(model, inputs, layers=(name,), output=output)
        expected, taps = capture.run(plain.eval(), inputs, layers=(name,))
        assert torch.equal(hidden[name], taps[name])
        assert not output or torch.equal(logits, expected)
    model(x).sum().backward()
    assert counter.frame_count == frames


@pytest.mark.parametrize("how", HOWS)
def test_without_taps_it_stays_compiled_once_per_mode(how: str) -> None:
    counter = dynamo.CompileCounterWithBackend("aot_eager")
    model, plain, x = trained(how, counter)
    task = counter.frame_count
    plain.eval()

    def round_() -> None:
        with passes.steady(model) as remember:
            logits = model(x)
            loss = remember(logits.square().mean())
        torch.testing.assert_close(logits, plain(x))  # no dropout: no drift
        loss.backward()
        with torch.no_grad(), passes.steady(model):
            torch.testing.assert_close(model(x), plain(x))
        once, again = model(x), model(x)
        assert not torch.equal(once, again)  # dropout
        once.sum().backward()

    round_()
    assert task < counter.frame_count <= 3 * task
    with torch._dynamo.config.patch(error_on_recompile=True):
        round_()
    model.zero_grad()
    with passes.steady(model) as remember:
        remember(model(x).square().mean()).backward()
    plain(x).square().mean().backward()
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.parametrize("how", HOWS)
def test_a_repeated_forward_in_the_backward_is_not_compiled_either(how: str) -> None:
    """Blocks that are compiled within their checkpoints keep other tensors than as they are written."""
    model, plain, x = trained(how, checkpointing=True)
    for output in (False, True):
        for each in (model, plain):
            each.zero_grad()
            with passes.steady(each) as remember:
                logits, hidden = capture.run(each, x, layers=("blocks.1",), output=output)
                loss = remember(hidden["blocks.1"].square().mean() + (logits.square().mean() if output else 0.0))
            loss.backward()
        for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
            assert (parameter.grad is None) == (reference.grad is None)
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, reference.grad)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(x).sum().backward()  # the compiled ones, as before
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_the_stance_is_back_after_an_exception() -> None:
    model, _, x = trained("by block", checkpointing=True)

    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    with pytest.raises(RuntimeError, match="in force_eager"), passes.steady(model), passes.eager():
        stops(stance())
    assert stance() == "default"
    with passes.steady(model) as remember:
        _, hidden = capture.run(model, x, layers=("blocks.1",))
        loss = remember(hidden["blocks.1"].square().mean())
    fail = model.blocks[0].linear.register_forward_pre_hook(lambda *_: stops(stance()))
    with pytest.raises(RuntimeError, match="in force_eager"):
        loss.backward()
    fail.remove()
    del loss, remember, hidden
    assert stance() == "default"


def stops(stance: str) -> None:
    raise RuntimeError(f"in {stance}")


@pytest.mark.parametrize("how", HOWS)
def test_the_head_and_frozen_modules_of_a_compiled_model(how: str) -> None:
    model, plain, x = trained(how)
    valid = torch.zeros(2, 4, dtype=torch.bool)
    valid[0, 1:3] = valid[1, 3] = True
    with passes.steady(model):
        model(x)  # now it is compiled for this mode, without hooks
    with passes.steady(model), head_at(model, valid) as head:
        found = model(x)
    assert head.used
    torch.testing.assert_close(found[0], plain.eval()(x)[valid])
    first = model.get_submodule("_orig_mod.blocks.0" if how == "wrapped" else "blocks.0").requires_grad_(False)
    with passes.steady(model):
        model(x)
    ran: list[bool] = []
    first.linear.register_forward_pre_hook(lambda *_: ran.append(True))
    with torch._dynamo.config.patch(error_on_recompile=True), passes.steady(model):
        with frozen.recorded(model, ["blocks.0"]) as calls:
            whole = model(x)
        assert ran
        ran.clear()
        with frozen.replayed(model, frozen.leaves(calls, 2), frozen.forms_of(calls)):
            assert torch.equal(model(x), whole)
    assert not ran


def test_a_compiled_language_model_has_no_drift(
    llama: nn.Module, token_batches: Callable[..., list[dict[str, Any]]]
) -> None:
    (batch,) = token_batches((3, 8))
    counter = dynamo.CompileCounter()
    model = torch.compile(llama, backend=counter)
    model(**batch)
    frames = []
    for _ in range(2):
        with passes.steady(model):
            inside = model(**batch).logits
            _, hidden = capture.run(model, batch, layers=(1,), output=False)
        assert not torch.equal(model(**batch).logits, inside)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]
    llama.eval()
    torch.testing.assert_close(inside, llama(**batch).logits)
    assert torch.equal(hidden[1], llama(**batch, output_hidden_states=True).hidden_states[1])
