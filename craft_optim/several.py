"""The decision of one step under m constraints: from inner products of gradients to the coefficients of their merge.

Pure. For m = 1 it is that of `craft_optim.decision`, bit for bit. Per label:

    K_ij = <g_i, g_j>,  s_j = <g_t, g_j>,  cos_j = s_j / (|g_t| |g_j|)
    q    = argmin_{q >= 0} q' K q / 2 + c' q  over the constraints that may be projected, else 0   (`craft_optim.cone`)
    c_j  = s_j where cos_j < conflict_threshold, else max(s_j, 0)
    g    = a g_t + sum_j w_j g_j

    merge            a            w_j
    weighted         1            lambda_j + q_j
    equal            1 / (m + 1)  (1 + q_j) / (m + 1)
    task_priority    1            min(lambda_j, 1) + q_j

With threshold 0, g_t + sum_j q_j g_j is the direction nearest to g_t that works against no violated constraint. With a
threshold below 0, weaker conflicts do not count, but removing a stronger one does not make them worse.

**The cap.** Where all constraints hold, the optimum has g_t + sum_j lambda_j g_j = 0 with lambda_j >= 0 (KKT), hence
|sum_j lambda_j g_j| = |g_t|. For any of them, lambda_j |g_j + sum_i (lambda_i / lambda_j) g_i| = |g_t| then, so that

    lambda_j <= |g_t| / d_j,        d_j = min_{q >= 0} |g_j + sum_{i != j} q_i g_i|

These bounds, times rho >= 1, rule out no optimum; lambda_j <= rho |g_t| / |g_j|, which is the same as long as no two
constraints conflict, would rule out some. Each multiplier is held to its own bound, which one that runs away cannot
take from the others. The bounds together do not keep the sum small, so that all are then scaled alike to
|sum_j lambda_j g_j| <= rho |g_t|.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from craft_optim.cone import distance_to_cone, nearest_in_cone
from craft_optim.decision import Decision, Gram, Products, Weights, cap_of, decide

__all__ = ["MOST", "ProductsOfSeveral", "caps", "common_factor", "decide_several", "pairs_of"]

# Constraints. Each is a forward and a backward; the programme above would still be fast enough.
MOST = 8


@dataclass(frozen=True)
class ProductsOfSeveral:
    """Inner products per label of task and retention gradients.

    Attributes:
        with_task: Of the task gradient and each retention gradient.
        between: (i, j), i < j -> <g_i, g_j>, of shape `[n_labels]`.
    """

    with_task: Sequence[Products]
    between: Mapping[tuple[int, int], NDArray[np.float64]]

    @property
    def finite(self) -> bool:
        """Whether all sums over the labels are."""
        return all(gram.finite for gram in self.grams) and all(math.isfinite(tr.sum()) for tr in self.between.values())

    @cached_property
    def grams(self) -> list[Gram]:
        """Of the task gradient and each retention gradient, over all labels."""
        return [products.gram() for products in self.with_task]

    def total(self) -> NDArray[np.float64]:
        """Over all labels, `[m + 1, m + 1]`; the task gradient is the first."""
        grams = self.grams
        out = np.empty((len(grams) + 1, len(grams) + 1))
        out[0, 0] = grams[0].tt
        for j, gram in enumerate(grams, 1):
            out[j, j], out[0, j], out[j, 0] = gram.rr, gram.tr, gram.tr
        for (i, j), products in self.between.items():
            out[i + 1, j + 1] = out[j + 1, i + 1] = products.sum()
        return out

    def of_labels(self) -> NDArray[np.float64]:
        """`[n_labels, m + 1, m + 1]`; the task gradient is the first."""
        m = len(self.with_task)
        out = np.empty((len(self.with_task[0].tt), m + 1, m + 1))
        out[:, 0, 0] = self.with_task[0].tt
        for j, products in enumerate(self.with_task, 1):
            out[:, j, j] = products.rr
            out[:, 0, j] = out[:, j, 0] = products.tr
        for (i, j), tr in self.between.items():
            out[:, i + 1, j + 1] = out[:, j + 1, i + 1] = tr
        return out

    def unscaled(self, scales: Sequence[float]) -> "ProductsOfSeveral":
        """Those of r_j, where these are of `scales[j]` * r_j."""
        if all(scale == 1.0 for scale in scales):
            return self
        between = {(i, j): tr / (scales[i] * scales[j]) for (i, j), tr in self.between.items()}
        return ProductsOfSeveral([x.unscaled(s) for x, s in zip(self.with_task, scales, strict=True)], between)


def caps(products: ProductsOfSeveral, rho: float) -> list[float]:
    """rho |g_t| / d_j of each constraint; inf where d_j = 0.

    Args:
        products: Inner products per label.
        rho: Bound on the share of retention.
    """
    grams = products.grams
    if len(grams) == 1:
        return [cap_of(grams[0], rho)]
    between, task = products.total()[1:, 1:], math.sqrt(grams[0].tt)
    distances = [distance_to_cone(between, j) for j in range(len(grams))]
    return [rho * task / d if d > 0.0 else math.inf for d in distances]


def common_factor(products: ProductsOfSeveral, lams: Sequence[float], rho: float) -> float:
    """The largest factor <= 1 for all multipliers with |sum_j lambda_j g_j| <= rho |g_t|.

    Args:
        products: Inner products per label.
        lams: The multipliers, each below its cap.
        rho: Bound on the share of retention.
    """
    if len(lams) == 1 or math.isinf(rho):  # the cap alone has seen to it
        return 1.0
    total = products.total()
    norm = math.sqrt(max(float(np.array(lams) @ total[1:, 1:] @ np.array(lams)), 0.0))
    bound = rho * math.sqrt(total[0, 0])
    return bound / norm if norm > bound else 1.0


def decide_several(
    products: ProductsOfSeveral,
    *,
    lams: Sequence[float],
    project: Sequence[bool],
    conflict_threshold: float,
    merge: str,
    max_norm: float | None = None,
) -> list[Decision]:
    """One decision per constraint, for merges one after the other: a g_t + w_1 g_1, then that + w_2 g_2, and so on.

    Args:
        products: Inner products per label.
        lams: The multipliers.
        project: Of each constraint, whether the projection may remove what is against it.
        conflict_threshold: See the module; with more than one constraint at most 0.
        merge: "weighted", "equal" or "task_priority".
        max_norm: Cap on the norm of the merged gradient; None for no cap.

    Returns:
        `norm` and `clipped` in each are those of the whole.
    """
    if len(lams) == 1:
        (first,), (lam,), (may,) = products.with_task, lams, project
        alone = decide(
            first, lam=lam, project=may, conflict_threshold=conflict_threshold, merge=merge, max_norm=max_norm
        )
        return [alone]
    matrices = products.of_labels()
    size = np.sqrt(np.diagonal(matrices, axis1=1, axis2=2))
    scale = size[:, :1] * size[:, 1:]
    with_task = matrices[:, 0, 1:]
    conflict = np.where(scale > 0.0, with_task / np.where(scale > 0.0, scale, 1.0), 0.0) < conflict_threshold
    q = np.zeros_like(with_task)
    violated = np.flatnonzero(project)
    if conflict[:, violated].any():
        c = np.where(conflict, with_task, np.maximum(with_task, 0.0))[:, violated]
        q[:, violated] = nearest_in_cone(matrices[:, 1:, 1:][:, violated][:, :, violated], c)
    task, retention = _merged(merge, np.array(lams), q)

    whole = np.concatenate([np.full((len(q), 1), task), retention], axis=1)
    norm = math.sqrt(max(np.einsum("ni,nij,nj->", whole, matrices, whole), 0.0))
    clipped = max_norm is not None and norm > max_norm
    if max_norm is not None and clipped:
        task, retention, norm = task * max_norm / norm, retention * max_norm / norm, max_norm
    return [
        Decision(
            [
                Weights(task if j == 0 else 1.0, w, moved)
                for w, moved in zip(retention[:, j].tolist(), (q[:, j] > 0.0).tolist(), strict=True)
            ],
            norm,
            float(conflict[:, j].mean()),
            float((q[:, j] > 0.0).mean()),
            clipped,
        )
        for j in range(len(lams))
    ]


def _merged(merge: str, lams: NDArray[np.float64], q: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The coefficients a and w, `[n_labels, m]`."""
    if merge == "weighted":
        return 1.0, lams + q
    if merge == "equal":
        share = 1.0 / (len(lams) + 1)
        return share, (1.0 + q) * share
    if merge == "task_priority":
        return 1.0, np.minimum(lams, 1.0) + q
    raise ValueError(f"`merge` must be one of 'weighted', 'equal', 'task_priority'. Found merge={merge!r}.")


def pairs_of(m: int) -> list[tuple[int, int]]:
    """(i, j), i < j, of m constraints."""
    return list(combinations(range(m), 2))
