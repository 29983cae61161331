"""Other ways to bring two gradients together: what `craft_optim.functional.project_and_merge_` is measured against.

All take lists of task gradients and retention gradients of equal length, and return a list of merged ones. None writes
into what it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PEERS", "flattened_pcgrad", "plain_loop", "published_loop", "published_step", "torchjd_aggregator"]

Merge = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def _flat(gradients: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients], out=out)


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector as tensors of these shapes: views, no copies."""
    pieces = torch.split(vector, [g.numel() for g in like])
    return [piece.view_as(g) for piece, g in zip(pieces, like, strict=True)]


@torch.no_grad()
def plain_loop(task: Sequence[Tensor], retention: Sequence[Tensor], *, lam: float = 1.0) -> list[Tensor]:
    """The same as `project_and_merge_`, as one would write it: three dots per tensor, and one foreach axpy."""
    tt = rr = tr = 0.0
    for t, r in zip(task, retention, strict=True):
        t, r = t.reshape(-1), r.reshape(-1)
        tt += torch.dot(t, t).item()
        rr += torch.dot(r, r).item()
        tr += torch.dot(t, r).item()
    p = tr / rr if tr < 0.0 < min(tt, rr) else 0.0
    return list(torch._foreach_add(list(task), list(retention), alpha=lam - p))


@torch.no_grad()
def flattened_pcgrad(task: Sequence[Tensor], retention: Sequence[Tensor]) -> list[Tensor]:
    """PCGrad of two gradients (Yu et al. 2020, arXiv:2001.06782), on one long vector each.

    Where they conflict each loses its component along the other; the result is the sum. The two vectors are all the
    memory that it takes: t - (tr / rr) r + r - (tr / tt) t is a weighted sum.
    """
    t, r = _flat(task), _flat(retention)
    tr = float(torch.dot(t, r))
    if tr < 0.0:
        t.mul_(1.0 - tr / float(torch.dot(t, t))).add_(r, alpha=1.0 - tr / float(torch.dot(r, r)))
    else:
        t.add_(r)
    return _split(t, task)


def torchjd_aggregator(name: str) -> Merge:
    """An aggregator of torchjd: "PCGrad" or "UPGrad".

    torchjd wants a Jacobian `[2, N]`. Making it of the two lists is part of what is done here, as is giving the result
    back: like torchjd's own `jac_to_grad` as views of the one vector that the aggregator returns, which costs no copy.
    """
    from torchjd import aggregation

    aggregator = getattr(aggregation, name)()

    @torch.no_grad()
    def merge(task: Sequence[Tensor], retention: Sequence[Tensor]) -> list[Tensor]:
        jacobian = task[0].new_empty(2, sum(g.numel() for g in task))
        _flat(task, out=jacobian[0])
        _flat(retention, out=jacobian[1])
        return _split(aggregator(jacobian), task)

    return merge


@torch.no_grad()
def published_loop(
    task: Sequence[Tensor], retention: Sequence[Tensor], *, lam: float = 1.0, threshold: float = -0.1
) -> list[Tensor]:
    """What the published implementations do on a retention step, in their way.

    All task gradients are cloned; sums go parameter by parameter and are read from the device one by one; projection
    and merge each make a list of new tensors; the threshold is compared with the inner product.
    """
    kept = [g.clone() for g in task]
    return _published_merge(kept, retention, lam, threshold)


def _published_merge(
    kept: Sequence[Tensor], retention: Sequence[Tensor], lam: float, threshold: float = -0.1
) -> list[Tensor]:
    dot = square = 0.0
    for t, r in zip(kept, retention, strict=True):
        dot += (t * r).sum().item()
        square += (r * r).sum().item()
    projected = list(kept)
    if dot < threshold:
        projected = [t - (dot / square) * r for t, r in zip(kept, retention, strict=True)]
    return [t + lam * r for t, r in zip(projected, retention, strict=True)]


def published_step(optimizer: torch.optim.Optimizer, retention: Callable[[], Tensor], *, lam: float = 1.0) -> None:
    """The step that goes with `published_loop`, for what it holds in memory; task gradients are in `.grad`.

    The clones, the retention gradients and the merged list live until the base has stepped.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.grad.clone() for p in parameters]
    optimizer.zero_grad()
    retention().backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in parameters]
    with torch.no_grad():
        merged = _published_merge(kept, found, lam)
    for p, g in zip(parameters, merged, strict=True):
        p.grad = g
    optimizer.step()


PEERS: dict[str, Callable[[], Any]] = {
    "plain loop": lambda: plain_loop,
    "PCGrad by flattening": lambda: flattened_pcgrad,
    "torchjd's PCGrad": lambda: torchjd_aggregator("PCGrad"),
    "torchjd's UPGrad": lambda: torchjd_aggregator("UPGrad"),
    "published loop": lambda: published_loop,
}
