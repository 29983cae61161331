"""Shard buffer: a thread collects anchors and writes them as shards while the teacher runs on the next batch."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build_folder import BuildFolder
from .fingerprint import anchor_checksums
from .images import Encoding, decode, encode, encode_alike, is_image
from .packing import packed
from .structure import Flat

__all__ = ["ShardBuffer"]

_AHEAD = 4  # parts and shards that may wait for the thread


class _Part(NamedTuple):
    """Some anchors of one batch, as pushed; images are bytes already, a quarter of the memory."""

    tensors: dict[str, Tensor]
    lengths: dict[str, Tensor]
    encodings: dict[str, Encoding]
    checksums: list[str]
    categories: tuple[str, ...]


class ShardBuffer:
    """The anchors of the next shard, and the thread that collects and writes them.

    Calls return at once unless four are waiting already. A later call raises an error of the thread; after that nothing
    more is written. Only the thread touches `_parts` and `_failed`, only the caller `_waiting`.

    Args:
        folder: The folder to write to. If another process writes instead of this one, nothing is collected.
    """

    def __init__(self, folder: BuildFolder) -> None:
        self._folder = folder
        self._parts: list[_Part] = []
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "craft_optim-anchors")
        self._waiting: deque[Future[None]] = deque()

    def push(self, tensors: dict[str, Tensor], lengths: dict[str, Tensor], batch: Flat) -> None:
        """Adds anchors to the shard.

        Args:
            tensors: `inputs.<name>` and `features.<name>`, on the CPU. They must not change afterwards.
            lengths: Key of a joined feature or ragged input -> number of positions or rows of each anchor.
            batch: The anchors as they were given to `build`.
        """
        self._submit(self._push, tensors, lengths, batch)

    def flush(self, shard: int) -> None:
        """Ends the shard: pushed anchors are written under this number."""
        self._submit(self._flush, shard)

    def drain(self) -> None:
        """Waits for the thread."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        if not self._folder.team.writes:
            return
        while len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._run, function, *args))

    # In the thread

    def _run(self, function: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        self._failed = True  # unless it reaches its end
        function(*args)
        self._failed = False

    def _push(self, tensors: dict[str, Tensor], lengths: dict[str, Tensor], batch: Flat) -> None:
        encodings: dict[str, Encoding] = {}
        if self._folder.settings["images"] == "uint8":
            for key, x in tensors.items():
                encoded = encode(x) if key.startswith("inputs.") and is_image(x) and key not in lengths else None
                if encoded is not None:
                    tensors[key], encodings[key] = encoded[0], (encoded[1], x.dtype)
        self._parts.append(_Part(tensors, lengths, encodings, anchor_checksums(batch), _categories(batch)))

    def _flush(self, shard: int) -> None:
        parts, self._parts = self._parts, []
        tensors: dict[str, Tensor] = {}
        encodings: dict[str, Encoding] = {}
        for key in parts[0].tensors:
            values, encoding = _encoded_alike(key, parts)
            if encoding is not None:
                encodings[key.removeprefix("inputs.")] = encoding
            if key in parts[0].lengths:
                tensors[key] = torch.cat(values)
                tensors[f"lengths.{key}"] = torch.cat([part.lengths[key] for part in parts])
            else:
                tensors |= packed(key, values)
        tensors = {key: x.contiguous() for key, x in tensors.items()}
        checksums = [checksum for part in parts for checksum in part.checksums]
        categories = [category for part in parts for category in part.categories]
        self._folder.write_shard(shard, tensors, encodings, checksums, categories)


def _categories(batch: Flat) -> tuple[str, ...]:
    """Category of each anchor, "" if the batch has none."""
    return batch.categories or ("",) * batch.count


def _encoded_alike(key: str, parts: list[_Part]) -> tuple[list[Tensor], Encoding | None]:
    """The parts of one tensor with their common encoding; decoded without one."""
    values, encodings = [part.tensors[key] for part in parts], [part.encodings.get(key) for part in parts]
    if len(set(encodings)) == 1:
        return values, encodings[0]
    values = [x if encoding is None else decode(x, *encoding) for x, encoding in zip(values, encodings, strict=True)]
    alike = encode_alike(values)  # an image may fit several formulas: find one for all
    return (values, None) if alike is None else (alike[0], (alike[1], values[0].dtype))
