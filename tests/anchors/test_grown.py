"""New tokens and new classes: what there was before them is compared."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    LogitRetention,
    OnlineRetention,
    Reading,
    Snapshot,
    build,
)


class Growing(nn.Module):
    """A classifier whose classes are in any dimension: [B, V], [B, T, V] or [B, V, T]."""

    def __init__(self, classes: int = 4, kind: str = "last") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.head = kind, nn.Linear(6, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).tanh())
        if self.kind == "last":
            return logits
        logits = torch.stack([logits, -logits, 2 * logits], 1)
        return logits if self.kind == "middle" else logits.movedim(2, 1)

    def grow(self, classes: int) -> None:
        with torch.no_grad():
            head = nn.Linear(8, classes)
            head.weight[: len(self.head.weight)], head.bias[: len(self.head.bias)] = self.head.weight, self.head.bias
        self.head = head


CASES = [
    ("last", -1, "[..., :4], class_dim=-1"),
    ("middle", -1, "[..., :4], class_dim=-1"),
    ("first", 1, ".narrow(1, 0, 4), class_dim=1"),
]


def remedy_of(error: BaseException) -> Reading:
    """The reading that the message names."""
    code = str(error).split("compare those that there were: ")[1].split(". The cache")[0].rstrip(".")
    reading: Reading = eval(code, {"Reading": Reading})
    return reading


@pytest.mark.parametrize(("kind", "dim", "words"), CASES)
@pytest.mark.parametrize("batch", ["tensor", "mapping", "tuple"])
def test_the_message_names_what_makes_it_work(
    batch: str, kind: str, dim: int, words: str, points: Tensor, tmp_path: Path
) -> None:
    model = Growing(kind=kind)
    given: Any = {"tensor": points, "mapping": {"x": points}, "tuple": (points,)}[batch]
    cache = build(model, [given], tmp_path, class_dim=dim, dtype=torch.float32, progress=False)
    for classes in (5, 9):
        model.grow(classes)
        with pytest.raises(AnchorMismatchError) as raised:
            LogitRetention(model, cache, 8)()
        assert words in str(raised.value)
        if batch == "mapping":  # the model returns a tensor, most return `.logits`
            assert "model(**batch).logits" in str(raised.value)
            part = (lambda x: x.narrow(1, 0, 4)) if kind == "first" else (lambda x: x[..., :4])
            reading = Reading(forward=lambda m, b, part=part: part(m(**b)), class_dim=dim)
        else:
            reading = remedy_of(raised.value)
        for opened in (cache, AnchorCache.open(cache.path, reading)):
            retention = LogitRetention(model, opened, 8, **({"reading": reading} if opened is cache else {}))
            assert abs(retention().item()) < 1e-5
    with torch.no_grad():
        model.body.weight.add_(0.1)
    with pytest.raises(AnchorMismatchError, match="does not reproduce"):
        LogitRetention(model, cache, 8, reading=reading)()


def test_new_classes_are_learnt_and_the_old_held(points: Tensor, tmp_path: Path) -> None:
    model = Growing()
    cache = build(model, [points], tmp_path, class_dim=-1, dtype=torch.float32, progress=False)
    model.grow(6)
    retention = LogitRetention(model, cache, 8, reading=Reading(forward=lambda m, x: m(x)[..., :4]))
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-2), retention, epsilon=0.02)
    new = points + 3
    losses = []
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(new), torch.full((len(new),), 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert retention.drift() < 0.04


@pytest.mark.parametrize("teacher", ["module", "snapshot"])
def test_online(teacher: str, points: Tensor) -> None:
    model = Growing()
    old = copy.deepcopy(model)
    early = Snapshot(model)
    model.grow(6)
    reading = Reading(forward=lambda m, x: m(x)[..., :4], class_dim=-1)
    with pytest.raises(ValueError, match=r"since the Snapshot was made.*after.*resizing.*out, Reading\(forward="):
        OnlineRetention(model, points, 8, teacher=early, reading=reading)()
    with pytest.raises(AnchorMismatchError, match=r"compare those that there were.*\[..., :4\]"):
        OnlineRetention(model, points, 8, teacher=old, reading=Reading(class_dim=-1))()
    retention = OnlineRetention(
        model, points, 8, teacher=old if teacher == "module" else Snapshot(model), reading=reading
    )
    assert retention().item() == 0.0


def test_a_smaller_output_is_another_model(points: Tensor, tmp_path: Path) -> None:
    cache = build(Growing(), [points], tmp_path, class_dim=-1, progress=False)
    with pytest.raises(AnchorMismatchError) as raised:
        LogitRetention(Growing(3), cache, 8)()
    assert "grown" not in str(raised.value)
