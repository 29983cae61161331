"""Anchors by the number of the pass: the same number, the same bits, whoever asks and in whatever order."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim import CraftOptimizer
from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    CombinedRetention,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    Reading,
    Snapshot,
    build,
)
from craft_optim.dual import DualAscent
from craft_optim.retention import Retention


def noisy_run(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x + 0.1 * torch.randn_like(x))
    return out


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))


@pytest.fixture
def cache(classifier: nn.Module, points: Tensor, tmp_path: Path) -> AnchorCache:
    return build(classifier, points.split(10), tmp_path / "cache", layers=("1",), progress=False, class_dim=-1)


@pytest.fixture
def noisy_cache(classifier: nn.Module, points: Tensor, tmp_path: Path) -> AnchorCache:
    return build(
        classifier,
        points.split(10),
        tmp_path / "noisy",
        Reading(noisy_run),
        layers=("1",),
        progress=False,
        class_dim=-1,
    )


MAKE: dict[str, Callable[..., Retention]] = {
    "logits": lambda model, cache, **more: LogitRetention(model, cache, 8, **more),
    "hidden": lambda model, cache, **more: HiddenRetention(model, cache, 8, **more),
    "online": lambda model, cache, workers=0, **more: OnlineRetention(
        model, cache, 8, teacher=copy.deepcopy(model).requires_grad_(False), **more
    ),
    "snapshot": lambda model, cache, workers=0, **more: OnlineRetention(
        model, cache, 8, teacher=Snapshot(model), **more
    ),
    "combined": lambda model, cache, **more: CombinedRetention(
        {"a": LogitRetention(model, cache, 8, **more), "b": HiddenRetention(model, cache, 8, **more)}, {"b": 0.3}
    ),
}
made = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@made
@pytest.mark.parametrize("workers", [0, 2])
def test_a_number_determines_the_bits(make: Any, workers: int, classifier: nn.Module, noisy_cache: AnchorCache) -> None:
    cache = noisy_cache
    retention = make(classifier, cache, workers=workers, strict=False)
    disturb(classifier)
    expected = [make(classifier, cache, strict=False).loss(number).item() for number in range(6)]
    if not isinstance(retention, OnlineRetention):  # whose teacher the disturbed model is here
        assert [retention.loss(number).item() for number in (3, 0, 0, 5, 4, 1, 2)] == [
            expected[number] for number in (3, 0, 0, 5, 4, 1, 2)
        ]
    losses = [retention.loss(number).item() for number in (5, 2, 2, 0, 1)]
    assert losses == [retention.loss(number).item() for number in (5, 2, 2, 0, 1)]
    assert len(set(losses)) == 4
    assert retention.position == 0
    assert retention().item() == losses[3]
    assert (retention.position, retention.state_dict()) == (1, {"position": 1})
    retention.load_state_dict({"position": 5})
    assert retention().item() == losses[0]


def test_two_who_ask_for_other_numbers_get_their_own(classifier: nn.Module, noisy_cache: AnchorCache) -> None:
    """What was read ahead for one is not what the other gets."""
    cache = noisy_cache
    retention = LogitRetention(classifier, cache, 8, workers=2, strict=False)
    alone = LogitRetention(classifier, cache, 8, workers=0, strict=False)
    for one, other in ((0, 30), (1, 31), (2, 31), (2, 32), (32, 3)):
        assert retention.loss(one).item() == alone.loss(one).item()
        assert retention.loss(other).item() == alone.loss(other).item()


# The check of pass 0


@made
def test_it_is_made_once_in_pass_0(make: Any, classifier: nn.Module, cache: AnchorCache) -> None:
    retention = make(classifier, cache)
    kept = copy.deepcopy(classifier.state_dict())
    disturb(classifier)
    assert retention.loss(1) > 0.0
    for _ in range(2):  # it has not agreed yet
        with pytest.raises(AnchorMismatchError, match="does not reproduce"):
            retention.loss(0)
    classifier.load_state_dict(kept)
    retention.loss(0)
    disturb(classifier)
    assert retention.loss(0) > 1e-3, "the parameters have moved within the first step"


def test_a_line_search_may_move_the_model_in_its_first_step(classifier: nn.Module, cache: AnchorCache) -> None:
    retention = LogitRetention(classifier, cache, 8)
    base, nothing_holds_it = torch.optim.LBFGS(classifier.parameters(), max_iter=5), DualAscent(0.0, 0.0)
    optimizer = CraftOptimizer(base, retention, dual=nothing_holds_it)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = classifier(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[0]["craft_anchor_position"] == 1
    assert retention.drift() > 2.0 * retention.tolerance, "far from the teacher, and yet no error"


def test_a_first_step_that_fails_may_be_tried_again(classifier: nn.Module, cache: AnchorCache) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if failing:
                raise RuntimeError("out of memory")

    failing, retention = True, LogitRetention(classifier, cache, 8)
    optimizer = CraftOptimizer(Failing(classifier.parameters(), lr=0.5), retention, epsilon=1e-3)
    classifier(torch.ones(2, 6)).square().sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    failing = False
    optimizer.step()
    assert optimizer.param_groups[0]["craft_anchor_position"] == 1


# Two optimizers on one closure


def test_two_optimizers_on_one_closure_resume_in_any_order(classifier: nn.Module, cache: AnchorCache) -> None:
    def begin(model: nn.Module) -> list[CraftOptimizer]:
        retention = LogitRetention(model, cache, 8, strict=False)
        weights = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim == 1]
        bases = torch.optim.SGD(weights, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)
        return [CraftOptimizer(base, retention, epsilon=1e-3, retention_every=k) for k, base in enumerate(bases, 1)]

    def go_on(model: nn.Module, optimizers: list[CraftOptimizer], steps: range) -> list[Tensor]:
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :4].argmin(1)).backward()
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    optimizers = begin(classifier)
    go_on(classifier, optimizers, range(9))
    saved = copy.deepcopy((classifier.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
    expected = go_on(classifier, optimizers, range(9, 15))
    assert [o.param_groups[0]["craft_anchor_position"] for o in optimizers] == [15, 8]
    for order in ((0, 1), (1, 0)):
        classifier.load_state_dict(saved[0])
        again = begin(classifier)
        for i in order:
            again[i].load_state_dict(copy.deepcopy(saved[1][i]))
        assert all(map(torch.equal, go_on(classifier, again, range(9, 15)), expected))


# Deep copies


class Connection:
    """As a process group: it cannot be copied."""

    def mean(self, x: Tensor) -> Tensor:
        return x

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("cannot be copied")


@made
@pytest.mark.parametrize("begun", [False, True])
def test_a_copy_with_its_model_runs_the_copied_model(
    make: Any, begun: bool, classifier: nn.Module, cache: AnchorCache
) -> None:
    retention, connection = make(classifier, cache, workers=1), Connection()
    retention.shard(1, 2, connection.mean)
    if begun:
        retention()
    model, twin = copy.deepcopy((classifier, retention))
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert (twin.position, twin.shared) == (int(begun), True)
    disturb(model)
    assert retention.drift() < 1e-3 < twin.drift()
    twin.loss(3).backward()
    assert all(p.grad is None for p in classifier.parameters())
    assert any(p.grad is not None for p in model.parameters())
    classifier.load_state_dict(model.state_dict())
    assert retention.loss(3).item() == twin.loss(3).item()
    part = next(iter(twin.members.values())) if isinstance(twin, CombinedRetention) else twin
    assert part._anchors is cache, "anchors are shared"


# What it says of itself


@made
def test_examples_and_drift_on_a_part(make: Any, classifier: nn.Module, cache: AnchorCache, points: Tensor) -> None:
    retention = make(classifier, cache, strict=False)
    disturb(classifier)
    examples = retention.examples(4)
    assert torch.equal(torch.cat(examples), points[[6, 18, 31, 43]])
    assert len(retention.examples(99)) == 50
    assert retention.drift(count=4) != retention.drift() == retention.drift(count=50) == retention.drift(cache, 99)
    assert retention.position == 0
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"`count` must be a whole number >= 1. Found count={bad}"):
            retention.drift(count=bad)


def test_units_and_tolerances(classifier: nn.Module, cache: AnchorCache) -> None:
    found = {name: make(classifier, cache) for name, make in MAKE.items()}
    assert found["logits"].unit == found["online"].unit == "nats per position (KL)"
    assert found["hidden"].unit == "shares of the teacher's variance"
    assert found["combined"].unit == "the closure's own unit"
    assert found["logits"].tolerance == 1e-3, "float16 on disk"
    assert found["online"].tolerance == 1e-4, "float32"
    assert found["combined"].tolerance == pytest.approx(1.3e-3)
    assert LogitRetention(classifier, cache, tolerance=0.2).tolerance == 0.2
    assert HiddenRetention(classifier, cache, loss="l1").tolerance == pytest.approx(1e-3**0.5)


def test_settings_are_fixed(classifier: nn.Module, cache: AnchorCache) -> None:
    retention = LogitRetention(classifier, cache, 8)
    for name, value in {"batch_size": 2, "seed": 1, "cache": cache, "model": classifier, "reading": Reading()}.items():
        with pytest.raises(AttributeError, match=f"`{name}` of a closure is fixed"):
            setattr(retention, name, value)
    with pytest.raises(AttributeError):
        retention.tolerance = 1.0  # type: ignore[misc]
