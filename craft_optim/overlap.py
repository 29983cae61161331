"""Overlap: anchors that are also inputs of the new task, equal bit for bit, whatever their padding."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft_optim.anchors.structure import flatten

__all__ = ["Overlap", "OverlapSearch"]


@dataclass(frozen=True)
class Overlap:
    """Anchors that are also inputs of the new task.

    Attributes:
        anchors: Number of these anchors.
        looked_for: Number of anchors that were looked for.
        task_rows: Number of the task's inputs that were searched.
    """

    anchors: int
    looked_for: int
    task_rows: int


class OverlapSearch:
    """Looks for anchors among the task's inputs.

    Args:
        anchors: Inputs of the anchors, as `anchors.build` takes batches; at least one.

    Example:
        >>> search = OverlapSearch([{"ids": torch.tensor([[1, 2, 0], [3, 4, 5]])}])
        >>> search.look({"ids": torch.tensor([[1, 2], [9, 9]]), "labels": torch.tensor([0, 1])})
        >>> search.found
        Overlap(anchors=1, looked_for=2, task_rows=2)
    """

    def __init__(self, anchors: Iterable[Any]) -> None:
        self._names: tuple[str, ...] = ()
        self._wanted: Counter[bytes] = Counter()
        for batch in anchors:
            flat = flatten(batch)
            self._names = self._names or flat.structure.names
            self._wanted.update(_digests(flat.tensors, self._names, flat.count))
        self._seen: set[bytes] = set()
        self._rows = 0

    def look(self, batch: Any) -> None:
        """Searches the rows of a task batch. Entries other than the anchors' inputs, such as labels, are ignored.

        Raises:
            TypeError, ValueError: It is not a batch, or lacks one of the anchors' inputs.
        """
        flat = flatten(batch)
        tensors, count = flat.tensors, flat.count
        if missing := [name for name in self._names if name not in tensors]:
            raise ValueError(
                f"A task batch has the inputs {', '.join(tensors)}, the anchors have {', '.join(self._names)}: without "
                f"{', '.join(missing)} they cannot be compared. Pass batches as `anchors.build` got them."
            )
        self._seen.update(_digests(tensors, self._names, count))
        self._rows += count

    @property
    def found(self) -> Overlap | None:
        """The overlap so far; None without anchors or without task rows."""
        if not self._rows or not self._wanted:
            return None
        return Overlap(sum(self._wanted[x] for x in self._seen), self._wanted.total(), self._rows)


def _digests(tensors: dict[str, Tensor], names: Iterable[str], count: int) -> list[bytes]:
    here = {name: tensors[name].detach().cpu() for name in names}
    digests = []
    for row in range(count):
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in here.items():
            value = _unpadded(tensor[row])
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        digests.append(digest.digest())
    return digests


def _unpadded(row: Tensor) -> Tensor:
    """The row without zeros at the end of dimension 0: another batch may be longer, and caches keep no padding."""
    if row.ndim == 0 or not row.numel():
        return row
    used = torch.nonzero(row.reshape(len(row), -1).ne(0).any(1))
    return row[: int(used.max()) + 1] if len(used) else row[:0]
