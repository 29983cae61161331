"""Single anchors of a batch after one forward, to compare each."""

from collections.abc import Collection, Iterator

import torch

from .cache import AnchorBatch
from .forwards import Outcome
from .manifest import cover, is_mask
from .outputs import Rows
from .pieces import split_rows
from .structure import anchors_of, flatten

__all__ = ["single_anchors"]


def single_anchors(
    outcome: Outcome, batch: AnchorBatch, joined: Collection[str], batch_dim: int = 0
) -> Iterator[tuple[Outcome, AnchorBatch]]:
    """Each anchor's part of a forward's results and of its batch, in the batch's order.

    Nothing is copied. An anchor keeps the padding of its batch: at valid positions it compares as in its own batch.

    Args:
        outcome: Results of the whole batch; its outputs and hidden states have one entry per anchor.
        batch: Batch from the cache.
        joined: Names of features that hold the valid positions only, anchor after anchor.
        batch_dim: Dimension of the anchors in hidden states `[B, T, D]`.
    """
    size, features = flatten(batch.inputs, batch.lengths).count, batch.features
    counts = {name: x.flatten(1).sum(1).tolist() for name, x in features.items() if is_mask(name)}  # of valid positions
    covers = {name: cover(name) if name in joined else None for name in features}
    parts = {name: torch.split(x, counts.get(covers[name] or "", 1)) for name, x in features.items()}
    mask = features.get("mask")
    split = {
        name: split_rows(
            x.values, counts["mask"] if mask is not None and mask.shape == x.shape else len(x.values) // size
        )
        for name, x in outcome.outputs.items()
    }
    for i in range(size):
        hidden = {layer: x.narrow(batch_dim if x.ndim == 3 else 0, i, 1) for layer, x in outcome.hidden.items()}
        inputs = anchors_of(batch.inputs, i, i + 1, batch.lengths)
        outputs = {name: Rows(split[name][i], (1, *x.shape[1:])) for name, x in outcome.outputs.items()}
        part = outcome._replace(outputs=outputs, hidden=hidden)
        yield part, AnchorBatch(inputs, {name: x[i] for name, x in parts.items()})
