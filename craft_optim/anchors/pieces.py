"""Distances of logits `[P, V]` from a teacher's, in pieces of positions: the loss and its gradient in one go.

Under autograd a distance keeps several copies of the logits, each of P V numbers: a gigabyte for 1,024 positions and
257,152 classes. Here each piece of positions gives its part of the loss and of the gradient before the next one begins.
For given logits the gradient is kept, P V numbers in their dtype; for a linear head that has not run, only the
gradients of its input, P D numbers, and of its weights if they train. `losses` has the same distances as formulas.

A backward consumes the gradient: one backward per forward, and no second derivative.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .masks import select

__all__ = [
    "Distance",
    "HeadRows",
    "LogitRows",
    "bernoulli_of",
    "distance_in_pieces",
    "gathered",
    "kl_of",
    "likelihood_of",
    "none_of",
    "piece_bytes",
    "pieces_of",
    "rows_at",
    "split_rows",
]

_PIECE = 1 << 24
"""Bytes of a piece of logits in float32: small beside a model, large enough for a fast matrix product"""
_LIFT = 1024.0
"""Factor on gradients in float16: most classes' are subnormal without it"""


class Distance(Protocol):
    """Compares some positions with the teacher's."""

    def __call__(self, z: Tensor, at: slice, gradient: bool) -> Tensor:
        """The distance of each position, `[n]`.

        Args:
            z: Logits `[n, V]`, float32 or float64; may be overwritten, with the gradient of the sum of the distances if
                `gradient`.
            at: Slice of the P positions.
            gradient: True to write the gradient into `z`.
        """
        ...


@dataclass(frozen=True)
class HeadRows:
    """Logits `[P, V]` of a linear head that has not run: `cap tanh(scale y / cap)` of y = hidden W^T + b.

    Attributes:
        hidden: Input of the head, `[P, D]`.
        weight: Weight, `[V, D]`.
        bias: Bias, `[V]`, or None.
        dtype: Dtype of y: the model's, or autocast's.
        scale: Factor that the model multiplies y by.
        cap: Bound of the model's softcapping; None without one.
        gather: Function that makes a context within which weight and bias have their values; see `gathered`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None
    gather: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.hidden), len(self.weight)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def detached(self) -> "HeadRows":
        """The same rows without a graph."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def converted(self) -> "HeadRows":
        """The same rows with all tensors in `dtype`: once, before many pieces."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return replace(self, hidden=self.hidden.to(self.dtype), weight=self.weight.to(self.dtype), bias=bias)

    def logits(self) -> Tensor:
        """All logits, as the model computes them."""
        of = self.converted()
        with torch.autocast(self.device.type, enabled=False):
            y = F.linear(of.hidden, of.weight, of.bias)
        y = y if self.scale == 1.0 else y * self.scale
        return y if self.cap is None else torch.tanh(y / self.cap) * self.cap


LogitRows = Tensor | HeadRows


def gathered(rows: LogitRows) -> AbstractContextManager[Any]:
    """Makes logits computable within the block, also for a head whose weights are sharded over processes.

    Each process must enter as often as the others, with positions or without.
    """
    return nullcontext() if isinstance(rows, Tensor) else rows.gather()


def rows_at(rows: LogitRows, places: Tensor) -> LogitRows:
    """Rows at some positions, by indices on the CPU."""
    return select(rows, places) if isinstance(rows, Tensor) else replace(rows, hidden=select(rows.hidden, places))


def split_rows(rows: LogitRows, counts: list[int] | int) -> Sequence[LogitRows]:
    """Splits rows over positions, as `torch.split`."""
    if isinstance(rows, Tensor):
        return torch.split(rows, counts)
    return [replace(rows, hidden=x) for x in torch.split(rows.hidden, counts)]


def none_of(rows: LogitRows) -> Tensor:
    """The scalar 0 with the graph of no position."""
    return (rows if isinstance(rows, Tensor) else rows.hidden).float().sum()


def pieces_of(rows: LogitRows, budget: int = _PIECE) -> Iterator[tuple[slice, Tensor]]:
    """Positions and their logits `[n, V]`, piece by piece; a head's, `gathered`, are computed on the way."""
    count = _count(rows, budget)
    rows = rows if isinstance(rows, Tensor) else rows.converted()
    return ((at, _piece(rows, at)) for at in _ranges(len(rows), count))


def _piece(rows: LogitRows, at: slice) -> Tensor:
    return rows[at] if isinstance(rows, Tensor) else replace(rows, hidden=rows.hidden[at]).logits()


def distance_in_pieces(rows: LogitRows, distance: Distance, budget: int = _PIECE) -> Tensor:
    """Mean distance over positions, a scalar, float32 or wider.

    Args:
        rows: Logits of at least one position, `gathered`.
        distance: Distance from the teacher.
        budget: Bytes of a piece in float32; at least one position is taken at a time.
    """
    count = _count(rows, budget)
    if not torch.is_grad_enabled():  # unknown in a function's forward
        rows = rows.detach() if isinstance(rows, Tensor) else rows.detached()
    with torch.autocast(rows.device.type, enabled=False):
        if isinstance(rows, Tensor):
            found = _OfLogits.apply(distance, count, rows)  # type: ignore[no-untyped-call]
        else:
            found = _OfHead.apply(distance, count, rows, rows.hidden, rows.weight, rows.bias)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def piece_bytes(rows: LogitRows, budget: int = _PIECE) -> int:
    """Bytes in float32 of the logits that exist at a time."""
    return 4 * rows.shape[-1] * min(_count(rows, budget), len(rows))


def _count(rows: LogitRows, budget: int) -> int:
    """Positions per piece; for a head at least D / 16, as each piece reads its weights."""
    least = 1 if isinstance(rows, Tensor) else rows.hidden.shape[-1] // 16
    return max(1, least, budget // (4 * max(rows.shape[-1], 1)))


def _ranges(length: int, count: int) -> Iterator[slice]:
    return (slice(first, min(first + count, length)) for first in range(0, length, count))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- the two kinds of logits -------------------------------------------------------------------------------------------


class _OfLogits(torch.autograd.Function):
    """Distance of given logits; keeps one copy in their dtype, or in float32 for float16."""

    @staticmethod
    def forward(ctx: Any, distance: Distance, count: int, logits: Tensor) -> Tensor:
        wide, wanted = _wide(logits.dtype), ctx.needs_input_grad[2]
        # No loss scale is applied yet: with many classes most gradients are too small for float16
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        kept = torch.empty_like(logits, dtype=dtype) if wanted else None
        total = torch.zeros((), dtype=wide, device=logits.device)
        for at in _ranges(len(logits), count):
            if kept is not None and kept.dtype == wide:
                z = kept[at].copy_(logits[at])
            else:
                z = logits[at].to(wide, copy=True)
            total += distance(z, at, wanted).sum()
            if kept is not None and kept.dtype != wide:
                kept[at] = z
        ctx.kept, ctx.count, ctx.dtype = kept, len(logits), logits.dtype
        return total / len(logits)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = _taken(ctx)
        return None, None, kept.mul_((grad / ctx.count).to(kept.dtype)).to(ctx.dtype)


class _OfHead(torch.autograd.Function):
    """Distance of a head's logits; keeps gradients of the head's input and weights, in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, distance: Distance, count: int, rows: HeadRows, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        *_, to_hidden, to_weight, to_bias = ctx.needs_input_grad
        wanted, length = to_hidden or to_weight or to_bias, len(hidden)
        wide, rows = _wide(rows.dtype), rows.converted()
        d_hidden = torch.empty_like(hidden, dtype=wide) if to_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if to_bias and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for at in _ranges(length, count):
            given = rows.hidden[at]
            z = replace(rows, hidden=given).logits().to(wide)
            slope = None if rows.cap is None or not wanted else 1.0 - (z / rows.cap).square()
            total += distance(z, at, wanted).sum()
            if not wanted:
                continue
            if slope is not None:
                z *= slope
            if rows.scale != 1.0:
                z *= rows.scale
            if d_bias is not None:
                d_bias += z.sum(0)
            if d_weight is not None:
                d_weight.addmm_(z.T, given.to(wide))
            if d_hidden is not None:
                if rows.dtype == torch.float16:
                    d_hidden[at] = (z * _LIFT).half() @ rows.weight
                    d_hidden[at] /= _LIFT
                else:
                    d_hidden[at] = z.to(rows.dtype) @ rows.weight
        ctx.kept, ctx.count = (d_hidden, d_weight, d_bias), length
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total / length

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.count
        grads = [
            None if x is None else x.mul_(factor.to(x.dtype)).to(dtype)
            for x, dtype in zip(_taken(ctx), ctx.dtypes, strict=True)
        ]
        return None, None, None, *grads


def _taken(ctx: Any) -> Any:
    if not hasattr(ctx, "kept"):
        raise RuntimeError("The retention loss has been differentiated already: call the closure again for each one.")
    kept = ctx.kept
    del ctx.kept
    return kept


# -- distances ---------------------------------------------------------------------------------------------------------


def kl_of(teacher: Mapping[str, LogitRows]) -> Distance:
    """KL(teacher || softmax(z)) at each position, as `losses.kl_divergence` and `losses.topk_kl_divergence`.

    Args:
        teacher: Mapping with "logprobs" `[P, V]`, which may be of a head that has not run; or with "topk_logprobs" and
            "topk_indices" `[P, k]` and, if k < V, "rest_logprob" `[P]`.
    """
    if "logprobs" in teacher:
        return _Full(teacher["logprobs"])
    top, indices, rest = (cast(Tensor, teacher.get(f)) for f in ("topk_logprobs", "topk_indices", "rest_logprob"))
    return _TopK(top, indices, rest)


@dataclass(frozen=True)
class _Full:
    logprobs: LogitRows

    def __call__(self, z: Tensor, at: slice, gradient: bool) -> Tensor:
        teacher = _piece(self.logprobs, at).to(z.device, z.dtype)
        # Computed alike, so that equal logits have bitwise equal logarithms, and no distance
        log_p, log_q = (F.log_softmax(x, dim=-1) for x in (teacher, z))
        found = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        if gradient:
            torch.sub(log_q.exp_(), log_p.exp_(), out=z)
        return found


@dataclass(frozen=True)
class _TopK:
    logprobs: Tensor
    indices: Tensor
    rest: Tensor | None

    def __call__(self, z: Tensor, at: slice, gradient: bool) -> Tensor:
        indices, log_p = self.indices[at].long(), self.logprobs[at].to(z.dtype)
        log_q, everything = z.gather(-1, indices), log_p.shape[-1] == z.shape[-1]
        if not everything:
            if self.rest is None:
                mass = log_p.exp().sum(-1, keepdim=True)
                log_r = torch.log((1.0 - mass).clamp_min(torch.finfo(mass.dtype).tiny))
            else:
                log_r = self.rest[at].to(z.dtype).unsqueeze(-1)
            log_p = torch.cat([log_p, log_r], dim=-1)
            log_rest = z.scatter_(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
            log_q = torch.cat([log_q, log_rest], dim=-1)
        log_q, log_p = F.log_softmax(log_q, dim=-1), F.log_softmax(log_p, dim=-1)
        found = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        if gradient:
            apart = log_q.exp_().sub_(log_p.exp_())
            if everything:
                z.scatter_(-1, indices, apart)
            else:  # the rest's excess, distributed as its softmax
                z.sub_(log_rest).exp_().mul_(apart[:, -1:]).scatter_(-1, indices, apart[:, :-1])
        return found


def bernoulli_of(logits: Tensor) -> Distance:
    """KL of each label's own distribution, averaged over a position's labels, as `losses.bernoulli_kl`.

    Args:
        logits: The teacher's logits, `[P, L]`.
    """
    return _Bernoulli(logits)


@dataclass(frozen=True)
class _Bernoulli:
    logits: Tensor

    def __call__(self, z: Tensor, at: slice, gradient: bool) -> Tensor:
        z0 = self.logits[at].to(z.dtype)
        p = z0.sigmoid()
        found = p * (F.logsigmoid(z0) - F.logsigmoid(z)) + (-z0).sigmoid() * (F.logsigmoid(-z0) - F.logsigmoid(-z))
        if gradient:
            z.sigmoid_().sub_(p).div_(z.shape[-1])
        return found.mean(-1)


def likelihood_of(tokens: Tensor) -> Distance:
    """-log softmax(z) of each position's token.

    Args:
        tokens: Token of each position, `[P]`.
    """
    return _Token(tokens)


@dataclass(frozen=True)
class _Token:
    tokens: Tensor

    def __call__(self, z: Tensor, at: slice, gradient: bool) -> Tensor:
        tokens = self.tokens[at].long().unsqueeze(-1)
        log_all = z.logsumexp(-1, keepdim=True)
        found = (log_all - z.gather(-1, tokens)).squeeze(-1)
        if gradient:
            z.sub_(log_all).exp_().scatter_add_(-1, tokens, z.new_full((), -1.0).expand_as(tokens))
        return found
