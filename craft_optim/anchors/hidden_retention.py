"""Retention of hidden states: their distance from the cached ones."""

from collections.abc import Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from . import losses
from .cache import AnchorBatch, AnchorCache
from .cached import CachedRetention, CachedSettings
from .capture import Layer, Spans, pool, positions, resolve_layers
from .forwards import Outcome
from .manifest import tap_key
from .masks import rows, select, within
from .passes import to_device
from .reading import AnchorMismatchError

__all__ = ["HiddenRetention"]

_SHARES = "shares of the teacher's"
_UNITS = {"mse": f"{_SHARES} variance", "cosine": "cosine distance", "l1": f"{_SHARES} deviation"}


class HiddenRetention(CachedRetention):
    """Distance of hidden states from the teacher's on the anchors, as a weighted mean over layers and spans.

        L_ret = sum_j w_j L_j / sum_j w_j,   L_j = |h_j - h0_j|^2 / Var[h0_j]   (loss="mse")

    Var is the variance of the teacher's features over the cached anchors, so 1 means that features have moved as far as
    the teacher's own are spread. `losses` has the formulas. The forward ends at the deepest layer: only measured layers
    are held, later ones are free to move.

    Args:
        model, cache, batch_size, **settings: Arguments of `CachedRetention`. The cache must hold layers. With "l1" the
            tolerance is the square root of that by precision.
        loss: "mse" and "l1" in units of the teacher's variance and standard deviation, or "cosine".
        layers: Cached layers to compare. None: all of them.
        weights: Layer, or (layer, span), -> weight >= 0; 1 if not named.
        spans: Function or spans as in `Reading`, to compare at some of the cached positions only.

    Raises:
        ValueError: The cache has no such layers, their features do not vary over the anchors, a weight is out of range,
            or there are fewer anchors than a batch.
    """

    _wants_output = False

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        loss: str = "mse",
        layers: Iterable[Layer] | None = None,
        weights: Mapping[Layer | tuple[Layer, str], float] | None = None,
        spans: Spans | None = None,
        **settings: Unpack[CachedSettings],
    ) -> None:
        if loss not in _UNITS:
            raise ValueError(f"`loss` must be one of {tuple(_UNITS)}. Found {loss!r}.")
        self.distance, self.unit, self.spans = loss, _UNITS[loss], spans
        # An imported cache may count layers from the end
        self._cached = dict(zip(resolve_layers(model, cache.features.layers), cache.features.layers, strict=True))
        self.layers = tuple(self._cached) if layers is None else resolve_layers(model, layers)
        self.pooling = dict(cache.features.pooling)
        super().__init__(model, cache, batch_size, **settings)
        if not self.layers:
            raise ValueError("`layers` must name at least one layer. Found none.")
        self.weights = self._weights(dict(weights or {}))
        self._features = [*self.weights, *(f"span.{span}" for span in self.pooling)]
        flat = [key for key in self.weights if not cache.features.variances.get(key, 0.0) > 0.0]
        if flat and loss != "cosine":
            raise ValueError(
                f"loss={loss!r} measures in units of the features' variance over the anchors, and {flat} do not "
                f"vary over the {len(cache)} anchors of {cache.path}: use more, and more varied, anchors, other "
                "layers, or loss='cosine'."
            )

    def _weights(self, given: dict[Layer | tuple[Layer, str], float]) -> dict[str, float]:
        weights = {}
        for layer in self.layers:
            for span in self.pooling:
                weight = given.get((layer, span), given.get(layer, 1.0))
                if not 0.0 <= weight < float("inf"):
                    raise ValueError(f"`weights` must be finite and >= 0. Found {weight!r} for layer {layer!r}.")
                weights[tap_key(self._cached[layer], span)] = float(weight)
        known = {*self.layers, *((layer, span) for layer in self.layers for span in self.pooling)}
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"`weights` names {unknown}, but the layers and spans here are {list(weights)}.")
        if not sum(weights.values()) > 0.0:
            raise ValueError(f"`weights` must not all be zero. Found {weights}.")
        return weights

    def _check_kind(self, cache: AnchorCache) -> None:
        missing = [layer for layer in self.layers if self._cached.get(layer) not in cache.features.layers]
        if missing or not cache.features.layers or cache.features.pooling != self.pooling:
            raise ValueError(
                f"HiddenRetention needs a cache with hidden states of layers {list(self.layers)} pooled as "
                f"{self.pooling}. {cache.path} has {cache.describe()}: choose among these, or build it with "
                "`layers=`."
            )

    def _by_precision(self) -> float:
        squared = super()._by_precision()
        return squared**0.5 if self.distance == "l1" else squared

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        weighted = [self.weights[name] * value for name, value in terms.items()]
        return torch.stack(weighted).sum(0) / sum(self.weights[name] for name in terms)

    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        cached = {k.removeprefix("span."): x for k, x in batch.features.items() if k.startswith("span.")}
        masks = cached
        if self.spans is not None:
            given = self.spans(self.model, to_device(batch.inputs, self.device))
            masks = {span: x.bool().cpu() for span, x in given.items()}
        terms = {}
        for layer in self.layers:
            value = outcome.hidden[layer]
            states = positions(value, self.cache.features.batch_dim)
            for span, mode in self.pooling.items():
                key = tap_key(self._cached[layer], span)
                mask, teacher = (masks.get(span), cached.get(span)) if value.ndim == 3 else (None, None)
                if mask is None and span != "all" and value.ndim == 3:
                    raise AnchorMismatchError(
                        f"The cache {self.cache.path} does not say which positions the span {span!r} has: pass "
                        "`spans=`, a function of model and batch that does."
                    )
                terms[key] = self._distance(key, states, mask, teacher, mode, batch.features[key])
        return terms

    def _distance(
        self, key: str, states: Tensor, mask: Tensor | None, cached: Tensor | None, mode: str, teacher: Tensor
    ) -> tuple[Tensor, int]:
        """Distance at one layer and span, and the number of vectors compared.

        Args:
            key: Name of the feature.
            states: The model's hidden states, `[B, T, D]` or `[B, D]`.
            mask: The span's positions, on the CPU; None: all.
            cached: The span's positions in the cache, at which its unpooled features are stored.
            mode: Pooling mode.
            teacher: The cached features.
        """
        if mask is not None and mask.shape != states.shape[:2]:
            raise AnchorMismatchError(
                f"The model has {tuple(states.shape[:2])} positions at {key}, its span a mask of "
                f"{tuple(mask.shape)}: another `forward=` or `spans=` than in `build`."
            )
        if mode == "none" and mask is not None and cached is not None:
            student = rows(states, mask)
            if mask is not cached:
                teacher = select(teacher, within(mask, cached))
        elif states.ndim == 3:
            student = pool(states, None if mask is None else mask.to(states.device, non_blocking=True), mode)
        else:
            student = states
        if student.shape != teacher.shape:
            raise AnchorMismatchError(
                f"The model gives {tuple(student.shape)} at {key}, the cache {self.cache.path} was built with "
                f"{tuple(teacher.shape)}: another model, another layer of that number, or another `forward=`."
            )
        if not len(student):
            return student.float().sum(), 0
        teacher = teacher.to(student.device, non_blocking=True)
        with torch.autocast(student.device.type, enabled=False):
            if self.distance == "cosine":
                distance = losses.feature_cosine(student, teacher)
            else:
                function = losses.feature_mse if self.distance == "mse" else losses.feature_l1
                distance = function(student, teacher, variance=self.cache.features.variances[key])
        return distance, student.numel() // student.shape[-1]
