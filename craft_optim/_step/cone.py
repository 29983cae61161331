"""Cone: the direction nearest to a gradient without conflict with several others, a small quadratic program. Pure.

For gradients g_j with K_ij = <g_i, g_j>, the solution q >= 0 minimises

    q' K q / 2 + c' q

With c_j = <g, g_j>, v = g + sum_j q_j g_j is the vector nearest to g that has <v, g_j> >= 0 for all j (GEM, Lopez-Paz &
Ranzato 2017, arXiv:1706.08840, with gradients of earlier tasks).

Some entries of the solution are zero, and the others solve K q = -c among themselves. With few gradients every subset
can be tried: the one with q >= 0 and the least value is the solution.
"""

import math
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

__all__ = ["distance_to_cone", "nearest_in_cone"]

# Least eigenvalue of cosines: gradients closer than 1e-4 rad to linear dependence count as dependent, and the solution
# does without one of them. Products summed in float32 cannot separate them.
_INDEPENDENT = 1e-8
# Least gain in value, relative to its scale, of a choice of more gradients over one of fewer.
_GAIN = 1e-14


def nearest_in_cone(products: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """The solution q of every block.

    Time grows as 2^m; scales do not matter.

    Args:
        products: K of shape `[n_blocks, m, m]`, finite. Zero gradients get q = 0.
        c: c of shape `[n_blocks, m]`, finite.

    Returns:
        q of shape `[n_blocks, m]`, >= 0.

    Example:
        >>> k = np.array([[[1.0, -0.6], [-0.6, 1.0]]])  # the second gradient is against the first
        >>> nearest_in_cone(k, np.array([[-1.0, 0.2]]))  # removing the first alone would break the second
        array([[1.375, 0.625]])
    """
    m = c.shape[1]
    size = _divisor(np.sqrt(np.diagonal(products, axis1=1, axis2=2)))
    cosines = products / size[:, :, None] / size[:, None, :]
    unit = _divisor(np.abs(c / size).max(axis=1, initial=0.0))
    target = c / size / unit[:, None]
    best, least = np.zeros_like(c), np.zeros(len(c))
    for chosen in map(list, chain.from_iterable(combinations(range(m), k + 1) for k in range(m))):
        values, vectors = np.linalg.eigh(cosines[:, chosen][:, :, chosen])
        independent = values[:, 0] > _INDEPENDENT
        along = np.einsum("nij,ni->nj", vectors, target[:, chosen]) / np.maximum(values, _INDEPENDENT)
        q = -np.einsum("nij,nj->ni", vectors, along)
        value = 0.5 * (q * target[:, chosen]).sum(axis=1)
        better = independent & (q >= 0.0).all(axis=1) & (value < least - _GAIN)
        rows = np.flatnonzero(better)
        best[rows] = 0.0
        best[rows[:, None], chosen] = q[rows]
        least[rows] = value[rows]
    solution: NDArray[np.float64] = best * unit[:, None] / size
    return solution


def _divisor(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sizes with 1 instead of 0: zeros stay zero after division."""
    divisor: NDArray[np.float64] = np.where(sizes > 0.0, sizes, 1.0)
    return divisor


def distance_to_cone(products: NDArray[np.float64], j: int) -> float:
    """Least norm of g_j + sum_i q_i g_i over q >= 0, i != j.

    |g_j| if no other gradient conflicts with it.

    Args:
        products: K of shape `[m, m]`.
        j: Index of the gradient.
    """
    others = [i for i in range(len(products)) if i != j]
    if not (products[j, others] < 0.0).any():
        return math.sqrt(products[j, j])
    q = np.zeros(len(products))
    q[others] = nearest_in_cone(products[np.ix_(others, others)][None], products[j, others][None])[0]
    q[j] = 1.0
    return math.sqrt(max(float(q @ products @ q), 0.0))
