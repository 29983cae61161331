"""Several kinds of drift under one epsilon: the weighted sum, and no forward more than needed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    CombinedRetention,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    Reading,
    TokenRetention,
    build,
)

Batches = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def cache(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> AnchorCache:
    reading = Reading(forward, tokens=3)
    return build(llama, token_batches((6, 7), (6, 5)), tmp_path, reading, layers=(1, 2), dtype=torch.float32)


def forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch)


def members(model: nn.Module, cache: AnchorCache, **settings: Any) -> dict[str, Any]:
    return {
        "logits": LogitRetention(model, cache, 4, **settings),
        "hidden": HiddenRetention(model, cache, 4, layers=[2], **settings),
        "tokens": TokenRetention(model, cache, 4, **settings),
    }


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.03)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_it_is_the_weighted_sum_with_one_forward(llama: nn.Module, cache: AnchorCache) -> None:
    disturb(llama)
    alone, weights = members(llama, cache, strict=False), {"hidden": 0.5, "tokens": 0.0}
    combined = CombinedRetention(members(llama, cache, strict=False), weights)
    calls: list[int] = []
    llama.register_forward_pre_hook(lambda module, args: calls.append(1))
    for _ in range(4):
        parts = {name: member() for name, member in alone.items()}
        expected = parts["logits"] + 0.5 * parts["hidden"]
        wanted = gradients(llama, expected)
        calls.clear()
        loss = combined()
        found = gradients(llama, loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(calls) == 1
    assert combined.position == 4
    drifts = {name: member.drift() for name, member in alone.items()}
    assert combined.drifts() == pytest.approx(drifts, rel=1e-5)
    assert combined.drift() == pytest.approx(drifts["logits"] + 0.5 * drifts["hidden"], rel=1e-5)


def test_two_passes_in_one_backward_leave_nothing_behind(
    llama: nn.Module, cache: AnchorCache, token_batches: Batches, tmp_path: Path
) -> None:
    """Under compilation and activation checkpointing the backward repeats forwards, each as it was."""
    from torch._dynamo import eval_frame

    other = build(llama, token_batches((8, 6)), tmp_path / "other", layers=(1,), output=None)
    llama.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    parts = {"a": HiddenRetention(llama, cache, 4), "b": HiddenRetention(llama, other, 4)}
    training = {name: m.training for name, m in llama.named_modules()}
    CombinedRetention(parts)().backward()
    assert eval_frame._stance.stance == "default"
    assert {name: m.training for name, m in llama.named_modules()} == training


def test_members_without_a_common_cache_run_one_after_the_other(
    llama: nn.Module, cache: AnchorCache, token_batches: Batches, tmp_path: Path
) -> None:
    teacher = copy.deepcopy(llama)
    other = build(llama, token_batches((8, 6)), tmp_path / "other", top_k=3)
    llama.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out)
    disturb(llama)

    def parts() -> dict[str, Any]:
        return {
            "here": LogitRetention(llama, cache, 4, strict=False),
            "there": LogitRetention(llama, other, 3, strict=False),
            "online": OnlineRetention(llama, other, 2, teacher=teacher, strict=False),
        }

    alone, combined = parts(), CombinedRetention(parts(), {"there": 3.0})
    for _ in range(2):
        expected = alone["here"]() + 3.0 * alone["there"]() + alone["online"]()
        wanted = gradients(llama, expected)
        loss = combined()
        found = gradients(llama, loss)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    second = combined.loss(1).item()
    combined.position = 1
    assert combined().item() == second


def test_a_failing_member_leaves_all_where_they_were(llama: nn.Module, cache: AnchorCache) -> None:
    def nothing(model: nn.Module, batch: Any) -> None: ...

    nothing.__qualname__ = "forward"
    broken = LogitRetention(llama, cache, 3, reading=Reading(nothing))
    combined = CombinedRetention({"good": LogitRetention(llama, cache, 4), "broken": broken})
    with pytest.raises(AnchorMismatchError):
        combined()
    assert combined.position == 0


def test_each_member_is_checked_at_the_start(llama: nn.Module, cache: AnchorCache) -> None:
    CombinedRetention(members(llama, cache))()
    disturb(llama)
    with pytest.raises(AnchorMismatchError, match="its drift is"):
        CombinedRetention(members(llama, cache), {"logits": 0.0, "tokens": 1e-9, "hidden": 1e-9})()


def test_wrong_weights_are_refused(llama: nn.Module, cache: AnchorCache) -> None:
    with pytest.raises(ValueError, match="Found none"):
        CombinedRetention({})
    with pytest.raises(ValueError, match=r"\['other'\]"):
        CombinedRetention(members(llama, cache), {"other": 1.0})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and >= 0"):
            CombinedRetention(members(llama, cache), {"hidden": bad})
    with pytest.raises(ValueError, match="not all zero"):
        CombinedRetention({"logits": LogitRetention(llama, cache, 4)}, {"logits": 0.0})
