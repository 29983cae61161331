"""Shard: a safetensors file of a cache, its tensors' places, and reads of single anchors.

A tensor `<key>` is stored in one of two ways:

- plainly, its first dimension the anchors;
- packed, if anchors differ in length: one after another, `lengths.<key>` [n] positions each. Positions at an anchor's
  end that repeat one value, as padding does, are left out: `widths.<key>` [n] is the anchor's length with them,
  `fills.<key>` [n] their value.

Files are read with `pread`, not mapped: exactly an anchor's bytes are read, the pages do not count as the process'
memory, and a truncated file raises an error instead of a bus error.
"""

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import images
from .files import Folder, OpenFile
from .packing import MAX_LEFT_OUT
from .variance import ChannelVariance

__all__ = ["AnchorCacheError", "Place", "Shard", "mean_variance", "read_plain", "variances"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # safetensors' own limit
_MAX_SIZE = 1 << 48  # elements of a tensor, empty dimensions left out: what torch can address
_INDEX = ("lengths.", "widths.", "fills.")
_TIMES = 3  # a file's time may change this often with the same content; then its time is ignored
_CHUNK = 1 << 24
_seek_and_read = threading.Lock()  # where there is no pread

_log = logging.getLogger("craft_optim")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Place = tuple["Shard", int, int]  # an anchor: its shard, its number in there, and the descriptor of the opened file


class AnchorCacheError(ValueError):
    """The cache cannot be used; the message has the file, the problem and the remedy."""


class _Entry(NamedTuple):
    """Place of one tensor in a shard's file. A row of it is an anchor or, if it is packed, a position."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    row_bytes: int


class _Index(NamedTuple):
    """Places of the anchors in a packed tensor.

    Attributes:
        starts: First position of each anchor, and the end of the last: int64 `[n + 1]`.
        widths: Length of each anchor with the positions that were left out, int64 `[n]`.
        fills: Value of the positions left out, `[n]`; None if there are none.
    """

    starts: np.ndarray[Any, np.dtype[np.int64]]
    widths: np.ndarray[Any, np.dtype[np.int64]]
    fills: Tensor | None


class Shard:
    """One safetensors file, read anchor by anchor; opened at the first read.

    A file that was written to since raises an error. One that was only touched, or restored from a copy, does not: if
    its time has changed, its content is compared with its checksum, once.

    Args:
        path: The file.
        count: Number of anchors that it must hold.
        size: Size of the file in bytes.
        encodings: Input name -> {"formula": ..., "dtype": ...}, for inputs stored as bytes.
        sha256: Checksum of the file.
        folder: The file's folder, if that may be renamed.

    Raises:
        AnchorCacheError: The file is missing, has another size, or its header does not fit.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        size: int,
        encodings: Mapping[str, Mapping[str, str]],
        sha256: str = "",
        folder: Folder | None = None,
    ) -> None:
        self.path, self.count, self.size, self.sha256 = path, count, size, sha256
        self.encodings: dict[str, images.Encoding] = {
            f"inputs.{name}": (x["formula"], getattr(torch, x["dtype"])) for name, x in encodings.items()
        }
        self._folder = folder
        self._file: OpenFile | None = None
        self._touched = 0
        self._indices: dict[str, _Index] = {}
        self.entries = self._header()
        self.keys = [key for key in self.entries if not key.startswith(_INDEX)]
        for key, entry in self.entries.items():
            owner = key.split(".", 1)[1]
            if key.startswith(_INDEX) and (owner not in self.entries or owner.startswith(_INDEX)):
                raise self._bad(f"its {key!r} belongs to no tensor")
            if key.startswith("widths.") and len(self.entries[owner].shape) != 1:
                raise self._bad(f"its {key!r} belongs to a tensor with more than one value per position")
            if key.startswith("fills.") and entry.dtype != self.entries[owner].dtype:
                raise self._bad(f"its {key!r} is {entry.dtype}, its {owner!r} {self.entries[owner].dtype}")

    def _bad(self, problem: str) -> AnchorCacheError:
        return AnchorCacheError(
            f"Shard {self.path} cannot be used: {problem}. Build the cache again with overwrite=True, or copy the "
            "file again from where it is whole."
        )

    def _open(self) -> OpenFile:
        return OpenFile(self.path, "rb") if self._folder is None else self._folder.open(self.path.name)

    # Header

    def _header(self) -> dict[str, _Entry]:
        try:
            with self._open() as file:
                status = os.fstat(file.fileno())
                self._modified = status.st_mtime_ns
                if status.st_size != self.size:
                    raise self._bad(f"it has {status.st_size} bytes where {self.size} were written")
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(self.size - 8, _MAX_HEADER):
                    raise self._bad("it does not begin like a safetensors file")
                header = json.loads(file.read(length))
        except OSError as error:
            raise self._bad(f"it cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, AnchorCacheError):
                raise
            raise self._bad("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries, begin, places = {}, 8 + length, []
        for key, value in header.items():
            entry = self._entry(key, value, begin, is_packed=f"lengths.{key}" in header)
            entries[key] = entry
            places.append((entry.start, entry.start + entry.shape[0] * entry.row_bytes))
        end = begin
        for start, stop in sorted(places):  # safetensors leave no holes and no overlaps
            if start != end:
                raise self._bad("the tensors in it do not follow each other")
            end = stop
        if end != self.size:
            raise self._bad(f"its header speaks of {end} bytes, the file has {self.size}")
        if self.count > self.size:
            raise self._bad(f"it has {self.size} bytes, which cannot be those of {self.count} anchors")
        return entries

    def _entry(self, key: str, value: Any, begin: int, *, is_packed: bool) -> _Entry:
        try:
            dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
            start, stop = value["data_offsets"]
            numbers = [*shape, start, stop]
            whole = all(type(x) is int and x >= 0 for x in numbers)
            whole = whole and math.prod(max(x, 1) for x in shape) <= _MAX_SIZE
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(f"the header's entry {key!r} is not that of a tensor") from error
        if not whole or stop - start != math.prod(shape) * dtype.itemsize:
            raise self._bad(f"the header's entry {key!r} contradicts itself")
        if not shape or (shape[0] != self.count and not is_packed):
            raise self._bad(f"{key!r} has shape {shape}, but {self.count} anchors are recorded")
        if not key.startswith(("inputs.", "features.", *_INDEX)):
            raise self._bad(f"it holds an unknown tensor {key!r}")
        if key.startswith(_INDEX) and (len(shape) != 1 or (dtype != torch.int32 and not key.startswith("fills."))):
            raise self._bad(f"its {key!r} is {dtype} of shape {shape} instead of one number per anchor")
        return _Entry(dtype, shape, begin + start, math.prod(shape[1:]) * dtype.itemsize)

    # Bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # open files do not travel to other processes

    def close(self) -> None:
        """Releases the file descriptor once no read needs it; the next read opens it again."""
        self._file = None

    def opened(self) -> OpenFile:
        """The file to read from; it stays open as long as it is referenced.

        Raises:
            AnchorCacheError: The file is not the one that the cache was opened with.
        """
        file = self._file
        if file is None:
            try:
                file = self._open()
            except OSError as error:
                raise self._bad(f"it cannot be read any more ({error.strerror or error})") from error
            self.check_unchanged(file)
            self._file = file
        return file

    def check_unchanged(self, file: OpenFile) -> None:
        """Raises AnchorCacheError if the file from `opened` has been written to since the cache was opened."""
        try:
            status = os.fstat(file.fileno())
        except OSError as error:
            self._file = None
            raise self._bad(f"it cannot be read any more ({error.strerror or error})") from error
        # Not by its inode, which some file systems change at every look
        if status.st_size == self.size and (status.st_mtime_ns == self._modified or self._touched >= _TIMES):
            return
        if status.st_size != self.size or not self.sha256 or self._digest(file) != self.sha256:
            self._file = None
            raise self._bad("it has changed since the cache was opened")
        self._modified, self._touched = status.st_mtime_ns, self._touched + 1
        if self._touched == _TIMES:
            _log.warning("%s gets new times without new content: they are not looked at any more", self.path)

    def _digest(self, file: OpenFile) -> str:
        digest, buffer = hashlib.sha256(), np.empty(_CHUNK, np.uint8)
        for offset in range(0, self.size, _CHUNK):
            part = buffer[: min(_CHUNK, self.size - offset)]
            self._fill(part, offset, file)
            digest.update(part.data)
        return digest.hexdigest()

    def _read_into(self, out: Bytes, offset: int) -> None:
        """Fills `out` with the file's bytes from `offset` on. Threads may read at the same time."""
        self._fill(out, offset, self.opened())

    def _fill(self, out: Bytes, offset: int, file: OpenFile) -> None:
        view, done = out.data, 0
        while done < len(out):
            try:
                if hasattr(os, "preadv"):
                    got = os.preadv(file.fileno(), [view[done:]], offset + done)
                else:
                    with _seek_and_read:
                        file.seek(offset + done)
                        got = file.readinto(view[done:])
            except OSError as error:
                raise self._bad(f"it cannot be read any more ({error.strerror or error})") from error
            if not got:
                raise self._bad(f"it ends before byte {offset + len(out)}: it was cut short after it was opened")
            done += got

    def whole(self, key: str) -> Tensor:
        """One tensor of the shard as it is stored."""
        entry = self.entries[key]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        if out.numel():
            self._read_into(out.reshape(-1).view(torch.uint8).numpy(), entry.start)
        return out

    def checksum(self) -> str:
        """sha256 of the file."""
        with self._open() as file:
            return self._digest(file)

    def verify(self) -> None:
        """Raises AnchorCacheError unless the file is what was written. Reads all of it."""
        try:
            found = self.checksum()
        except OSError as error:
            raise self._bad(f"it cannot be read ({error.strerror or error})") from error
        if found != self.sha256:
            raise self._bad("its contents differ from what was written (sha256)")

    # Anchors

    def is_packed(self, key: str) -> bool:
        """True if the anchors of this tensor have lengths of their own."""
        return f"lengths.{key}" in self.entries

    def index(self, key: str) -> _Index | None:
        """Places of the anchors in a packed tensor; None if it is not packed. Read once."""
        if self.is_packed(key) and key not in self._indices:
            lengths = self.whole(f"lengths.{key}").long()
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            if int(lengths.min()) < 0 or int(starts[-1]) != self.entries[key].shape[0]:
                raise self._bad(f"its 'lengths.{key}' do not add up to {self.entries[key].shape[0]} positions")
            widths, fills = lengths, None
            if f"widths.{key}" in self.entries and f"fills.{key}" in self.entries:
                widths, fills = self.whole(f"widths.{key}").long(), self.whole(f"fills.{key}")
                if bool(((widths < lengths) | (widths > lengths + MAX_LEFT_OUT)).any()):
                    raise self._bad(f"its 'widths.{key}' do not fit the lengths")
            self._indices[key] = _Index(starts.numpy(), widths.numpy(), fills)
        return self._indices.get(key)

    def width(self, key: str, anchor: int) -> int:
        """Size of one anchor's dimension 1, without padding beside longer anchors."""
        index = self.index(key)
        return self.entries[key].shape[1] if index is None else int(index.widths[anchor])

    def form(self, key: str) -> tuple[torch.dtype, int, tuple[int, ...]]:
        """The dtype after reading, the number of dimensions, and the sizes from dimension 2 on: alike in all shards."""
        shape, packs = self.entries[key].shape, self.is_packed(key)
        return self.dtype(key), len(shape) + packs, shape[2 - packs :]

    def rows(self, key: str, anchor: int) -> tuple[int, int]:
        """First and last + 1 of the rows of one anchor: its positions if the tensor is packed, itself otherwise."""
        index = self.index(key)
        return (anchor, anchor + 1) if index is None else (int(index.starts[anchor]), int(index.starts[anchor + 1]))

    def read_anchor(self, key: str, anchor: int, out: Bytes) -> None:
        """Copies one anchor's bytes to the front of `out`, left-out positions included, and makes the rest zero.

        Raises:
            AnchorCacheError: The file has changed since it was opened.
        """
        entry, index = self.entries[key], self.index(key)
        first, last = self.rows(key, anchor)
        end = (last - first) * entry.row_bytes
        if end:
            self._read_into(out[:end], entry.start + first * entry.row_bytes)
        if index is not None and index.fills is not None:
            begin, end = end, int(index.widths[anchor]) * entry.row_bytes
            value = index.fills[anchor : anchor + 1].view(torch.uint8).numpy()
            out[begin:end].reshape(-1, len(value))[:] = value
        out[end:] = 0

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a read gives, images decoded."""
        return self.encodings[key][1] if key in self.encodings else self.entries[key].dtype


def read_plain(key: str, places: list[Place], out: Bytes, row_bytes: int) -> None:
    """Reads anchors of an unpacked tensor, one after another, into `out`.

    Most reading is this loop: a system call for each anchor, and little else.
    """
    read, view, begin = getattr(os, "preadv", _no_preadv), out.data, 0
    for shard, anchor, descriptor in places:
        end, offset = begin + row_bytes, shard.entries[key].start + anchor * row_bytes
        try:
            got = read(descriptor, (view[begin:end],), offset)
        except OSError:
            got = 0
        if got != row_bytes:  # the slow way continues, or names the error
            shard._read_into(out[begin:end], offset)
        begin = end


def _no_preadv(descriptor: int, parts: Any, offset: int) -> int:
    return 0


def mean_variance(shards: Iterable[Shard], key: str) -> float:
    """The variance of a feature over anchors (and positions), averaged over its last dimension."""
    found = variances(shards, key)
    return float(f"{sum(found) / len(found):.9g}")


def variances(shards: Iterable[Shard], key: str) -> list[float]:
    """The variance of a feature over anchors (and positions), for each entry of its last dimension."""
    found = ChannelVariance()
    for shard in shards:
        values = shard.whole(key)
        shard.close()  # there may be more of them than descriptors
        found.add(values.reshape(-1, values.shape[-1]))
    return found.result()
