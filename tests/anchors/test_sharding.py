"""Several processes that share the anchors: together they are one process with the whole batch.

The processes are simulated one after the other: `mean` looks up what the others contribute.
"""

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
    AnchorRetention,
    AnchorSampler,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    Reading,
    build,
)

Batches = Callable[..., list[dict[str, Any]]]


def disturb(model: nn.Module, scale: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


class Ranks:
    """W closures on one model, run one after the other; what each gives to `mean` is known from a round before."""

    def __init__(self, make: Callable[[], AnchorRetention], world_size: int) -> None:
        self.closures = [make() for _ in range(world_size)]
        self.known: list[list[Tensor]] | None = None
        for rank, closure in enumerate(self.closures):
            closure.shard(rank, world_size, lambda x, rank=rank: self.mean(rank, x))

    def mean(self, rank: int, x: Tensor) -> Tensor:
        self.said[rank].append(x.detach().clone())
        if self.known is None:
            return x
        return torch.stack([tensors[len(self.said[rank]) - 1] for tensors in self.known]).mean(0)

    def together(self) -> tuple[list[float], list[Tensor], list[list[Tensor]]]:
        """Losses, mean gradients, and what each rank gave to `mean`."""
        self.known, position = None, self.closures[0].position
        for _ in range(2):
            self.said: list[list[Tensor]] = [[] for _ in self.closures]
            losses, gradients = [], []
            for closure in self.closures:
                closure.position = position
                loss, gradient = alone(closure)
                losses.append(loss)
                gradients.append(gradient)
            self.known = self.said
        return losses, [sum(gs) / len(gs) for gs in zip(*gradients, strict=True)], self.said


def alone(closure: AnchorRetention) -> tuple[float, list[Tensor]]:
    closure.model.zero_grad()
    loss = closure()
    loss.backward()
    return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in closure.model.parameters()]


def ragged(inputs: Any) -> Tensor:
    """Very different numbers of positions: none of some anchors, all of others."""
    ids = inputs["input_ids"]
    return (torch.arange(ids.shape[1]) < ids[:, :1] % 8) & inputs["attention_mask"].bool()


def first_half_only(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
    early = torch.arange(ids.shape[1]) < 1 + ids[:, :1] % 5
    return {"early": early, "all": attended}


@pytest.fixture
def caches(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> dict[str, AnchorCache]:
    batches = token_batches((8, 7), (9, 11))
    reading = Reading(spans=first_half_only, pooling={"early": "none", "all": "masked_mean"})
    return {
        "full": build(llama, batches, tmp_path / "full", reading, layers=(1, -1), dtype=torch.float32),
        "top_k": build(llama, batches, tmp_path / "top_k", top_k=5, dtype=torch.float32),
    }


def closures(
    kind: str, model: nn.Module, caches: dict[str, AnchorCache], **kwargs: Any
) -> Callable[[int], AnchorRetention]:
    def make(batch_size: int) -> AnchorRetention:
        if kind == "hidden":
            return HiddenRetention(model, caches["full"], batch_size, weights={1: 3.0}, **kwargs)
        if kind == "online":
            reading = Reading(mask=ragged)
            return OnlineRetention(model, caches["full"], batch_size, teacher=teacher, reading=reading, **kwargs)
        return LogitRetention(model, caches[kind], batch_size, mask=ragged, **kwargs)

    teacher = copy.deepcopy(model)
    return make


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["full", "top_k", "hidden", "online"])
def test_the_mean_over_ranks_is_what_one_process_would_have(
    kind: str, world_size: int, llama: nn.Module, caches: dict[str, AnchorCache]
) -> None:
    make = closures(kind, llama, caches, strict=False)
    disturb(llama, 0.02)
    whole, ranks = make(8), Ranks(lambda: make(8 // world_size), world_size)
    seen = set()
    for _ in range(3):
        loss, gradients = alone(whole)
        losses, averaged, said = ranks.together()
        assert sum(losses) / world_size == pytest.approx(loss, rel=1e-6)
        for a, b in zip(averaged, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert [len(tensors) for tensors in said] == [1] * world_size, "one collective per pass"
        seen |= {tuple(tensors[0].tolist()) for tensors in said}
    assert len(seen) > 1, "the ranks' weights must differ, or this tests nothing"
    assert [closure.position for closure in ranks.closures] == [3] * world_size == [whole.position] * world_size


def test_a_rank_without_a_valid_position_takes_part(llama: nn.Module, caches: dict[str, AnchorCache]) -> None:
    only: list[int] = []

    def mask(inputs: Any) -> Tensor:
        ids = inputs["input_ids"]
        return (ids[:, :1] == only[0]) & inputs["attention_mask"].bool()

    retention = LogitRetention(llama, caches["full"], 2, strict=False, mask=mask)
    rows = retention._anchors.read(retention._sampler.indices(0)).inputs["input_ids"]
    only.append(int(rows[0, 0]))
    assert only[0] != int(rows[1, 0])
    disturb(llama, 0.02)
    loss, gradients = alone(retention)
    ranks = Ranks(lambda: LogitRetention(llama, caches["full"], 1, strict=False, mask=mask), 2)
    losses, averaged, said = ranks.together()
    assert [float(tensors[0]) for tensors in said] == [said[0][0].item(), 0.0]
    assert losses[1] == 0.0
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-6)
    for a, b in zip(averaged, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # alone it is an error, and nowhere at all it is not a number on every rank
    lonely = LogitRetention(llama, caches["full"], 1, strict=False, mask=mask)
    lonely.shard(1, 2)
    with pytest.raises(ValueError, match="selects none"):
        lonely()
    assert lonely.position == 0
    only[0] = -1
    losses, _, _ = ranks.together()
    assert all(loss != loss for loss in losses)


def test_hidden_states_of_a_rank_without_positions(llama: nn.Module, token_batches: Batches, tmp_path: Path) -> None:
    cache = build(llama, token_batches((6, 7)), tmp_path, Reading(pooling={"all": "none"}), output=None, layers=(1, 2))
    first = cache.read([0]).inputs["input_ids"]

    def spans(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        ids = inputs["input_ids"]
        return {"all": (ids == first).all(1, keepdim=True) & inputs["attention_mask"].bool()}

    disturb(llama, 0.02)
    loss, gradients = alone(HiddenRetention(llama, cache, 6, strict=False, spans=spans))
    losses, averaged, said = Ranks(lambda: HiddenRetention(llama, cache, 3, strict=False, spans=spans), 2).together()
    assert sorted(tensors[0].tolist() for tensors in said) == [[0.0, 0.0], [5.0, 5.0]]
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-6)
    for a, b in zip(averaged, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_all_ranks_find_a_mismatch_together(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    """The drift is on the anchors of one rank only; the other's own are without."""
    cache = build(classifier, [points], tmp_path, dtype=torch.float32, class_dim=-1)
    for mean, fails in ((0.0, False), (1.0, True)):
        for rank in (0, 1):
            retention = LogitRetention(classifier, cache, 8)
            calls: list[Tensor] = []

            def average(x: Tensor, calls: list[Tensor] = calls, mean: float = mean) -> Tensor:
                calls.append(x)
                return x if len(calls) == 1 else torch.full_like(x, mean)

            retention.shard(rank, 2, average)
            if fails:
                with pytest.raises(AnchorMismatchError, match="its drift is 1 "):
                    retention()
                assert retention.position == 0
            else:
                retention()
                retention()
                assert len(calls) == 3, "the check is one call more, at the first pass only"


def test_a_place_can_be_given_anew(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    cache = build(classifier, [points], tmp_path, class_dim=-1)
    free = LogitRetention(classifier, cache, 8, strict=False)
    free.position = 4
    free.shard(1, 3)
    assert free._sampler.indices(2).tolist() == AnchorSampler(50, 8, 0, 1, 3).indices(2).tolist()
    assert free.position == 4
    free.shard(0, 1)
    assert free._sampler.indices(0).tolist() == LogitRetention(classifier, cache, 8)._sampler.indices(0).tolist()
    with pytest.raises(ValueError, match=r"batch_size=8, world_size=7 and 50 anchors: use batch_size <= 7"):
        free.shard(0, 7)


def test_ranks_draw_random_numbers_of_their_own(classifier: nn.Module, points: Tensor, tmp_path: Path) -> None:
    """But all of them the same ones where they measure the same anchors."""
    drawn: list[float] = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        out: Tensor = model(x)
        return out

    cache = build(classifier, [points], tmp_path, Reading(forward), dtype=torch.float32, class_dim=-1)
    drawn.clear()
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        retention = LogitRetention(classifier, cache, 8, strict=False)
        retention.shard(rank, world_size)
        retention()
    assert len(set(drawn)) == 3
    drawn.clear()
    for rank in (0, 1):
        retention = LogitRetention(classifier, cache, 25)
        retention.shard(rank, 2)
        retention.drift()
    assert drawn[:2] == drawn[2:]
