"""Writing: a stream of batches is checked and cut into shards; complete shards are compared and not rewritten."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from .build_folder import BuildFolder
from .fingerprint import anchor_checksums
from .kinds import Output
from .manifest import cover, is_mask
from .shard_buffer import ShardBuffer
from .shards import AnchorCacheError
from .structure import Flat, cut

__all__ = ["Writer"]

_log = logging.getLogger("craft_optim")


class Writer:
    """Takes the batches of a build one after another, and writes every shard of this process that becomes full.

    A context manager: its thread ends with the block. After an exception, a write in progress is still completed.

    Args:
        folder: The folder to write to, within `building`.
    """

    def __init__(self, folder: BuildFolder) -> None:
        self.folder = folder
        self._buffer = ShardBuffer(folder)
        self._size: int = folder.settings["shard_size"]
        self._seen = 0
        self._signature: dict[str, tuple[Any, ...]] = {}
        self._features: set[str] | None = None
        self._widths: dict[str, int] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is not None:
                self._buffer.drain()
        except Exception as another:
            _log.debug("the writing thread failed too: %r", another)
        finally:
            self._buffer.close()

    def expect(self, batch: Flat) -> None:
        """Raises ValueError unless inputs look like earlier ones, except for the anchors' number and length."""
        structure, inputs = batch.structure, batch.tensors
        ragged = structure.ragged
        signature = {n: (x.dtype, x.ndim, *x.shape[1 if n in ragged else 2 :]) for n, x in inputs.items()}
        if self.folder.structure is None:
            self.folder.structure, self._signature = structure, signature
        before = self.folder.structure
        if structure != before or signature != self._signature:
            raise ValueError(
                "All batches must hold the same tensors, with the same dtypes and shapes from dimension 2 on. "
                f"Found {before.kind} {self._signature} and then {structure.kind} {signature}."
            )
        even = {name: x for name, x in inputs.items() if name not in ragged}
        changed = [name for name, x in even.items() if self._other_width(f"inputs.{name}", x) is not None]
        if changed:
            features = self.folder.settings["features"]
            if features["mask"] is None and features["tokens"] is None and "attention_mask" not in inputs:
                raise ValueError(
                    f"Inputs {', '.join(map(repr, changed))} differ in length (dimension 1) between batches, and "
                    "nothing says which positions count: add an `attention_mask` to the batches, pass `mask=`, or "
                    "pad them to one length."
                )
            if "mean" in features["pooling"].values():
                raise ValueError(
                    "Pooling 'mean' counts padding, and batches differ in length: use 'masked_mean', or pad to "
                    "one length."
                )

    def _other_width(self, key: str, x: Tensor) -> int | None:
        """Size of dimension 1 in the first batch, if it differs now."""
        if x.ndim < 2 or x.shape[1] == self._widths.setdefault(key, x.shape[1]):
            return None
        return self._widths[key]

    def _shares(self, batch: Flat) -> Iterator[tuple[int, int, int]]:
        """This process' shards in the next batch: (shard, first and last + 1 of their anchors in the batch)."""
        at, size = 0, batch.count
        while at < size:
            shard = (self._seen + at) // self._size
            end = min(size, (shard + 1) * self._size - self._seen)
            if self.folder.is_mine(shard):
                yield shard, at, end
            at = end

    def skips(self, batch: Flat) -> bool:
        """True if all anchors of a batch are in complete shards or in other processes' shards: it is done.

        Raises AnchorCacheError if the complete shards hold other anchors.
        """
        shares = list(self._shares(batch))
        if any(shard not in self.folder.complete for shard, _, _ in shares):
            return False
        for shard, at, end in shares:
            self._compare(shard, at, batch.anchors(at, end))
        self._seen += batch.count
        return True

    def _compare(self, shard: int, at: int, anchors: Flat) -> None:
        first = self._seen + at - shard * self._size
        given = anchor_checksums(anchors)
        stored = self.folder.complete[shard][first : first + len(given)]
        if stored != given:
            place = next((i for i, (a, b) in enumerate(zip(stored, given, strict=False)) if a != b), len(stored))
            raise AnchorCacheError(
                f"{self.folder.path} is half built from other anchors: number {self._seen + at + place} differs. Pass "
                "the same batches in the same order, or resume=False to start over."
            )

    def add(
        self,
        inputs: Flat,
        features: Mapping[str, Tensor],
        outputs: Mapping[str, Output],
        joined: Collection[str] = (),
        batch: Flat | None = None,
    ) -> None:
        """Adds a batch with its features.

        Args:
            inputs: Batch that has passed `expect`. Its tensors must not change afterwards.
            features: Features by name, on the CPU; first dimension the anchors.
            outputs: Outputs of the model that are kept.
            joined: Names of features whose first dimension is instead the positions of their mask (see `cover`).
            batch: The given batch, if `inputs` were generated from it.
        """
        batch = inputs if batch is None else batch
        self.folder.same_outputs({name: asdict(output) for name, output in outputs.items()})
        self._same_features(features, joined)
        lengths = {f"features.{name}": features[cover(name) or ""].flatten(1).sum(1).int() for name in joined}
        lengths |= {f"inputs.{name}": x.int() for name, x in inputs.lengths.items() if name in inputs.tensors}
        tensors = {f"inputs.{name}": x.detach().cpu() for name, x in inputs.tensors.items()}
        tensors |= {f"features.{name}": x for name, x in features.items()}
        for shard, at, end in self._shares(batch):
            if shard in self.folder.complete:
                self._compare(shard, at, batch.anchors(at, end))
                continue
            self._buffer.push(cut(tensors, at, end, lengths), cut(lengths, at, end), batch.anchors(at, end))
            if self._seen + end == (shard + 1) * self._size:
                self._buffer.flush(shard)
        self._seen += batch.count

    def _same_features(self, features: Mapping[str, Tensor], joined: Collection[str]) -> None:
        if self._features is not None and self._features != set(features):
            raise ValueError(
                f"All batches must give the same features. Found {sorted(self._features ^ set(features))}."
            )
        self._features = set(features)
        for name, x in features.items():
            if name in joined or is_mask(name):
                continue
            width = self._other_width(f"features.{name}", x)
            if width is not None:
                raise ValueError(
                    f"The teacher's {name!r} differs in size between batches, {width} and {x.shape[1]}, and no "
                    "mask says which positions count: pass `mask=` (logits) or `spans=` (hidden states)."
                )

    def finish(self) -> None:
        """Writes the last shard, and finishes the cache together with the other processes.

        Raises:
            ValueError: There was nothing to write.
            AnchorCacheError: A shard cannot be written, or another process has failed or was interrupted.
        """
        if self._seen == 0:
            raise ValueError(f"`batches` yielded nothing: there is no anchor to write to {self.folder.path}.")
        last, anchors = divmod(self._seen, self._size)
        if anchors and self.folder.is_mine(last) and last not in self.folder.complete:
            self._buffer.flush(last)
        self._buffer.drain()
        self.folder.finish(last + (anchors > 0))
