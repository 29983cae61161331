"""Several retention closures as one: a weighted sum of their losses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .cache import AnchorBatch, AnchorCache
from .forwards import Outcome
from .retention import AnchorRetention, CachedRetention

__all__ = ["CombinedRetention", "SharedPass"]


class CombinedRetention:
    """Several kinds of drift under one epsilon.

        L_ret = sum_j w_j L_j

    Members that read the same cache with the same batch size, seed and forward share each batch and its forward, up to
    the deepest layer that any of them needs; others run theirs one after the other, and all their graphs live until the
    backward.

    Example:
        cache = build(model, batches, "anchors/", layers=[8, -1])  # logits, too
        retention = CombinedRetention(
            {"logits": LogitRetention(model, cache), "hidden": HiddenRetention(model, cache)}, weights={"hidden": 0.1}
        )

    Args:
        members: Name -> closure; made for this alone.
        weights: Name -> w_j >= 0; 1 for those not named. Units differ: nats for logits and tokens, shares of variance
            for hidden states.

    Raises:
        ValueError: There is no member, a name is unknown, a weight is out of range, or all are zero.
    """

    def __init__(self, members: Mapping[str, AnchorRetention], weights: Mapping[str, float] | None = None) -> None:
        self.members, given = dict(members), dict(weights or {})
        if not self.members:
            raise ValueError("`members` must name at least one closure. Found none.")
        if unknown := sorted(set(given) - set(self.members)):
            raise ValueError(f"`weights` names {unknown}, but the members are {sorted(self.members)}.")
        self.weights = {name: float(given.get(name, 1.0)) for name in self.members}
        if not all(0.0 <= w < float("inf") for w in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"`weights` must be finite and >= 0, and not all zero. Found {self.weights}.")
        groups: dict[Any, dict[str, AnchorRetention]] = {}
        for name, member in self.members.items():
            groups.setdefault(_shared_by(member), {})[name] = member
        self._parts: list[tuple[float, AnchorRetention]] = []
        for group in groups.values():
            cached = {name: m for name, m in group.items() if isinstance(m, CachedRetention)}
            if len(cached) > 1:
                self._parts.append((1.0, SharedPass(cached, self.weights)))
            else:
                self._parts += [(self.weights[name], member) for name, member in group.items()]

    @property
    def position(self) -> int:
        """Number of batches drawn so far; see `AnchorRetention`."""
        return self._parts[0][1].position

    @position.setter
    def position(self, value: int) -> None:
        for _, part in self._parts:
            part.position = value

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the backward may reach."""
        return list({id(p): p for _, part in self._parts for p in part.parameters()}.values())

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """See `AnchorRetention.shard`."""
        for _, part in self._parts:
            part.shard(rank, world_size, mean)

    def __call__(self) -> Tensor:
        """The sum on the next anchors: a float32 scalar with a graph. Advances `position` if it succeeds."""
        start = self.position
        try:
            losses = [part() if weight == 1.0 else weight * part() for weight, part in self._parts]
        except BaseException:
            self.position = start
            raise
        return losses[0] if len(losses) == 1 else torch.stack([x.to(losses[0].device) for x in losses]).sum()

    def drifts(self) -> dict[str, float]:
        """Each member's own drift on all its anchors, without weight."""
        members: dict[str, Any] = dict(self.members)
        return {name: member.drift() for name, member in members.items()}

    def drift(self, cache: AnchorCache | None = None) -> float:
        """The weighted sum over whole caches, without gradients.

        Args:
            cache: Held-out anchors, for all members. None: each member's own.
        """
        members: dict[str, Any] = dict(self.members)
        return float(sum(self.weights[name] * member.drift(cache) for name, member in members.items()))


def _shared_by(member: AnchorRetention) -> Any:
    """What members must have in common to share a forward."""
    if not isinstance(member, CachedRetention):
        return id(member)
    return (
        id(member.model), id(member.cache), member.batch_size, member.seed, member.forward, member.autocast,
        member.device, member._ahead.workers, member._placed, member._sampler.rank, member._sampler.world_size,
    )  # fmt: skip


class SharedPass(CachedRetention):
    """Members on one cache, with one forward. Their terms are named "member:term"."""

    def __init__(self, members: Mapping[str, CachedRetention], weights: Mapping[str, float]) -> None:
        first = next(iter(members.values()))
        placed = {"rank": first._sampler.rank, "world_size": first._sampler.world_size} if first._placed else {}
        self._members = dict(members)
        self._weights = {name: weights[name] for name in members}
        self.layers = tuple(dict.fromkeys(layer for member in members.values() for layer in member.layers))
        super().__init__(
            first.model,
            first.cache,
            first.batch_size,
            workers=first._ahead.workers,
            forward=first.forward,
            seed=first.seed,
            autocast=first.autocast,
            device=first._device,
            **placed,
        )

    def _features(self) -> list[str]:
        return [name for member in self._members.values() for name in member._features()]

    def _compares_output(self) -> bool:
        return any(member._compares_output() for member in self._members.values())

    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        return {
            f"{name}:{term}": value
            for name, member in self._members.items()
            for term, value in member._compare(outcome, batch).items()
        }

    def _of(self, name: str, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}:"): x for key, x in terms.items() if key.startswith(f"{name}:")}

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        parts = [self._weights[name] * self._members[name]._combine(self._of(name, terms)) for name in self._members]
        return torch.stack(parts).sum()

    def _check_first(self, values: Mapping[str, Tensor], batch: AnchorBatch) -> None:
        for name, member in self._members.items():
            member._mean = self._mean
            member._check_first(self._of(name, values), batch)

    def _check_kind(self, cache: AnchorCache) -> None:
        for member in self._members.values():
            member._check_kind(cache)
