"""The slow, readable ground truth of `surgery`: flatten everything to float64 and follow the formulas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gradients import Gradients
from .rules import Rules

__all__ = ["reference_gram", "reference_merge", "reference_merge_several"]


def _flatten(gradients: Gradients, like: list[Tensor]) -> Tensor:
    """All gradients as one float64 vector; missing ones are zeros of their parameter's size."""
    pieces = []
    for g, p in zip(gradients, like, strict=True):
        g = torch.zeros_like(p) if g is None else g
        g = g.to_dense() if g.is_sparse else g
        g = torch.view_as_real(g) if g.is_complex() else g
        pieces.append(g.double().reshape(-1))
    return torch.cat(pieces)


def reference_gram(task: Gradients, retention: Gradients, parameters: list[Tensor]) -> tuple[float, float, float]:
    """(s_tt, s_rr, s_tr) in float64."""
    t, r = _flatten(task, parameters), _flatten(retention, parameters)
    return float((t * t).sum()), float((r * r).sum()), float((t * r).sum())


def _shaped(vector: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The inverse of `_flatten`: a float64 tensor for each parameter, complex128 for a complex one."""
    widths = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
    return [
        torch.view_as_complex(x.reshape(*p.shape, 2).contiguous()) if p.is_complex() else x.reshape(p.shape)
        for p, x in zip(parameters, torch.split(vector, widths), strict=True)
    ]


def _merged(merge: str, t: Tensor, rs: list[Tensor], lams: Sequence[float], q: Sequence[float]) -> Tensor:
    """a g_t + sum_j w_j g_j, where q_j g_j is what the projection adds."""
    m = len(rs)
    if merge == "equal":
        t, w = t / (m + 1), [(1.0 + x) / (m + 1) for x in q]
    else:
        most = {"weighted": float("inf"), "task_priority": 1.0}[merge]
        w = [min(lam, most) + x for lam, x in zip(lams, q, strict=True)]
    return t + sum((x * r for x, r in zip(w, rs, strict=True)), torch.zeros_like(t))


def reference_merge(
    task: Gradients,
    retention: Gradients,
    parameters: list[Tensor],
    *,
    lam: float,
    project: bool = True,
    **rules: Any,
) -> list[Tensor]:
    """The merged gradient of every parameter as a float64 tensor (complex128 for complex parameters)."""
    kept = Rules(**rules)
    t, r = _flatten(task, parameters), _flatten(retention, parameters)
    tt, rr, tr = float(t @ t), float(r @ r), float(t @ r)
    cos = tr / (tt**0.5 * rr**0.5) if tt > 0 and rr > 0 else 0.0
    p = tr / rr if project and tt > 0 and rr > 0 and cos < kept.conflict_threshold else 0.0
    return _shaped(_merged(kept.merge, t, [r], [lam], [-p]), parameters)


def reference_merge_several(
    task: Gradients,
    retention: Sequence[Gradients],
    parameters: list[Tensor],
    *,
    lams: Sequence[float],
    project: Sequence[bool],
    **rules: Any,
) -> list[Tensor]:
    """The merged gradient of every parameter, in float64, under several constraints.

    The projection is left to SciPy: min |g_t + sum_j q_j g_j| over q >= 0 with a target that is shifted so that
    conflicts above the threshold do not count.
    """
    from scipy.optimize import nnls  # of an extra

    kept = Rules(**rules)
    t = _flatten(task, parameters)
    rs = [_flatten(gradients, parameters) for gradients in retention]
    norm = float(t.norm())
    q = np.zeros(len(rs))
    may = [j for j, r in enumerate(rs) if project[j] and norm > 0.0 and float(r.norm()) > 0.0]
    if may:
        columns = torch.stack([rs[j] / rs[j].norm() for j in may], dim=1)
        cosines = columns.T @ (t / norm)
        wanted = -torch.where(cosines < kept.conflict_threshold, cosines, cosines.clamp(min=0.0))
        target = torch.linalg.lstsq(columns.T, wanted[:, None], driver="gelsd").solution[:, 0]
        found = nnls(columns.numpy(), target.numpy())[0]
        q[may] = [norm * x / float(rs[j].norm()) for j, x in zip(may, found, strict=True)]
    return _shaped(_merged(kept.merge, t, rs, lams, q.tolist()), parameters)
