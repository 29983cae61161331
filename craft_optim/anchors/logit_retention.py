"""Retention of a model's classes: the KL divergence from the cached distribution."""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import losses
from .one_output import OneOutput

__all__ = ["LogitRetention", "kl_term"]


def kl_term(student: Tensor, teacher: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Mean KL(teacher || softmax(student)) over positions, and their number; (0, 0) if there are none.

    Args:
        student: Logits `[positions, V]` of the model.
        teacher: "logprobs" `[positions, V]`; or, as in a cache, "topk_logprobs", "topk_indices" and "rest_logprob".
    """
    if not len(student):
        return student.float().sum(), 0
    teacher = {name: x.to(student.device, non_blocking=True) for name, x in teacher.items()}
    with torch.autocast(student.device.type, enabled=False):
        if "logprobs" in teacher:
            return losses.kl_divergence(student, teacher["logprobs"]), len(student)
        top, indices, rest = teacher["topk_logprobs"], teacher["topk_indices"], teacher.get("rest_logprob")
        return losses.topk_kl_divergence(student, top, indices, teacher_rest_logprob=rest), len(student)


class LogitRetention(OneOutput):
    """KL(teacher || model) of classes on the anchors, in nats per valid position.

        L_ret = mean over valid positions i of  sum_v p_iv (log p_iv - log q_iv)

    p is the cached distribution, q = softmax(logits) the model's now. With a top-k cache, k classes and one for the
    rest: a lower bound. The mask, too, is the cached one. For labels of their own, such as a binary head's, see
    `BernoulliRetention`; for values, `OutputRetention`.

    Example:
        anchors = build(model, batches, "anchors/", class_dim=-1)  # before fine-tuning
        retention = LogitRetention(model, anchors, batch_size=16)
        retention().backward()

    Args:
        model, cache, batch_size, output, mask, **settings: See `OneOutput`. The cache must hold classes.

    Raises:
        ValueError: The cache has no classes, or fewer anchors than a batch.
    """

    unit = "nats per position (KL)"
    kind = "classes"

    def _distance(self, student: Tensor, teacher: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return kl_term(student, teacher)
