"""Retention of a model's logits: the KL divergence from the cached distribution."""

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from . import losses
from .cache import AnchorBatch, AnchorCache
from .cached import CachedRetention, CachedSettings
from .forwards import Outcome
from .masks import Mask, select, valid_positions, within
from .reading import AnchorMismatchError

__all__ = ["LogitRetention", "kl_term"]

LOGITS = ("logprobs", "topk_logprobs", "topk_indices", "rest_logprob")


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


class LogitRetention(CachedRetention):
    """KL(teacher || model) on the anchors' logits, in nats per valid position.

        L_ret = mean over valid positions i of  sum_v p_iv (log p_iv - log q_iv)

    p is the cached distribution, q the model's now. With a top-k cache, k classes and one for the rest: a lower bound.
    The mask, too, is the cached one.

    Example:
        anchors = build(model, batches, "anchors/")  # before fine-tuning
        retention = LogitRetention(model, anchors, batch_size=16)
        retention().backward()

    Args:
        model, cache, batch_size, **settings: See `CachedRetention`. The cache must hold logits.
        mask: As `Reading` takes it, to compare at some of the cached positions only.

    Raises:
        ValueError: The cache has no logits, or fewer anchors than a batch.
    """

    unit = "nats per position (KL)"
    _features = (*LOGITS, "mask")

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        mask: Mask | None = None,
        **settings: Unpack[CachedSettings],
    ) -> None:
        super().__init__(model, cache, batch_size, **settings)
        self.mask = mask

    def _check_kind(self, cache: AnchorCache) -> None:
        if cache.features.logits is None:
            raise ValueError(
                f"LogitRetention needs a cache with logits. {cache.path} has {cache.describe()}: use "
                "HiddenRetention, or build it with logits=True or top_k."
            )

    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        student = outcome.logits
        if student is None:
            raise AnchorMismatchError(
                f"The model gives no logits but {type(outcome.output).__name__}: pass the `forward=` that the cache "
                "was built with."
            )
        teacher = {name: batch.features[name] for name in LOGITS if name in batch.features}
        valid = batch.features.get("mask")
        shape = tuple(next(iter(teacher.values())).shape[:-1] if valid is None else valid.shape)
        classes = self.cache.features.classes
        if (*outcome.shape, student.shape[-1]) != (*shape, classes):
            raise AnchorMismatchError(
                f"The model gives logits of shape {(*outcome.shape, student.shape[-1])}, the cache {self.cache.path} "
                f"was built with {(*shape, classes)}: another model, or another `forward=`."
            )
        if valid is None:
            teacher = {name: x.flatten(0, len(shape) - 1) for name, x in teacher.items()}
        if self.mask is not None:
            wanted = valid_positions(batch.inputs, self.mask)
            assert wanted is not None
            kept = within(wanted, torch.ones(shape, dtype=torch.bool) if valid is None else valid)
            student = select(student, kept)
            teacher = {name: select(x, kept) for name, x in teacher.items()}
        return {"kl": kl_term(student, teacher)}
