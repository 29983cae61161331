"""The 2x2 decision of one step: from inner products of two gradients to the coefficients of their merge. Pure.

    s_tt = <g_t, g_t>,  s_rr = <g_r, g_r>,  s_tr = <g_t, g_r>,  cos = s_tr / sqrt(s_tt s_rr)
    p    = s_tr / s_rr where the projection is active and cos < conflict_threshold, else 0
    g    = a g_t + w g_r

    merge            a      w
    weighted         1      lambda - p
    equal            0.5    0.5 (1 - p)
    task_priority    1      min(lambda, 1) - p

Tensors that share a decision carry the same label, 0, 1, ...; `labels_of` gives them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Decision",
    "Gram",
    "Granularity",
    "Merge",
    "Products",
    "Weights",
    "cap_of",
    "decide",
    "labels_of",
    "merged_norm",
    "weights",
]

Merge = Literal["weighted", "equal", "task_priority"]
Granularity = Literal["global", "group", "tensor"]


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of the task gradient (t) and the retention gradient (r).

    Attributes:
        tt: |g_t|^2.
        rr: |g_r|^2.
        tr: <g_t, g_r>.
    """

    tt: float
    rr: float
    tr: float

    @property
    def cos(self) -> float:
        """Cosine between the two gradients; 0 where either of them is zero."""
        scale = math.sqrt(self.tt) * math.sqrt(self.rr)
        return self.tr / scale if scale > 0.0 else 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.tt) and math.isfinite(self.rr) and math.isfinite(self.tr)


class Products(NamedTuple):
    """Inner products per label: float64 arrays of shape `[n_labels]`."""

    tt: NDArray[np.float64]
    rr: NDArray[np.float64]
    tr: NDArray[np.float64]

    def gram(self, label: int | None = None) -> Gram:
        """Those of one label, or their sum."""
        chosen = slice(None) if label is None else slice(label, label + 1)
        return Gram(*(float(column[chosen].sum()) for column in self))

    def unscaled(self, scale: float) -> "Products":
        """Those of r, where these are of `scale` * r."""
        return Products(self.tt, self.rr / scale**2, self.tr / scale)


class Weights(NamedTuple):
    """Coefficients of the merge g = task * g_t + retention * g_r."""

    task: float
    retention: float
    projected: bool

    def of_scaled(self, scale: float) -> "Weights":
        """For `scale` * g_r in the place of g_r."""
        return self._replace(retention=self.retention / scale)


def weights(gram: Gram, *, lam: float, project: bool, conflict_threshold: float, merge: str) -> Weights:
    """The coefficients of one label, by the table above.

    Args:
        gram: Its inner products.
        lam: The multiplier, >= 0.
        project: Whether the projection may act at all.
        conflict_threshold: It acts where the cosine is below this.
        merge: "weighted", "equal" or "task_priority".

    Raises:
        ValueError: If `merge` is unknown.
    """
    projected = project and gram.rr > 0.0 and gram.tt > 0.0 and gram.cos < conflict_threshold
    p = gram.tr / gram.rr if projected else 0.0
    if merge == "weighted":
        return Weights(1.0, lam - p, projected)
    if merge == "equal":
        return Weights(0.5, 0.5 * (1.0 - p), projected)
    if merge == "task_priority":
        return Weights(1.0, min(lam, 1.0) - p, projected)
    raise ValueError(f"`merge` must be one of {', '.join(map(repr, get_args(Merge)))}. Found merge={merge!r}.")


def cap_of(gram: Gram, rho: float) -> float:
    """The largest lambda with lambda |g_r| <= rho |g_t|; inf where g_r is zero."""
    return rho * math.sqrt(gram.tt) / math.sqrt(gram.rr) if gram.rr > 0.0 else math.inf


class Decision(NamedTuple):
    """What one step does.

    Attributes:
        coefficients: One entry per label.
        norm: Norm of the gradient that the coefficients give.
        conflict: Share of labels whose cosine is below the threshold.
        projected: Share of labels in which the projection acts.
        clipped: Whether `max_norm` scaled the coefficients.
    """

    coefficients: list[Weights]
    norm: float
    conflict: float
    projected: float
    clipped: bool


def decide(
    products: Products,
    *,
    lam: float,
    project: bool,
    conflict_threshold: float,
    merge: str,
    max_norm: float | None = None,
) -> Decision:
    """The coefficients of every label, scaled so that the merged gradient's norm is at most `max_norm`.

    The norm needs no look at a gradient: |a g_t + w g_r|^2 = a^2 s_tt + 2 a w s_tr + w^2 s_rr, summed over the labels.

    Args:
        products: Inner products per label.
        lam: The multiplier.
        project: Whether the projection may act.
        conflict_threshold: See `weights`.
        merge: See `weights`.
        max_norm: Cap on the norm; None for no cap.
    """
    grams = [products.gram(label) for label in range(len(products.tt))]
    chosen = [
        weights(gram, lam=lam, project=project, conflict_threshold=conflict_threshold, merge=merge) for gram in grams
    ]
    norm = merged_norm(grams, chosen)
    clipped = max_norm is not None and norm > max_norm
    if max_norm is not None and clipped:
        scale = max_norm / norm
        chosen = [Weights(c.task * scale, c.retention * scale, c.projected) for c in chosen]
        norm = max_norm
    n = max(len(grams), 1)
    conflict = sum(gram.cos < conflict_threshold for gram in grams) / n
    return Decision(chosen, norm, conflict, sum(c.projected for c in chosen) / n, clipped)


def merged_norm(grams: Sequence[Gram], coefficients: Sequence[Weights]) -> float:
    """|a g_t + w g_r| over all labels, in closed form."""
    square = sum(
        c.task**2 * gram.tt + 2.0 * c.task * c.retention * gram.tr + c.retention**2 * gram.rr
        for gram, c in zip(grams, coefficients, strict=True)
    )
    return math.sqrt(max(square, 0.0))  # cancellation may leave a small negative number


def labels_of(granularity: str, group_sizes: Sequence[int]) -> list[int]:
    """The label of every tensor.

    Args:
        granularity: "global" (one label), "group" (one per parameter group) or "tensor".
        group_sizes: Number of parameters of each group, in order.

    Raises:
        ValueError: If `granularity` is unknown.
    """
    n = sum(group_sizes)
    if granularity == "global":
        return [0] * n
    if granularity == "tensor":
        return list(range(n))
    if granularity == "group":
        return [label for label, size in enumerate(group_sizes) for _ in range(size)]
    allowed = ", ".join(map(repr, get_args(Granularity)))
    raise ValueError(f"`granularity` must be one of {allowed}. Found granularity={granularity!r}.")
