"""Drift of a model from its teacher's outputs on anchors: total, per layer, and per anchor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.cached import DriftOfEach
from craft_optim.anchors.combined import SharedPass
from craft_optim.anchors.fingerprint import compare_fingerprints, fingerprint
from craft_optim.anchors.manifest import tap_key
from craft_optim.anchors.progress import anchor_bar

__all__ = ["QUANTILES", "Drift", "LayerDrift", "Spread", "drifts", "spread_over", "verdict"]

QUANTILES = {"5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class LayerDrift:
    """Drift of the hidden states of one layer, over one span of positions.

    Attributes:
        layer: Number or module name of the layer, as in the cache.
        span: Name of the span.
        pooling: Pooling of the span's positions.
        value: Mean over all compared vectors: one per anchor if pooled.
        each: The same for each anchor, in order.
    """

    layer: int | str
    span: str
    pooling: str
    value: float
    each: list[float]


@dataclass(frozen=True)
class Drift:
    """Drift of a model from a cache, by one of the retention closures.

    Attributes:
        kind: One of the cache's `kinds`.
        unit: Unit of all numbers here, in words.
        value: Mean over the valid positions of all measured anchors, so that long anchors count more: the result of the
            closure's `drift()`, which training holds at epsilon. For hidden states the mean of such means over layers
            and spans.
        each: The same for each anchor alone, in order.
        tolerance: Largest drift that may be rounding; None if the teacher's own is not 0.
        layers: Drift of each layer and span of hidden states.
    """

    kind: str
    unit: str
    value: float
    each: list[float]
    tolerance: float | None
    layers: tuple[LayerDrift, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Spread of single anchors' numbers; every anchor counts once.

    Attributes:
        anchor_mean: Mean of the numbers.
        quantiles: Name as in `QUANTILES` -> value, interpolated linearly between neighbours.
        over: Share of anchors whose number is above the threshold, or NaN; None without a threshold.
        worst: Anchors with the largest numbers, largest first: (place in the cache, number).
    """

    anchor_mean: float
    quantiles: dict[str, float]
    over: float | None
    worst: list[tuple[int, float]]


def drifts(
    model: nn.Module,
    cache: AnchorCache,
    indices: Sequence[int] | None = None,
    *,
    reading: Reading | None = None,
    batch_size: int = 16,
    progress: bool | None = False,
    title: str = "the model",
) -> list[Drift]:
    """Drift of the model from the cache on these anchors, for each kind that the cache holds.

    Hidden states and values are compared by "mse", in units of the teacher's variance, or by "cosine" if that variance
    is zero.

    Args:
        model: The model on its device; its flags do not change.
        cache: Anchors of this model or an earlier state of it.
        indices: Places of the anchors; at least one. None: all.
        reading: The `Reading` of `build`. None: the cache's own.
        batch_size: Anchors per forward.
        progress: True to show a bar. None: only on a terminal.
        title: Name of the model on the bar.

    Raises:
        ValueError: The model does not fit the cache (`AnchorMismatchError`: other shapes than its teacher's, another
            reading), or an anchor has no valid position.

    Cost: one forward without gradients per batch, up to the deepest layer if only hidden states are compared, and the
    comparison of each anchor. Memory: as for `drift()` of the closures.
    """
    places = list(range(len(cache))) if indices is None else list(indices)
    if not places or batch_size < 1:
        raise ValueError(f"`indices` and `batch_size` must be at least one. Found {len(places)} and {batch_size}.")
    settings = {"reading": reading, "workers": 0, "strict": False}
    varies = all(variance > 0.0 for variance in cache.features.variances.values())
    own = {"hidden": {"loss": "mse" if varies else "cosine"}}
    own |= {name or "values": {"loss": "cosine"} for name, scales in cache.features.scales.items() if not any(scales)}
    members = {kind: cache.retention(model, kind, 1, **settings, **own.get(kind, {})) for kind in cache.kinds}
    with anchor_bar(progress, title) as (bar, _):
        shared = SharedPass(members, dict.fromkeys(members, 1.0))
        measured = shared.drift_of_each(places, batch_size, lambda size: bar(size, len(places))).parts
    known = any(name == "features.token_logprobs" for name, *_ in cache.tensors())
    return [
        Drift(
            kind,
            members[kind].unit,
            of.value,
            of.each.tolist(),
            members[kind].tolerance if kind != "tokens" or known else None,
            _layers(cache, of) if kind == "hidden" else (),
        )
        for kind, of in measured.items()
    ]


def _layers(cache: AnchorCache, measured: DriftOfEach) -> tuple[LayerDrift, ...]:
    return tuple(
        LayerDrift(layer, span, pooling, part.value, part.each.tolist())
        for layer in cache.features.layers
        for span, pooling in cache.features.pooling.items()
        for part in [measured.parts[tap_key(layer, span)]]
    )


def spread_over(
    each: Sequence[float], places: Sequence[int] | None = None, threshold: float | None = None, worst: int = 5
) -> Spread:
    """Spread of the numbers of single anchors.

    Args:
        each: Number of each anchor; at least one.
        places: The anchors' places in the cache. None: 0, 1, 2, ...
        threshold: Number above which anchors are counted.
        worst: Number of worst anchors to name.

    Example:
        >>> spread = spread_over([0.1, 0.4, 0.2, 0.3], threshold=0.25, worst=1)
        >>> spread.over, spread.worst, round(spread.quantiles["50%"], 2)
        (0.5, [(1, 0.4)], 0.25)
    """
    numbers = np.asarray(each, dtype=np.float64)
    places = range(len(numbers)) if places is None else places
    ranked = sorted(zip(places, numbers.tolist(), strict=True), key=lambda pair: (not math.isnan(pair[1]), -pair[1]))
    return Spread(
        float(numbers.mean()),
        {name: float(np.quantile(numbers, q)) for name, q in QUANTILES.items()},
        None if threshold is None else float(np.mean(~(numbers <= threshold))),
        ranked[:worst],
    )


def verdict(cache: AnchorCache, model: nn.Module, measured: Sequence[Drift]) -> tuple[bool, str]:
    """True if the model agrees with the cache, and a sentence about it."""
    why = None if cache.fingerprint is None else compare_fingerprints(cache.fingerprint, fingerprint(model))
    known = [drift for drift in measured if drift.tolerance is not None]
    if not known:
        return False, "The cache does not say how likely the teacher found its tokens: 0 is not to be expected."
    if all(abs(drift.value) <= drift.tolerance for drift in known if drift.tolerance is not None):
        return True, f"The cache fits this model: its drift is rounding{f', although {why}' if why else ''}."
    far = ", ".join(f"{drift.value:.3g} {drift.unit}" for drift in known)
    if why is not None:
        return False, f"The model has drifted from the cache by {far}: {why}."
    same = "not known to be those" if cache.fingerprint is None else "those"
    return False, (
        f"The model does not reproduce the cache: {far}. Its weights are {same} of the teacher; compare the "
        "`forward=`, the mask, the precision and the attention implementation with those of the build."
    )
