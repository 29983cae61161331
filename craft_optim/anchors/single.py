"""A batch after its forward, taken apart into single anchors: one forward, and a comparison of each."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from .cache import AnchorBatch
from .forwards import Outcome
from .manifest import cover
from .structure import flatten, map_tensors

__all__ = ["single_anchors"]


def single_anchors(
    outcome: Outcome, batch: AnchorBatch, joined: Collection[str], batch_dim: int = 0
) -> Iterator[tuple[Outcome, AnchorBatch]]:
    """Each anchor's part of a forward's results and of the batch that it was run on, in the batch's order.

    Nothing is copied. An anchor keeps the padding of its batch: what is compared at valid positions is what it would be
    in a batch of its own.

    Args:
        outcome: Of the whole batch; its logits and hidden states have one entry per anchor.
        batch: As the cache gives it.
        joined: Names of the features that hold the valid positions only, anchor after anchor.
        batch_dim: Where the anchors are in hidden states `[B, T, D]`.
    """
    logits = None if outcome.logits is None else torch.split(outcome.logits, _rows(outcome, batch.features))
    features = {name: _parts(name, batch.features, name in joined) for name in batch.features}
    for i in range(flatten(batch.inputs)[2]):
        hidden = {layer: x.narrow(batch_dim if x.ndim == 3 else 0, i, 1) for layer, x in outcome.hidden.items()}
        part = outcome._replace(
            logits=None if logits is None else logits[i],
            shape=(1, *outcome.shape[1:]) if outcome.shape else (),
            hidden=hidden,
        )
        inputs = map_tensors(lambda x, i=i: x[i : i + 1], batch.inputs)  # type: ignore[misc]
        yield part, AnchorBatch(inputs, {name: parts[i] for name, parts in features.items()})


def _rows(outcome: Outcome, features: Mapping[str, Tensor]) -> list[int]:
    """How many of the logits' rows each anchor has: those of its valid positions, or of all where there is no mask."""
    valid = features.get("mask")
    if valid is not None:
        return _counts(valid)
    assert outcome.logits is not None
    return [len(outcome.logits) // outcome.shape[0]] * outcome.shape[0]


def _parts(name: str, features: Mapping[str, Tensor], joined: bool) -> tuple[Tensor, ...]:
    mask = cover(name) if joined else None
    return torch.split(features[name], 1 if mask is None else _counts(features[mask]))


def _counts(mask: Tensor) -> list[int]:
    """Of each anchor the number of valid positions; masks are on the CPU."""
    counts: list[int] = mask.flatten(1).sum(1).tolist()
    return counts
