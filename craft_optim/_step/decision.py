"""The decision of one step: from inner products of gradients to the coefficients of their merge. Pure.

For the task gradient g_t and the retention gradients g_1 ... g_m of m >= 1 constraints:

    K_ij = <g_i, g_j>,  s_j = <g_t, g_j>,  cos_j = s_j / (|g_t| |g_j|)
    q    = argmin_{q >= 0} q' K q / 2 + c' q  over the constraints that may be projected, else 0   (`cone`)
    c_j  = s_j where cos_j < threshold, else max(s_j, 0)
    g    = a g_t + sum_j w_j g_j

    merge            a            w_j
    weighted         1            lambda_j + q_j
    equal            1 / (m + 1)  (1 + q_j) / (m + 1)
    task_priority    1            min(lambda_j, 1) + q_j

With one constraint q = -s_1 / K_11 where the gradients conflict. With threshold 0, g_t + sum_j q_j g_j is the direction
nearest to g_t without conflict with a violated constraint. With a threshold below 0, weaker conflicts do not count, but
removing a stronger one does not make them worse.

**The cap.** Where all constraints hold, the optimum has g_t + sum_j lambda_j g_j = 0 with lambda_j >= 0 (KKT), hence
|sum_j lambda_j g_j| = |g_t|. For each j then lambda_j |g_j + sum_i (lambda_i / lambda_j) g_i| = |g_t|, so that

    lambda_j <= |g_t| / d_j,        d_j = min_{q >= 0} |g_j + sum_{i != j} q_i g_i|

These bounds, times rho >= 1, rule out no optimum; nor do halves of them, the long-run limit of `MultiplicativePI`, if
rho >= 2. lambda_j <= rho |g_t| / |g_j|, the same bound if no two constraints conflict, would rule out some. Each
multiplier has its own bound, so one that grows takes nothing from the others. As the bounds do not keep the sum small,
all are then scaled alike to
|sum_j lambda_j g_j| <= rho |g_t|.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cone import distance_to_cone, nearest_in_cone
from .rules import Merge, Rules

__all__ = ["MOST", "Decision", "Gram", "Products", "Weights", "decide"]

# Most constraints. Each costs a forward and a backward; the program above would be fast enough for more.
MOST = 8
# |g_j|^2 / |g_t|^2 below which nothing is removed: the direction has few bits, and float32 cannot hold q.
_TINY = 2.0**-200
# Largest multiplier: kernels hold coefficients in float32.
_LARGEST = 2.0**100


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
        """Cosine between the two gradients; 0 if either is zero."""
        scale = math.sqrt(self.tt) * math.sqrt(self.rr)
        return self.tr / scale if scale > 0.0 else 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.tt) and math.isfinite(self.rr) and math.isfinite(self.tr)


@dataclass(frozen=True)
class Products:
    """Inner products of all gradients.

    Attributes:
        matrix: Float64 `[m + 1, m + 1]`, symmetric; row and column 0 are the task gradient's.
    """

    matrix: NDArray[np.float64]

    @cached_property
    def grams(self) -> list[Gram]:
        """The `Gram` of the task gradient with each retention gradient."""
        (tt, *tr), *rows = self.matrix.tolist()
        return [Gram(tt, row[j], x) for j, (row, x) in enumerate(zip(rows, tr, strict=True), 1)]

    @property
    def between(self) -> NDArray[np.float64]:
        """K of the retention gradients, `[m, m]`."""
        return self.matrix[1:, 1:]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.matrix.ravel().tolist()))

    def unscaled(self, scales: Sequence[float]) -> "Products":
        """The products of g_j, from these of `scales[j]` * g_j."""
        if all(scale == 1.0 for scale in scales):
            return self
        by = np.array([1.0, *scales])
        return Products(self.matrix / (by[:, None] * by))

    def caps(self, rho: float) -> list[float]:
        """The bound rho |g_t| / d_j of each multiplier; inf where d_j = 0."""
        task, between = math.sqrt(self.matrix[0, 0]), self.between
        alone = len(between) == 1 or not (between < 0.0).any()  # no two conflict
        distances = [math.sqrt(between[j, j]) if alone else distance_to_cone(between, j) for j in range(len(between))]
        return [rho * task / d if d > 0.0 else math.inf for d in distances]

    def common_factor(self, lams: Sequence[float], rho: float) -> float:
        """The largest factor <= 1 for all multipliers with |sum_j lambda_j g_j| <= rho |g_t|.

        Args:
            lams: The multipliers, each below its cap; with one constraint nothing more is needed.
            rho: Bound on the share of retention.
        """
        if len(lams) == 1 or math.isinf(rho):
            return 1.0
        norm = math.sqrt(max(float(np.array(lams) @ self.between @ np.array(lams)), 0.0))
        bound = rho * math.sqrt(self.matrix[0, 0])
        return bound / norm if norm > bound else 1.0


class Weights(NamedTuple):
    """Coefficients of one merge, task * g_t + retention * g_r."""

    task: float
    retention: float


class Decision(NamedTuple):
    """The merge of one step.

    Attributes:
        merges: Coefficients of successive merges, one per constraint: a g_t + w_1 g_1, that + w_2 g_2, ...
        norm: Norm of the merged gradient.
        clipped: True if the cap on the norm scaled the coefficients.
        conflict: For each constraint, True if its cosine with the task gradient is below the threshold.
        projected: For each constraint, True if the projection acts on it.
    """

    merges: list[Weights]
    norm: float
    clipped: bool
    conflict: list[bool]
    projected: list[bool]


def decide(products: Products, *, lams: Sequence[float], project: Sequence[bool], rules: Rules) -> Decision:
    """The coefficients of the merge, scaled so that its norm is at most `rules.max_grad_norm`.

    The norm follows from the inner products, without reading a gradient.

    Args:
        products: Inner products, finite.
        lams: The multipliers, >= 0.
        project: For each constraint, True if the conflicting component may be removed.
        rules: The rules of the merge.
    """
    grams = products.grams
    conflict = [gram.cos < rules.conflict_threshold for gram in grams]
    q, projected = _projection(products, grams, conflict, project)
    a, w = _MERGES[rules.merge]([min(lam, _LARGEST) for lam in lams], q)
    norm = _norm(products, grams, a, w)
    clipped = rules.max_grad_norm is not None and norm > rules.max_grad_norm
    if rules.max_grad_norm is not None and clipped:
        scale = rules.max_grad_norm / norm
        a, w, norm = a * scale, [x * scale for x in w], rules.max_grad_norm
    merges = [Weights(a if j == 0 else 1.0, x) for j, x in enumerate(w)]
    return Decision(merges, norm, clipped, conflict, projected)


def _projection(
    products: Products, grams: Sequence[Gram], conflict: Sequence[bool], project: Sequence[bool]
) -> tuple[list[float], list[bool]]:
    """q of each constraint, and True if the projection acts on it."""
    chosen = [
        j
        for j, (gram, may) in enumerate(zip(grams, project, strict=True))
        if may and gram.tt > 0.0 and gram.rr > 0.0 and gram.rr > gram.tt * _TINY
    ]
    q, projected = [0.0] * len(grams), [False] * len(grams)
    if not any(conflict[j] for j in chosen):
        return q, projected
    if len(chosen) == 1:  # in closed form; a threshold above 0 also removes what helps
        (j,) = chosen
        q[j], projected[j] = -(grams[j].tr / grams[j].rr), True
        return q, projected
    c = [grams[j].tr if conflict[j] else max(grams[j].tr, 0.0) for j in chosen]
    found = nearest_in_cone(products.between[np.ix_(chosen, chosen)][None], np.array([c]))[0]
    for j, x in zip(chosen, found.tolist(), strict=True):
        q[j], projected[j] = x, x > 0.0
    return q, projected


# merge -> (lambdas, q) -> (a, w)
_MERGES: dict[Merge, Callable[[Sequence[float], Sequence[float]], tuple[float, list[float]]]] = {
    "weighted": lambda lams, q: (1.0, [lam + x for lam, x in zip(lams, q, strict=True)]),
    "equal": lambda lams, q: (1.0 / (len(q) + 1), [1.0 / (len(q) + 1) * (1.0 + x) for x in q]),
    "task_priority": lambda lams, q: (1.0, [min(lam, 1.0) + x for lam, x in zip(lams, q, strict=True)]),
}


def _norm(products: Products, grams: Sequence[Gram], a: float, w: Sequence[float]) -> float:
    """|a g_t + sum_j w_j g_j|."""
    square = a**2 * grams[0].tt
    for x, gram in zip(w, grams, strict=True):
        square += 2.0 * a * x * gram.tr
        square += x**2 * gram.rr
    for i, j in combinations(range(len(w)), 2):
        square += 2.0 * w[i] * w[j] * float(products.between[i, j])
    return math.sqrt(max(square, 0.0))  # cancellation may leave a small negative number
