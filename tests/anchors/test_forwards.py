"""What a retention pass does not compute: heads where nothing is compared, modules that do not train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorMismatchError, HiddenRetention, LogitRetention, Reading, build

Batches = Callable[..., list[dict[str, Any]]]
TOWER = "model.vision_tower"


def gradients(model: nn.Module, closure: Any) -> tuple[float, list[Tensor | None]]:
    model.zero_grad()
    loss = closure()
    loss.backward()
    return loss.item(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def disturb(model: nn.Module, only: str = "") -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and only in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.03)


@pytest.fixture
def frozen_vlm(vlm: Any) -> Any:
    vlm.get_submodule(TOWER).requires_grad_(False)
    return vlm


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_a_frozen_tower_runs_once_and_never_again(
    kind: str, frozen_vlm: Any, image_text_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model = frozen_vlm
    settings: dict[str, Any] = {
        "layers": (2,),
        "output": "classes" if kind == "logits" else None,
        "dtype": torch.float32,
    }
    with_tower = build(model, image_text_batches, tmp_path / "a", **settings, class_dim=-1)
    without = build(model, image_text_batches, tmp_path / "b", Reading(frozen=[TOWER]), **settings, class_dim=-1)
    assert without.features.frozen == (TOWER,)
    assert without.frozen_features
    make = LogitRetention if kind == "logits" else HiddenRetention
    plain, skipping = make(model, with_tower, 4), make(model, without, 4)
    plain(), skipping()
    disturb(model)
    target = next(m for m in model.get_submodule(TOWER).modules() if isinstance(m, nn.LayerNorm))
    calls: list[int] = []
    target.register_forward_pre_hook(lambda module, args: calls.append(1))
    for _ in range(3):
        expected, wanted = gradients(model, plain)
        ran = len(calls)
        found, got = gradients(model, skipping)
        assert len(calls) == ran > 0, "the plain closure runs the tower, the other does not"
        assert found == pytest.approx(expected, rel=1e-5)
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    calls.clear()
    assert skipping.drift() == pytest.approx(plain.drift(), rel=1e-5)
    assert len(calls) == 3, "the three batches of the plain one"


def test_a_tower_that_trains_is_run(vlm: Any, image_text_batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    cache = build(vlm, image_text_batches, tmp_path, Reading(frozen=[TOWER]), dtype=torch.float32)
    retention = LogitRetention(vlm, cache, 4)
    retention()
    disturb(vlm, only="vision_tower")
    loss, found = gradients(vlm, retention)
    assert loss > 1e-4
    named = dict(zip([name for name, _ in vlm.named_parameters()], found, strict=True))
    assert any(g is not None and bool(g.any()) for name, g in named.items() if "vision_tower" in name)


def test_a_tower_that_has_changed_is_found_out(
    frozen_vlm: Any, image_text_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    cache = build(frozen_vlm, image_text_batches, tmp_path, Reading(frozen=[TOWER]))
    with torch.no_grad():
        next(frozen_vlm.get_submodule(TOWER).parameters()).mul_(1.5)
    with pytest.raises(AnchorMismatchError, match=rf"'{TOWER}' does not return what the cache holds.*cache is"):
        LogitRetention(frozen_vlm, cache, 4, strict=False)()


def test_rounded_towers_stay_within_rounding(
    frozen_vlm: Any, image_text_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    cache = build(frozen_vlm, image_text_batches, tmp_path, Reading(frozen=[TOWER]))
    retention = LogitRetention(frozen_vlm, cache, 4)
    assert retention().item() < 1e-3
    assert retention().item() < 1e-3  # this one is replayed
    assert retention.drift() < 1e-3


def test_unknown_modules_are_refused(vlm: Any, image_text_batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no module 'tower'"):
        build(vlm, image_text_batches, tmp_path, Reading(frozen=["tower"]))
    assert not list(tmp_path.iterdir())


def test_the_head_runs_where_logits_are_compared(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    batches = token_batches((6, 9), (4, 7))
    for batch in batches:
        batch["answer"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) > 4
        batch["labels"] = torch.where(batch["answer"], batch["input_ids"], -100)

    def without_answer(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    widths: list[int] = []
    llama.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[:2].numel()))
    cache = build(llama, batches, tmp_path / "a", Reading(without_answer, mask="answer"), dtype=torch.float32)
    widths.clear()
    retention = LogitRetention(llama, cache, 5)
    retention()
    disturb(llama)
    widths.clear()
    loss, found = gradients(llama, retention)
    counted = int(cache.read(retention._sampler.indices(1)).features["mask"].sum())
    assert widths == [counted], "positions that the head has seen"
    retention.position = 1
    retention._run._head = None  # type: ignore[union-attr]
    expected, wanted = gradients(llama, retention)
    assert widths[-1] > counted
    assert loss == pytest.approx(expected, rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_labels_are_a_mask_and_no_loss_is_computed(
    llama: nn.Module, token_batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = token_batches((6, 9))
    batch["labels"] = torch.where(torch.arange(9) > 4, batch["input_ids"], -100)

    def no_loss(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a loss was computed")

    monkeypatch.setattr(type(llama), "loss_function", property(lambda self: no_loss))
    cache = build(llama, [batch], tmp_path, Reading(mask="labels"))
    # the logits before each of the labels 5 to 8
    assert cache.read([0]).features["mask"].nonzero()[:, 1].tolist() == [4, 5, 6, 7]
    assert LogitRetention(llama, cache, 6)().item() < 1e-3
