"""Losses: distances of outputs from a teacher's, as pure functions of (student, teacher).

All of them take any floating dtype, compute in float32 (float64 stays float64) and return a scalar. The teacher is a
constant: it gets no gradient. A mask selects *positions*, all dimensions but the last; the result is the mean over the
valid ones. A mask without a valid position raises; on an accelerator that check, like the selection, makes the host
wait: callers with the mask on the host select first and pass none.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "bernoulli_kl",
    "feature_cosine",
    "feature_l1",
    "feature_mse",
    "kl_divergence",
    "similarity_mse",
    "topk_kl_divergence",
]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """`x` as `[positions, last dimension]`, the valid ones only."""
    if x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"`{name}` must have at least one element. Found shape {tuple(x.shape)}.")
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"`mask` must have the shape of `{name}` without its last dimension, {tuple(x.shape[:-1])}. Found "
            f"{tuple(mask.shape)}."
        )
    rows = x[mask.bool()]
    if rows.shape[0] == 0:
        raise ValueError("`mask` selects no position: a mean over nothing is undefined. Leave such batches out.")
    return rows


def _same_shape(student: Tensor, teacher: Tensor, names: tuple[str, str]) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have the same shape. Found {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student), in nats, mean over the valid positions.

        KL = mean_i sum_v p_iv (log p_iv - log q_iv),   p = softmax(teacher_logits), q = softmax(student_logits)

    Log-probabilities are logits too: rounded ones are normalised here, so that their rounding enters squared.

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_logits: `[..., V]`, finite, any floating dtype; gets no gradient.
        mask: `[...]`, true where a position counts. None: every position.

    Returns:
        A scalar >= 0 up to rounding, float32 or wider. Memory: about four float32 copies of the valid logits.

    Raises:
        ValueError: The shapes differ, or `mask` selects nothing.
    """
    _same_shape(student_logits, teacher_logits, ("student_logits", "teacher_logits"))
    log_q = F.log_softmax(_wide(_rows(student_logits, mask, "student_logits")), dim=-1)
    log_p = F.log_softmax(_wide(_rows(teacher_logits.detach(), mask, "teacher_logits")), dim=-1)
    return F.kl_div(log_q, log_p.to(log_q.dtype), log_target=True, reduction="none").sum(-1).mean()


def topk_kl_divergence(
    student_logits: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    mask: Tensor | None = None,
    teacher_rest_logprob: Tensor | None = None,
) -> Tensor:
    """KL over k classes and one bucket that holds the remaining mass, in nats, mean over the valid positions.

        KL_k = mean_i [ sum_{v in top-k} p_iv log(p_iv / q_iv) + r_i log(r_i / s_i) ]
        r = 1 - sum_{top-k} p,   s = 1 - sum_{top-k} q

    Merging classes loses information, so KL_k <= KL (data-processing inequality), with equality at k = V. s is summed
    over the other classes rather than subtracted from one, so that it and its gradient stay finite when it is tiny.

    Args:
        student_logits: `[..., V]`, any floating dtype.
        teacher_topk_logprobs: `[..., k]`, log-probabilities of k different classes; gets no gradient.
        teacher_topk_indices: `[..., k]`, integer class ids in [0, V), different within a position.
        mask: `[...]`, true where a position counts. None: every position.
        teacher_rest_logprob: `[...]`, log r. None: from `teacher_topk_logprobs`, imprecise if these are rounded and r
            is small (bfloat16 puts a floor of about 1e-2 nats under the result).

    Returns:
        A scalar >= 0 up to rounding, float32 or wider. Memory: about three float32 copies of the valid logits.

    Raises:
        ValueError: The shapes do not fit, or `mask` selects nothing.
    """
    _same_shape(teacher_topk_logprobs, teacher_topk_indices, ("teacher_topk_logprobs", "teacher_topk_indices"))
    if student_logits.shape[:-1] != teacher_topk_logprobs.shape[:-1]:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `teacher_topk_logprobs` "
            f"{tuple(teacher_topk_logprobs.shape)} must agree in all dimensions but the last."
        )
    classes, k = student_logits.shape[-1], teacher_topk_logprobs.shape[-1]
    if k > classes:
        raise ValueError(f"`teacher_topk_logprobs` has k={k} classes, `student_logits` only {classes}.")
    logits = _wide(_rows(student_logits, mask, "student_logits"))
    indices = _rows(teacher_topk_indices, mask, "teacher_topk_indices").long()
    log_p = _wide(_rows(teacher_topk_logprobs.detach(), mask, "teacher_topk_logprobs")).to(logits.dtype)
    log_q = logits.gather(-1, indices)
    if k < classes:
        log_s = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q, log_s], dim=-1)
        if teacher_rest_logprob is None:
            mass = log_p.exp().sum(-1, keepdim=True)
            log_r = torch.log((1.0 - mass).clamp_min(torch.finfo(mass.dtype).tiny))
        else:
            rest = teacher_rest_logprob.detach().unsqueeze(-1)
            log_r = _wide(_rows(rest, mask, "teacher_rest_logprob")).to(logits.dtype)
        log_p = torch.cat([log_p, log_r], dim=-1)
    log_q = log_q - logits.logsumexp(-1, keepdim=True)
    log_p = F.log_softmax(log_p, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def bernoulli_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of independent labels, in nats, mean over the valid positions and their labels.

        KL = mean_il [ p_il (log p_il - log q_il) + (1 - p_il) (log(1 - p_il) - log(1 - q_il)) ]

    with p = sigmoid(teacher_logits), q = sigmoid(student_logits). Logarithms are computed from the logits: large ones
    neither overflow nor lose their gradient.

    Args:
        student_logits: `[..., L]`, any floating dtype.
        teacher_logits: `[..., L]`, finite, any floating dtype; gets no gradient.
        mask: `[...]`, true where a position counts. None: every position.

    Returns:
        A scalar >= 0 up to rounding, float32 or wider.

    Raises:
        ValueError: The shapes differ, or `mask` selects nothing.
    """
    _same_shape(student_logits, teacher_logits, ("student_logits", "teacher_logits"))
    z = _wide(_rows(student_logits, mask, "student_logits"))
    z0 = _wide(_rows(teacher_logits.detach(), mask, "teacher_logits")).to(z.dtype)
    yes = z0.sigmoid() * (F.logsigmoid(z0) - F.logsigmoid(z))
    no = (-z0).sigmoid() * (F.logsigmoid(-z0) - F.logsigmoid(-z))
    return (yes + no).mean()


def _features(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    _same_shape(student, teacher, ("student", "teacher"))
    s = _wide(_rows(student, mask, "student"))
    return s, _wide(_rows(teacher.detach(), mask, "teacher")).to(s.dtype)


def _check_variance(variance: float) -> None:
    if not 0.0 < variance < float("inf"):
        raise ValueError(
            f"`variance` must be finite and > 0. Found variance={variance!r}. Features that do not vary over the "
            "anchors have no scale to compare a drift with: use more, and more varied, anchors, another layer, or "
            "the cosine."
        )


def feature_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, variance: float = 1.0) -> Tensor:
    """Squared distance as a fraction of the teacher's variance.

        MSE = mean_i |student_i - teacher_i|^2 / sum_d Var[teacher_d] = mean_id (student_id - teacher_id)^2 / variance

    1 means that features have moved as far as the teacher's own are spread; the layer's scale does not matter.

    Args:
        student: `[..., D]`, any floating dtype.
        teacher: `[..., D]`; gets no gradient.
        mask: `[...]`, true where a position counts. None: every position.
        variance: The variance of the teacher's features over the anchors, averaged over D; > 0.

    Raises:
        ValueError: The shapes differ, `mask` selects nothing, or `variance` is not finite and positive.
    """
    _check_variance(variance)
    s, t = _features(student, teacher, mask)
    return (s - t).square().mean() / variance


def feature_l1(student: Tensor, teacher: Tensor, mask: Tensor | None = None, variance: float = 1.0) -> Tensor:
    """Absolute distance in units of the teacher's standard deviation.

        L1 = mean_id |student_id - teacher_id| / sqrt(variance)

    Arguments and errors as for `feature_mse`.
    """
    _check_variance(variance)
    s, t = _features(student, teacher, mask)
    return (s - t).abs().mean() / math.sqrt(variance)


def feature_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angle only: mean_i (1 - cos(student_i, teacher_i)), in [0, 2].

    A feature vector that is exactly zero has no direction: its cosine counts as 0. Arguments and errors as for
    `feature_mse`, without a variance: the cosine has no scale.
    """
    s, t = _features(student, teacher, mask)
    cosine: Tensor = F.cosine_similarity(s, t, dim=-1, eps=1e-12)
    return (1.0 - cosine).mean()


def similarity_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of the cosine similarities of all pairs of vectors, in [0, 4].

        mean over i != j of (cos(student_i, student_j) - cos(teacher_i, teacher_j))^2

    The similarities within a batch are kept, the directions are not (Tung and Mori 2019). Memory: three matrices of
    `[positions, positions]`.

    Args:
        student: `[..., D]`, any floating dtype; at least two vectors.
        teacher: `[..., D]`; gets no gradient.
        mask: `[...]`, true where a position counts. None: every position.

    Raises:
        ValueError: The shapes differ, or there are fewer than two vectors.
    """
    s, t = (F.normalize(x, dim=-1, eps=1e-12) for x in _features(student, teacher, mask))
    if len(s) < 2:
        raise ValueError(f"Similarities need two vectors or more. Found {len(s)}.")
    # The diagonal is 1 for both, but for rounding
    return (s @ s.T - t @ t.T).fill_diagonal_(0.0).square().sum() / (len(s) * (len(s) - 1))
