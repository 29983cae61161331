"""Retention of one output, whatever its kind: which output, at which positions, of which shape."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from .cache import AnchorBatch, AnchorCache
from .cached import CachedRetention, CachedSettings
from .forwards import Outcome
from .kinds import Output
from .masks import Mask, select, valid_positions, within
from .outputs import FEATURES, feature, if_grown
from .pieces import LogitRows, rows_at
from .reading import AnchorMismatchError

__all__ = ["OneOutput"]


class OneOutput(CachedRetention):
    """Distance of one output of a model from the cached one; a subclass sets its kind, and how to compare it.

    Args:
        model, cache, batch_size, **settings: Arguments of `CachedRetention`.
        output: Name of the output, if the cache has several of this kind. None: the only one.
        mask: Mask as in `Reading`, to compare at some of the cached positions only.

    Raises:
        ValueError: The cache has no such output, or fewer anchors than a batch.
    """

    kind: str  # kind of the outputs that it compares

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        output: str | None = None,
        mask: Mask | None = None,
        **settings: Unpack[CachedSettings],
    ) -> None:
        self.mask = mask
        self.output = self._name(cache) if output is None else output
        self._features = [*(feature(name, self.output) for name in FEATURES[self.kind]), "mask"]
        super().__init__(model, cache, batch_size, **settings)

    def _name(self, cache: AnchorCache) -> str:
        names = [name for name, output in cache.features.outputs.items() if output.kind == self.kind]
        if len(names) > 1:
            raise ValueError(
                f"{type(self).__name__} compares one output. {cache.path} has {names} of {self.kind}: say which, "
                f"output={names[0]!r}, and make one closure of each."
            )
        return names[0] if names else ""

    def _check_kind(self, cache: AnchorCache) -> None:
        held = cache.features.outputs.get(self.output)
        if held is None or held.kind != self.kind:
            named = f" called {self.output!r}" if self.output else ""
            raise ValueError(
                f"{type(self).__name__} needs a cache with an output of {self.kind}{named}. {cache.path} has "
                f"{cache.describe()}: cache.retention(model) is the closure that fits it, or build it with "
                f'output="{self.kind}".'
            )
        own = getattr(self, "cache", cache).features.outputs[self.output]  # held-out anchors come later
        if held != own:
            raise AnchorMismatchError(
                f"The anchors in {cache.path} must hold {own.describe()} in dimension {own.dim}, as {self.cache.path} "
                f"does. Found {held.describe()} in dimension {held.dim}: build them with the same model and "
                f"class_dim={own.dim}."
            )

    @property
    def held(self) -> Output:
        """The output as the cache has it."""
        return self.cache.features.outputs[self.output]

    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        rows, features = outcome.outputs[self.output], batch.features
        names = {name: feature(name, self.output) for name in FEATURES[self.kind]}
        teacher = {name: features[key] for name, key in names.items() if key in features}
        joined = names[next(iter(teacher))] in self.cache.joined_features
        valid = features["mask"] if joined else None
        shape = tuple(next(iter(teacher.values())).shape[:-1] if valid is None else valid.shape)
        found, stored = (*rows.shape, rows.values.shape[-1]), (*shape, self.held.size)
        if found != stored:
            raise AnchorMismatchError(
                f"The model gives {found}, the cache {self.cache.path} was built with {stored}: another model, or "
                f"another `forward=`.{if_grown(found, replace(self.held, dim=len(shape)), batch.inputs)}"
            )
        student = rows.values
        if valid is None:
            teacher = {name: x.flatten(0, len(shape) - 1) for name, x in teacher.items()}
        if self.mask is not None:
            wanted = valid_positions(self.model, batch.inputs, self.mask)
            assert wanted is not None
            kept = within(wanted, torch.ones(shape, dtype=torch.bool) if valid is None else valid)
            student = rows_at(student, kept)
            teacher = {name: select(x, kept) for name, x in teacher.items()}
        return {self.kind: self._distance(student, teacher)}

    @abstractmethod
    def _distance(self, student: LogitRows, teacher: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Mean distance over positions `[positions, V]`, and their number; (0, 0) without any."""
