"""Retention of classes: the KL divergence from the cached distribution."""

from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor

from .one_output import OneOutput
from .pieces import LogitRows, distance_in_pieces, gathered, kl_of, none_of

__all__ = ["LogitRetention", "kl_term"]


def kl_term(student: LogitRows, teacher: Mapping[str, LogitRows]) -> tuple[Tensor, int]:
    """Mean KL(teacher || softmax(student)) over positions, and their number; (0, 0) if there are none.

    Args:
        student: Logits `[positions, V]` of the model.
        teacher: Mapping with "logprobs" `[positions, V]`, which may be of a head that has not run; or, as in a cache,
            with "topk_logprobs", "topk_indices" and "rest_logprob".
    """
    there = student.device
    with ExitStack() as stack:
        for rows in (student, *teacher.values()):
            stack.enter_context(gathered(rows))
        if not len(student):
            return none_of(student), 0
        teacher = {n: x.to(there, non_blocking=True) if isinstance(x, Tensor) else x for n, x in teacher.items()}
        return distance_in_pieces(student, kl_of(teacher)), len(student)


class LogitRetention(OneOutput):
    """KL(teacher || model) of classes on the anchors, in nats per valid position.

        L_ret = mean over valid positions i of  sum_v p_iv (log p_iv - log q_iv)

    p is the cached distribution, q = softmax(logits) the model's current one. A top-k cache gives a lower bound, over k
    classes and one for the rest. The mask is the cached one, too. For independent labels, such as a binary head's, see
    `BernoulliRetention`; for values, `OutputRetention`.

    Example:
        anchors = build(model, batches, "anchors/", class_dim=-1)  # before fine-tuning
        retention = LogitRetention(model, anchors, batch_size=16)
        retention().backward()

    Args:
        model, cache, batch_size, output, mask, **settings: Arguments of `OneOutput`. The cache must hold classes.

    Raises:
        ValueError: The cache has no classes, or fewer anchors than a batch.
    """

    unit = "nats per position (KL)"
    kind = "classes"

    def _distance(self, student: LogitRows, teacher: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return kl_term(student, teacher)
