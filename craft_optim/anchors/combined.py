"""Several retention closures as one: a weighted sum of their losses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from craft_optim.retention import Retention, as_retention

from .cache import AnchorBatch, AnchorCache
from .cached import CachedRetention, DriftOfEach
from .forwards import Outcome

__all__ = ["CombinedRetention", "SharedPass"]


class CombinedRetention(Retention):
    """Several kinds of drift under one epsilon.

        L_ret = sum_j w_j L_j

    Members with the same cache, batch size, seed and reading share each batch and its forward, up to the deepest layer
    that any of them needs. Others run their own, one after the other, and all graphs live until the backward.

    Example:
        cache = build(model, batches, "anchors/", layers=[8, -1])  # logits, too
        retention = CombinedRetention(
            {"logits": LogitRetention(model, cache), "hidden": HiddenRetention(model, cache)}, weights={"hidden": 0.1}
        )

    Args:
        members: Name -> closure; each used here only.
        weights: Name -> w_j >= 0; 1 for members not named. Units differ: nats for logits and tokens, shares of variance
            for hidden states.

    Raises:
        TypeError: A member is not a closure.
        ValueError: There is no member, a name is unknown, a weight is out of range, or all are zero.
    """

    _fixed = frozenset(("members", "weights"))

    def __init__(self, members: Mapping[str, Retention], weights: Mapping[str, float] | None = None) -> None:
        given = dict(weights or {})
        self.members = {name: as_retention(member, f"members[{name!r}]") for name, member in members.items()}
        if not self.members:
            raise ValueError("`members` must name at least one closure. Found none.")
        if unknown := sorted(set(given) - set(self.members)):
            raise ValueError(f"`weights` names {unknown}, but the members are {sorted(self.members)}.")
        self.weights = {name: float(given.get(name, 1.0)) for name in self.members}
        if not all(0.0 <= w < float("inf") for w in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"`weights` must be finite and >= 0, and not all zero. Found {self.weights}.")
        groups: dict[Any, dict[str, Retention]] = {}
        for name, member in self.members.items():
            groups.setdefault(_shared_by(member), {})[name] = member
        self._parts: list[tuple[str | None, Retention]] = []  # no name: the weights are inside
        for group in groups.values():
            cached = {name: m for name, m in group.items() if isinstance(m, CachedRetention)}
            if len(cached) > 1:
                self._parts.append((None, SharedPass(cached, self.weights)))
            else:
                self._parts += group.items()

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """The weighted sum of the members' tolerances."""
        return sum(weight * self.members[name].tolerance for name, weight in self.weights.items() if weight)

    def parameters(self) -> list[Tensor]:
        """All parameters that the backward may reach."""
        return list({id(p): p for _, part in self._parts for p in part.parameters()}.values())

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Shares the anchors in each member; see `AnchorRetention.shard`."""
        super().shard(rank, world_size, mean)
        for _, part in self._parts:
            part.shard(rank, world_size, mean)

    def loss(self, number: int) -> Tensor:
        """The sum on the anchors of a pass: a float32 scalar, with a graph unless gradients are off."""
        weights = [1.0 if name is None else self.weights[name] for name, _ in self._parts]
        losses = [
            part.loss(number) if weight == 1.0 else weight * part.loss(number)
            for weight, (_, part) in zip(weights, self._parts, strict=True)
        ]
        return losses[0] if len(losses) == 1 else torch.stack([x.to(losses[0].device) for x in losses]).sum()

    def check(self) -> None:
        """Runs each member's check."""
        for member in self.members.values():
            member.check()

    def drifts(self, anchors: AnchorCache | None = None, count: int | None = None) -> dict[str, float]:
        """Each member's own `drift`, without weight."""
        return {name: member.drift(anchors, count) for name, member in self.members.items()}

    def drift(self, anchors: AnchorCache | None = None, count: int | None = None) -> float:
        """The weighted sum of the members' drifts, without gradients.

        Args:
            anchors: Held-out anchors, for all members. None: each member's own.
            count: Largest number of anchors, see `AnchorRetention.drift`.
        """
        return float(sum(self.weights[name] * drift for name, drift in self.drifts(anchors, count).items()))

    def check_anchors(self, anchors: Any) -> None:
        """Checks the anchors for all members; see `Retention.check_anchors`."""
        for member in self.members.values():
            member.check_anchors(anchors)

    def examples(self, count: int) -> list[Any]:
        """The first member's examples."""
        return next(iter(self.members.values())).examples(count)


def _shared_by(member: Retention) -> Any:
    """A key that is the same for members that can share a forward."""
    if not isinstance(member, CachedRetention):
        return id(member)
    reading, sampler = member.reading, member._sampler
    return (
        id(member.model), id(member.cache), member.batch_size, member.seed, sampler.rank, sampler.world_size,
        reading.forward, reading.autocast, member.device, member.workers,
    )  # fmt: skip


class SharedPass(CachedRetention):
    """Members on one cache, with one forward. Their terms are named "member:term".

    Args:
        members: Name -> closure; with the same model, cache, batch size, seed and reading.
        weights: Name -> w_j.
    """

    def __init__(self, members: Mapping[str, CachedRetention], weights: Mapping[str, float]) -> None:
        first, own = next(iter(members.values())), members.values()
        self._members, self._weights = dict(members), weights
        self.layers = tuple(dict.fromkeys(layer for member in own for layer in member.layers))
        self._features = [name for member in own for name in member._features]
        self._wants_output = any(member._wants_output for member in own)
        super().__init__(
            first.model,
            first.cache,
            first.batch_size,
            reading=first.reading,
            workers=first.workers,
            seed=first.seed,
            strict=False,  # the members check
            device=first._device,
        )
        self._sampler, self._mean, self.shared = first._sampler, first._mean, first.shared

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Shares the anchors in each member; see `AnchorRetention.shard`."""
        super().shard(rank, world_size, mean)
        for member in self._members.values():
            member.shard(rank, world_size, mean)

    def _put_together(self, terms: Mapping[str, Any]) -> DriftOfEach:
        parts = {name: member._put_together(self._of(name, terms)) for name, member in self._members.items()}
        weighted = [(self._weights[name], part) for name, part in parts.items()]
        each = torch.stack([weight * part.each for weight, part in weighted]).sum(0)
        return DriftOfEach(sum(weight * part.value for weight, part in weighted), each, parts)

    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        return {
            f"{name}:{term}": value
            for name, member in self._members.items()
            for term, value in member._compare(outcome, batch).items()
        }

    def _of(self, name: str, terms: Mapping[str, Any]) -> dict[str, Any]:
        return {key.removeprefix(f"{name}:"): x for key, x in terms.items() if key.startswith(f"{name}:")}

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        parts = [self._weights[name] * self._members[name]._combine(self._of(name, terms)) for name in self._members]
        return torch.stack(parts).sum()

    def _check_once(self, values: Mapping[str, Tensor], batch: AnchorBatch) -> None:
        for name, member in self._members.items():
            member._check_once(self._of(name, values), batch)

    def _check_kind(self, cache: AnchorCache) -> None:
        for member in self._members.values():
            member._check_kind(cache)
