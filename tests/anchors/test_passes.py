"""A pass over anchors is deterministic, and the training around it does not notice."""

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils.checkpoint import checkpoint

from craft_optim import CraftOptimizer, Retention
from craft_optim.anchors import passes


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def test_noise_is_off_inside_and_flags_come_back(noisy: nn.Module) -> None:
    noisy.body[3].eval()  # one that was off already
    before = flags(noisy)
    x = torch.randn(8, 6)
    statistics = noisy.body[1].running_mean.clone()
    with passes.steady(noisy):
        assert noisy.training
        assert not any((noisy.body[1].training, noisy.body[3].training, noisy.attention.training))
        first = noisy(x)
        assert torch.equal(first, noisy(x))
    assert flags(noisy) == before
    assert torch.equal(statistics, noisy.body[1].running_mean)
    noisy.eval()
    assert torch.equal(first, noisy(x))
    with passes.steady(noisy):
        pass
    assert not any(flags(noisy))


def test_flags_come_back_after_an_exception(noisy: nn.Module) -> None:
    before = flags(noisy)
    with pytest.raises(RuntimeError, match="stop"), passes.steady(noisy):
        raise RuntimeError("stop")
    assert flags(noisy) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_functional_dropout_is_off_too(
    name: str, request: pytest.FixtureRequest, token_batches: Callable[..., list[dict[str, Any]]]
) -> None:
    model = request.getfixturevalue(name)
    (batch,) = token_batches((3, 8))
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    with passes.steady(model):
        inside = model(**batch).logits
    model.eval()
    assert torch.equal(inside, model(**batch).logits)


def test_gradient_checkpointing_stays_on(llama: nn.Module, token_batches: Callable[..., list[dict[str, Any]]]) -> None:
    (batch,) = token_batches((2, 6))
    llama.gradient_checkpointing_enable()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    llama.model.layers[0].mlp.register_forward_pre_hook(count)
    with passes.steady(llama) as remember:
        loss = remember(llama(**batch, use_cache=False).logits.square().mean())
    loss.backward()
    assert calls == 2  # once more in the backward


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_module_that_checkpoints_keeps_its_mode(flag: str) -> None:
    """Its dropout child is off all the same. transformers 5.24 calls checkpointing by the second name."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

    model = Layer()
    for checkpoints in (True, False):
        setattr(model, flag, checkpoints)
        with passes.steady(model):
            assert model.training == checkpoints
            assert not model.drop.training


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(6, 16), reentrant
        self.block = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
        self.fail: BaseException | None = None  # in a forward that the backward repeats

    def forward(self, x: Tensor) -> Tensor:
        runs = 0

        def block(h: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            if self.fail is not None and runs == 2:
                raise self.fail
            return self.block(h)

        h = self.first(x)
        return checkpoint(block, h, use_reentrant=self.reentrant) if self.training else block(h)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_forward_in_the_backward_is_steady_too(reentrant: bool) -> None:
    model, x = Checkpointed(reentrant), torch.randn(8, 6)
    before, statistics = flags(model), model.block[1].running_mean.clone()
    with passes.steady(model) as remember:
        loss = remember(model(x).square().mean())
    assert flags(model) == before
    loss.backward()
    assert flags(model) == before
    assert torch.equal(statistics, model.block[1].running_mean)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.eval()(x).square().mean().backward()
    for a, b in zip(found, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("by", ["the optimizer", "an own loop", "an own loop, autograd.grad", "a function"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_flags_come_back_after_an_exception_that_is_kept(by: str, reentrant: bool, error: type[BaseException]) -> None:
    """As IPython keeps the last one: at once, and not when it is let go, whatever mode the model is in by then."""
    model, x = Checkpointed(reentrant), torch.randn(8, 6)
    before, stance = flags(model), eval_frame._stance.stance

    class Own(Retention):
        def loss(self, number: int) -> Tensor:
            with passes.steady(model) as remember, passes.eager():
                return remember(model(x).square().mean())

    own = Own()
    closure = (lambda: own()) if by == "a function" else own
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), closure)
    model(x).sum().backward()
    model.fail = error("stop")
    kept: list[BaseException] = []
    try:
        if by == "an own loop":
            own().backward()
        elif by == "an own loop, autograd.grad":
            torch.autograd.grad(own(), [model.first.weight])
        else:
            optimizer.step()
    except BaseException as stopped:
        kept.append(stopped)
    assert kept
    assert flags(model) == before
    assert eval_frame._stance.stance == stance
    model.eval()
    with torch.compiler.set_stance("fail_on_recompile"):
        kept.clear()
        gc.collect()
        assert not any(flags(model))
        assert eval_frame._stance.stance == "fail_on_recompile"
    assert eval_frame._stance.stance == stance


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_losses_may_share_a_backward(order: tuple[int, int]) -> None:
    models, x = [Checkpointed(False), Checkpointed(False)], torch.randn(8, 6)
    before, stance = [*map(flags, models)], eval_frame._stance.stance
    losses = []
    for model in models:
        with passes.steady(model) as remember, passes.eager():
            losses.append(remember(model(x).square().mean()))
    (losses[order[0]] + losses[order[1]]).backward()
    assert [*map(flags, models)] == before
    assert eval_frame._stance.stance == stance


def test_threads_have_their_own_passes() -> None:
    """One is in its forward while another is in its backward."""
    model, other, x = Checkpointed(False), Checkpointed(False), torch.randn(8, 6)
    within, go_on = threading.Event(), threading.Event()

    class Waits(Retention):
        def loss(self, number: int) -> Tensor:
            with passes.steady(other) as remember:
                within.set()
                assert go_on.wait(60)
                return remember(other(x).square().mean())

    optimizers = [
        CraftOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), Waits()),
        CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), lambda: model.eval()(x).square().mean()),
    ]
    other(x).sum().backward()
    model(x).sum().backward()
    thread = threading.Thread(target=optimizers[0].step)
    thread.start()
    assert within.wait(60)
    optimizers[1].step()
    go_on.set()
    thread.join()
    assert all(flags(other))
    assert optimizers[0].metrics["fresh"] == 1.0


def test_recurrent_networks_keep_their_mode() -> None:
    """cuDNN has no backward for a recurrent layer in eval mode; one without dropout needs none."""
    model = nn.GRU(3, 4)
    with passes.steady(model):
        assert model.training


def test_random_numbers_are_its_own() -> None:
    cpu = torch.device("cpu")
    before = torch.get_rng_state()
    with passes.isolated_rng(cpu, 5):
        a = torch.rand(3)
    with passes.isolated_rng(cpu, 5):
        assert torch.equal(a, torch.rand(3))
    with contextlib.suppress(KeyError), passes.isolated_rng(cpu, 5):
        raise KeyError
    with passes.isolated_rng(cpu, 6):
        assert not torch.equal(a, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())
    expected = torch.rand(3)
    torch.set_rng_state(before)
    with passes.isolated_rng(cpu, None):
        assert torch.equal(expected, torch.rand(3))


def test_autocast_is_entered_or_left_as_it_is() -> None:
    cpu = torch.device("cpu")
    assert passes.autocast_dtype(cpu, None) is None
    with passes.autocast_to(cpu, torch.bfloat16):
        assert passes.autocast_dtype(cpu, None) == torch.bfloat16
        with passes.autocast_to(cpu, None):
            assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert passes.autocast_dtype(cpu, torch.bfloat16) == torch.bfloat16


def test_logits_are_found_in_what_models_return() -> None:
    class Output:
        logits = torch.ones(1)

    for output in (torch.ones(1), {"logits": torch.ones(1)}, Output()):
        assert passes.logits_of(output) is not None
    for output in (None, {"loss": torch.ones(1)}, (torch.ones(1),), 3.0):
        assert passes.logits_of(output) is None
