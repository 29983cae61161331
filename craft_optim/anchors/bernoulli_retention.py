"""Retention of independent labels: the KL divergence of each label's own distribution."""

from collections.abc import Mapping

from torch import Tensor

from .one_output import OneOutput
from .pieces import LogitRows, bernoulli_of, distance_in_pieces

__all__ = ["BernoulliRetention", "bernoulli_term"]


def bernoulli_term(student: Tensor, teacher: Tensor) -> tuple[Tensor, int]:
    """Mean Bernoulli KL(teacher || student) over labels, and the number of positions; (0, 0) if there are none.

    Args:
        student, teacher: Logits `[positions, L]`.
    """
    if not len(student):
        return student.float().sum(), 0
    distance = bernoulli_of(teacher.to(student.device, non_blocking=True))
    return distance_in_pieces(student, distance), len(student)


class BernoulliRetention(OneOutput):
    """Bernoulli KL(teacher || model) of labels on the anchors, in nats per label.

        L_ret = mean over valid positions and labels of  p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    p = sigmoid(cached logits), q = sigmoid(the model's current logits): for heads trained by binary cross-entropy.
    Outputs may be `[B]` or `[B, 1]` (one logit), `[B, L]`, or dense, `[B, L, H, W]`: every number is a label.

    Example:
        anchors = build(model, batches, "anchors/", output="labels")  # before fine-tuning
        retention = BernoulliRetention(model, anchors, batch_size=16)

    Args:
        model, cache, batch_size, output, mask, **settings: Arguments of `OneOutput`. The cache must hold labels.

    Raises:
        ValueError: The cache has no labels, or fewer anchors than a batch.
    """

    unit = "nats per label (Bernoulli KL)"
    kind = "labels"

    def _distance(self, student: LogitRows, teacher: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        assert isinstance(student, Tensor)
        return bernoulli_term(student, teacher["logits"])
