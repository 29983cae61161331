"""Retention of continuous outputs: regressions, denoisers, series, velocity fields, embeddings."""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from . import losses
from .cache import AnchorCache
from .cached import CachedSettings, DriftOfEach
from .one_output import OneOutput
from .pieces import LogitRows
from .variance import scales_of

__all__ = ["UNITS", "OutputRetention", "values_term"]

UNITS = {
    "mse": "shares of the teacher's variance",
    "cosine": "cosine distance",
    "similarity": "squared difference of cosine similarities",
}


def values_term(student: Tensor, teacher: Tensor, loss: str, scales: Tensor | None) -> tuple[Tensor, int]:
    """Mean distance over `[positions, V]`, and the number of terms in it; (0, 0) if there are none.

    Args:
        student, teacher: Values of the model and of its teacher.
        loss: Name of the distance, one of `UNITS`.
        scales: Variance of each channel, for "mse".
    """
    pairs = len(student) * (len(student) - 1)
    count = pairs if loss == "similarity" else len(student)
    if not count:
        return student.float().sum() * 0.0, 0
    teacher = teacher.to(student.device, non_blocking=True)
    with torch.autocast(student.device.type, enabled=False):
        if loss == "similarity":
            return losses.similarity_mse(student, teacher), count
        if loss == "cosine":
            return losses.feature_cosine(student, teacher), count
        assert scales is not None
        root = scales.sqrt().to(student.device, torch.promote_types(student.dtype, torch.float32))
        return losses.feature_mse(student / root, teacher / root), count


class OutputRetention(OneOutput):
    """Distance of continuous outputs from the teacher's on the anchors, number by number: nothing is pooled.

        L_ret = mean over valid positions i and channels c of  (y_ic - y0_ic)^2 / Var[y0_c]        (loss="mse")
        L_ret = mean over valid positions i of  1 - cos(y_i, y0_i)                                 (loss="cosine")
        L_ret = mean over pairs i != j of  (cos(y_i, y_j) - cos(y0_i, y0_j))^2                     (loss="similarity")

    "mse" is for values with a scale: regressions, denoisers, series, velocity fields. Var is the variance of a channel
    over the cached anchors and positions, so 1 means that values have moved as far as the teacher's own are spread;
    each channel counts alike, whatever its unit. A channel that is constant in the teacher is divided by the mean
    variance of all. "cosine" is for embeddings whose direction counts, "similarity" for embeddings whose mutual
    distances count, as in retrieval: it compares the anchors of a batch (and process) pair by pair, and leaves the
    whole space free to rotate (Tung and Mori 2019).

    Example:
        anchors = build(model, batches, "anchors/", output="values")  # before fine-tuning
        retention = OutputRetention(model, anchors, batch_size=16)

    Args:
        model, cache, batch_size, output, mask, **settings: Arguments of `OneOutput`. The cache must hold values.
            "similarity" needs two anchors per batch.
        loss: "mse", "cosine" or "similarity".

    Raises:
        ValueError: The cache has no values, or values that do not vary over the anchors, or fewer anchors than a batch.
    """

    kind = "values"

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        loss: str = "mse",
        **settings: Unpack[CachedSettings],
    ) -> None:
        if loss not in UNITS:
            raise ValueError(f"`loss` must be one of {tuple(UNITS)}. Found {loss!r}.")
        if loss == "similarity" and batch_size < 2:
            raise ValueError(f"loss='similarity' compares pairs: `batch_size` must be >= 2. Found {batch_size}.")
        self.distance, self.unit = loss, UNITS[loss]
        self._scales: Tensor | None = None
        super().__init__(model, cache, batch_size, **settings)
        if loss == "mse":
            self._scales = scales_of(cache.features.scales[self.output])
            if not bool((self._scales > 0.0).all()):
                raise ValueError(
                    f"loss='mse' measures in units of the outputs' variance, and they do not vary over the "
                    f"{len(cache)} anchors of {cache.path}: use more, and more varied, anchors, or loss='cosine'."
                )

    def drift_of_each(self, *args: Any, **kwargs: Any) -> DriftOfEach:
        """Measures each anchor; see `CachedRetention.drift_of_each`.

        Raises:
            TypeError: The loss is "similarity", which a single anchor does not have.
        """
        if self.distance == "similarity":
            raise TypeError("loss='similarity' compares anchors with each other: no single one has a drift.")
        return super().drift_of_each(*args, **kwargs)

    def _distance(self, student: LogitRows, teacher: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        assert isinstance(student, Tensor)
        return values_term(student, teacher["values"], self.distance, self._scales)
