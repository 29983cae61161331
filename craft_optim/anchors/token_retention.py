"""Retention of generated tokens: the likelihood of the tokens that the teacher wrote."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .cache import AnchorBatch, AnchorCache
from .cached import CachedRetention
from .forwards import Outcome
from .pieces import LogitRows, distance_in_pieces, gathered, likelihood_of, none_of, pieces_of
from .reading import AnchorMismatchError

__all__ = ["TokenRetention"]

_AGREEMENT = 0.9  # least share of greedy tokens that must be the model's likeliest before the first step


class TokenRetention(CachedRetention):
    """Loss of likelihood of the teacher's own tokens, in nats per token.

        L_ret = mean over tokens i of  log p(y_i) - log q(y_i)

    y are the tokens that the teacher generated greedily, p is the teacher's probability and q the model's current one:
    the cross-entropy beyond the teacher's own. It is 0 for an unmodified model and negative for one that is surer of
    these tokens. If the cache lacks log p (imported ones do), L_ret is the whole cross-entropy, and epsilon must leave
    room for the teacher's.

    It compares one token per position where `LogitRetention` compares distributions: it holds less, needs less disk,
    and has the teacher's own words as inputs.

    Args:
        model, cache, batch_size, **settings: Arguments of `CachedRetention`. The cache must hold tokens. The tolerance
            is the square root of that by precision: rounding enters linearly here. Without log p the check of pass 0
            requires 9 of 10 tokens to be the likeliest ones.

    Raises:
        ValueError: The cache has no tokens, or fewer anchors than a batch.
    """

    _features = ("mask", "tokens", "token_logprobs")

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Unit of L_ret, in words."""
        known = any(name == "features.token_logprobs" for name, *_ in self.cache.tensors())
        return "nats per token" if known else "nats per token, the teacher's own entropy among them"

    def _check_kind(self, cache: AnchorCache) -> None:
        if cache.features.tokens is None:
            raise ValueError(
                f"TokenRetention needs a cache with tokens. {cache.path} has {cache.describe()}: build it with "
                "`tokens=`, or use LogitRetention or HiddenRetention."
            )

    def _by_precision(self) -> float:
        return math.sqrt(super()._by_precision())

    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        student, tokens = self._student(outcome, batch), batch.features["tokens"]
        with gathered(student):
            if not len(student):
                return {"tokens": (none_of(student), 0)}
            value = distance_in_pieces(student, likelihood_of(tokens.to(student.device, non_blocking=True)))
        known = batch.features.get("token_logprobs")
        if known is not None:
            value = value + known.to(student.device, non_blocking=True).to(value.dtype).mean()
        return {"tokens": (value, len(tokens))}

    def _student(self, outcome: Outcome, batch: AnchorBatch) -> LogitRows:
        expected, found = tuple(batch.features["mask"].shape), outcome.outputs[""]
        if found.shape != expected:
            raise AnchorMismatchError(
                f"The model gives logits of shape {found.shape} x V, the tokens in {self.cache.path} have positions "
                f"{expected}. Pass a `forward=` whose logits have these positions, each of which predicts the token "
                "after it."
            )
        tokens, classes = batch.features["tokens"], found.values.shape[-1]
        if tokens.numel() and int(tokens.max()) >= classes:
            raise AnchorMismatchError(
                f"The model gives logits of {classes} classes, the tokens in {self.cache.path} go up to "
                f"{int(tokens.max())}: another model, or another `forward=`."
            )
        return found.values

    def _check(self, values: Mapping[str, Tensor], batch: AnchorBatch) -> None:
        if "token_logprobs" in batch.features:
            super()._check(values, batch)
            return
        with torch.no_grad(), self._pass(self._seed(0)):
            student = self._student(self._outcome(batch), batch)
            tokens = batch.features["tokens"].to(student.device)
            share = torch.ones((), device=student.device)
            with gathered(student):
                likeliest = [logits.argmax(-1) for _, logits in pieces_of(student)]
            if len(tokens):
                share = (torch.cat(likeliest) == tokens).float().mean()
        agreement = self._over_all(share)
        if not agreement >= _AGREEMENT:
            raise AnchorMismatchError(
                f"Of the tokens in {self.cache.path} only {agreement:.0%} are the ones that the model would give "
                "before the first step. Other weights, another processor, or another alignment of labels and logits "
                "(`forward=`). A run that continues from a fine-tuned checkpoint loads its optimizer's state, or "
                "passes strict=False."
            )
