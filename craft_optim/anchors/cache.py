"""The anchors on disk: `cache.json` and safetensors shards. Open, check, read.

    anchors/
      cache.json                    schema_version, counts, shards with sizes and checksums, features, teacher
      shard-00000.safetensors       inputs.<name> and features.<name>, first dimension = anchors
      ...

Features are, where the cache has them:

    logprobs                        [n, ..., V]   the teacher's log-probabilities
    topk_logprobs, topk_indices     [n, ..., k]   its k likeliest classes (indices int32)
    rest_logprob                    [n, ...]      log of the mass of all others
    mask                            [n, ...]      positions whose logits count; absent: all
    hidden.<tap>.<span>             [n, D]        pooled hidden states, or [n, T, D] unpooled
    span.<span>                     [n, T]        positions of a span; absent: all

Where anchors differ in length, a shard is padded with zeros on the right of dimension 1 and `lengths.<key>` holds each
anchor's own size. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import images
from .structure import Inputs, Structure

__all__ = ["SCHEMA_VERSION", "AnchorBatch", "AnchorCache", "AnchorCacheError", "FeatureSpec", "Shard", "tap_key"]

SCHEMA_VERSION = 1
FORMAT = "craft_optim.anchors"
MANIFEST = "cache.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_MAPPED = 256  # shards mapped at a time: each holds a file descriptor, of which a process often has 1024
_MAX_HEADER = 100_000_000  # safetensors' own limit


class AnchorCacheError(ValueError):
    """A cache that cannot be used as it is; says which file, what is wrong with it and what to do."""


class AnchorBatch(NamedTuple):
    """Some anchors.

    Attributes:
        inputs: In the structure of the batches that the cache was built from.
        features: The teacher's outputs, by name.
    """

    inputs: Inputs
    features: dict[str, Tensor]


def tap_key(layer: int | str, span: str) -> str:
    """The feature name of one hidden-state tap. Module names get a prefix: a module may be called "3"."""
    return f"hidden.{layer if isinstance(layer, int) else 'module:' + layer}.{span}"


@dataclass(frozen=True)
class FeatureSpec:
    """What a cache holds of its teacher.

    Attributes:
        logits: "full", "top_k", or None.
        top_k: k, or None.
        classes: Size of the logits' last dimension, or None.
        dtype: Storage dtype of log-probabilities and hidden states, e.g. "float16".
        layers: Hidden-state taps: layer numbers >= 0 and module names.
        pooling: Span -> pooling mode, the same for every tap.
        variances: Tap key -> variance of that feature over the anchors (and positions), averaged over its last
            dimension.
        mask: Where the logits' mask came from: an input's name, a function's name, or None.
        spans: The function that told the spans apart, or None for the default.
        forward: The function that replaced the model's call, or None.
        autocast: The autocast dtype the teacher ran under, or None.
    """

    logits: str | None
    top_k: int | None
    classes: int | None
    dtype: str
    layers: tuple[int | str, ...]
    pooling: dict[str, str]
    variances: dict[str, float]
    mask: str | None
    spans: str | None
    forward: str | None
    autocast: str | None

    def describe(self) -> str:
        """One line for people."""
        parts = []
        if self.logits == "full":
            parts.append(f"full logits of {self.classes} classes")
        if self.logits == "top_k":
            parts.append(f"the top {self.top_k} of {self.classes} logits")
        if self.layers:
            pools = ", ".join(f"{span}: {mode}" for span, mode in self.pooling.items())
            parts.append(f"hidden states of layers {', '.join(map(str, self.layers))} ({pools})")
        return f"{' and '.join(parts) or 'nothing'} as {self.dtype}"


class _Entry(NamedTuple):
    """One tensor in a shard: its place in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    row_bytes: int


class Shard:
    """One safetensors file, read row by row through a memory map that opens at the first read.

    Args:
        path: The file.
        count: Number of anchors that it must hold.
        size: Its size in bytes.
        encodings: Input name -> formula and dtype, for inputs stored as bytes.

    Raises:
        AnchorCacheError: The file is missing, has another size, or its header is not that of such a shard.
    """

    def __init__(
        self, path: Path, count: int, size: int, encodings: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.path, self.count, self.size = path, count, size
        self.encodings = dict(encodings or {})
        self.entries = self._header()
        self._map: mmap.mmap | None = None
        self.lengths = {
            key.removeprefix("lengths."): self.whole(key) for key in self.entries if key.startswith("lengths.")
        }
        for key, lengths in self.lengths.items():
            entry = self.entries.get(key)
            if entry is None or len(entry.shape) < 2 or lengths.dtype != torch.int32 or lengths.ndim != 1:
                raise self._bad(f"its 'lengths.{key}' belong to no tensor of two or more dimensions")
            if int(lengths.min()) < 0 or int(lengths.max()) > entry.shape[1]:
                raise self._bad(f"its 'lengths.{key}' lie outside of 0..{entry.shape[1]}")

    def _bad(self, problem: str) -> AnchorCacheError:
        return AnchorCacheError(
            f"Shard {self.path} cannot be used: {problem}. Build the cache again with overwrite=True, or copy the "
            "file again from where it is whole."
        )

    def _header(self) -> dict[str, _Entry]:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.size:
                    raise self._bad(f"it has {size} bytes where {self.size} were written")
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _MAX_HEADER):
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
        entries, begin, places = {}, 8 + length, []
        for key, value in header.items():
            if key == "__metadata__":
                continue
            entry = self._entry(key, value, begin)
            entries[key] = entry
            places.append((entry.start, entry.start + entry.shape[0] * entry.row_bytes))
        end = begin
        for start, stop in sorted(places):  # safetensors leave no holes and no overlaps
            if start != end:
                raise self._bad("the tensors in it do not follow each other")
            end = stop
        if end != size:
            raise self._bad(f"its header speaks of {end} bytes, the file has {size}")
        return entries

    def _entry(self, key: str, value: Any, begin: int) -> _Entry:
        try:
            dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
            start, stop = value["data_offsets"]
            numbers = [*shape, start, stop]
            whole = all(type(x) is int and x >= 0 for x in numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad(f"the header's entry {key!r} is not that of a tensor") from error
        if not whole or stop - start != math.prod(shape) * dtype.itemsize:
            raise self._bad(f"the header's entry {key!r} contradicts itself")
        if not shape or shape[0] != self.count:
            raise self._bad(f"{key!r} has shape {shape}, but {self.count} anchors are recorded")
        if not key.startswith(("inputs.", "features.", "lengths.")):
            raise self._bad(f"it holds an unknown tensor {key!r}")
        return _Entry(dtype, shape, begin + start, math.prod(shape[1:]) * dtype.itemsize)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # maps do not travel to other processes

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise self._bad("it has changed its size since the cache was opened")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):  # no read-ahead beyond what `copy_row` asks for
                self._map.madvise(mmap.MADV_RANDOM)
        return self._map

    def whole(self, key: str) -> Tensor:
        """One tensor of the shard as it is stored, padding included; read at once, without the map."""
        entry = self.entries[key]
        data = np.fromfile(self.path, np.uint8, entry.shape[0] * entry.row_bytes, offset=entry.start)
        return torch.from_numpy(data).view(entry.dtype).reshape(entry.shape)

    def close(self) -> None:
        """Gives the map and its file descriptor back; the next read opens it again."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def width(self, key: str, row: int) -> int:
        """Size of dimension 1 of one anchor, without padding."""
        return int(self.lengths[key][row]) if key in self.lengths else self.entries[key].shape[1]

    def copy_row(self, key: str, row: int, out: np.ndarray[Any, np.dtype[np.uint8]], width: int) -> None:
        """Copies one anchor's bytes, of dimension 1 up to `width`, to the front of `out` and fills the rest with
        zeros."""
        entry = self.entries[key]
        length = entry.row_bytes
        if len(entry.shape) > 1 and width < entry.shape[1]:
            length = length // entry.shape[1] * width
        start = entry.start + row * entry.row_bytes
        source = self._bytes()
        if length >= 65536 and hasattr(mmap, "MADV_WILLNEED"):  # one large read instead of a fault per page
            page = start - start % mmap.PAGESIZE
            source.madvise(mmap.MADV_WILLNEED, page, start + length - page)
        out[:length] = np.frombuffer(source, np.uint8, length, start)
        out[length:] = 0

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a read gives, images decoded."""
        encoding = self.encodings.get(key.removeprefix("inputs.")) if key.startswith("inputs.") else None
        if encoding is None:
            return self.entries[key].dtype
        dtype: torch.dtype = getattr(torch, encoding["dtype"])
        return dtype

    def formula(self, key: str) -> str | None:
        """How the images of this key are decoded; None for what is stored as it is."""
        return (
            self.encodings[key.removeprefix("inputs.")]["formula"]
            if self.dtype(key) != self.entries[key].dtype
            else None
        )

    def row(self, key: str, row: int) -> Tensor:
        """One anchor's tensor `[1, ...]`, without padding, images decoded."""
        return _gather(key, [(self, row)])

    def checksum(self) -> str:
        """sha256 of the file."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class _Manifest:
    """`cache.json`, read with a check of every value's type."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, problem: str, remedy: str = "Build the cache again with overwrite=True.") -> AnchorCacheError:
        return AnchorCacheError(f"{self.path} cannot be used: {problem}. {remedy}")

    def load(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise self.error("there is no such folder", "Check the path, or build the cache.") from None
            remedy = "Run the same `build` again to finish it." if self._unfinished() else "Check the path."
            raise self.error("there is no such file in the folder", remedy) from None
        except OSError as error:
            raise self.error(f"it cannot be read ({error.strerror or error})", "Check the path.") from error
        except (ValueError, RecursionError) as error:
            raise self.error("it is not JSON") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise self.error(f"it is not a cache of anchors (its 'format' is not {FORMAT!r})", "Check the path.")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise self.error(
                f"it has schema_version {version!r}, this library reads {SCHEMA_VERSION}",
                "Build the cache again with overwrite=True, or use the version of craft-optim that wrote it.",
            )
        return data

    def _unfinished(self) -> bool:
        return (self.path.parent / "build.json").exists()

    def get(self, owner: Any, key: str, *types: type, optional: bool = False) -> Any:
        value = owner.get(key) if isinstance(owner, dict) else None
        if optional and value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join(t.__name__ for t in types)
            raise self.error(f"its {key!r} must be {names}. Found {value!r:.60}")
        return value

    def strings(self, owner: Any, key: str) -> tuple[str, ...]:
        values = self.get(owner, key, list)
        if not all(isinstance(v, str) for v in values):
            raise self.error(f"its {key!r} must be strings. Found {values!r:.60}")
        return tuple(values)


class AnchorCache:
    """Anchors and what the teacher said about them. Made by `build` or `AnchorCache.open`.

    Attributes:
        path: The folder.
        features: What it holds of the teacher.
        structure: How its inputs are put together.
        fingerprint: The teacher's, see `fingerprint`.
        model_id: The teacher's name, as given to `build`; or None.

    Reading costs the bytes of the anchors read and no more, whatever their order; no shard is ever loaded as a whole.
    An opened cache can be pickled and read from other processes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        m = _Manifest(self.path / MANIFEST)
        data = m.load()
        f = m.get(data, "features", dict)
        layers = m.get(f, "layers", list)
        if not all(isinstance(x, str | int) and not isinstance(x, bool) for x in layers):
            raise m.error(f"its 'layers' must be numbers or names. Found {layers!r:.60}")
        self.features = FeatureSpec(
            logits=m.get(f, "logits", str, optional=True),
            top_k=m.get(f, "top_k", int, optional=True),
            classes=m.get(f, "classes", int, optional=True),
            dtype=m.get(f, "dtype", str),
            layers=tuple(layers),
            pooling={str(k): str(v) for k, v in m.get(f, "pooling", dict).items()},
            variances={k: float(m.get(f["variances"], k, float, int)) for k in m.get(f, "variances", dict)},
            mask=m.get(f, "mask", str, optional=True),
            spans=m.get(f, "spans", str, optional=True),
            forward=m.get(f, "forward", str, optional=True),
            autocast=m.get(f, "autocast", str, optional=True),
        )
        inputs = m.get(data, "inputs", dict)
        self.structure = Structure(m.get(inputs, "kind", str), m.strings(inputs, "names"), m.strings(inputs, "skipped"))
        if self.structure.kind not in ("tensor", "tuple", "mapping"):
            raise m.error(f"its 'kind' of inputs is unknown: {self.structure.kind!r:.60}")
        teacher = m.get(data, "teacher", dict)
        self.fingerprint: str = m.get(teacher, "fingerprint", str)
        self.model_id: str | None = m.get(teacher, "model_id", str, optional=True)
        built = m.get(data, "built_with", dict)
        self._built_with = {"images": m.get(built, "images", str), "shard_size": m.get(built, "shard_size", int)}
        self._teacher = teacher
        self._shards: list[Shard] = []
        self._checksums: list[str] = []
        for record in m.get(data, "shards", list):
            name = m.get(record, "file", str)
            if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
                raise m.error(f"a shard's file name must name a file in the folder. Found {name!r:.60}")
            encodings = m.get(record, "images", dict)
            for key in encodings:
                formula, dtype = m.get(encodings[key], "formula", str), m.get(encodings[key], "dtype", str)
                if formula not in images.FORMULAS or not isinstance(getattr(torch, dtype, None), torch.dtype):
                    raise m.error(f"the images {key!r} have an unknown encoding {formula!r:.40} as {dtype!r:.40}")
            count, size = m.get(record, "anchors", int), m.get(record, "bytes", int)
            if count < 1:
                raise m.error(f"shard {name!r} must have at least one anchor. Found {count}")
            self._checksums.append(m.get(record, "sha256", str))
            self._shards.append(Shard(self.path / name, count, size, encodings))
        self._mapped: dict[int, None] = {}
        self._starts = np.cumsum([0, *(shard.count for shard in self._shards)])
        total = m.get(data, "anchors", int)
        if not self._shards or total != int(self._starts[-1]):
            raise m.error(f"it speaks of {total} anchors, its shards hold {int(self._starts[-1])}")
        self._keys = self._check_keys(m)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "AnchorCache":
        """Opens a finished cache and checks it.

        Checked are the schema, the counts, every shard's size and header and that all shards hold the same tensors.
        Contents are not: `verify` does that, at the price of reading everything.

        Raises:
            AnchorCacheError: The folder holds no finished cache, or one whose parts do not fit together.
        """
        return cls(path)

    def _check_keys(self, m: _Manifest) -> list[str]:
        f = self.features
        wanted = {f"inputs.{name}" for name in self.structure.names}
        if f.logits == "full":
            wanted.add("features.logprobs")
        elif f.logits == "top_k":
            wanted |= {"features.topk_logprobs", "features.topk_indices"}
        wanted |= {f"features.{tap_key(layer, span)}" for layer in f.layers for span in f.pooling}
        first = self._shards[0]
        keys = [key for key in first.entries if not key.startswith("lengths.")]
        if missing := wanted - set(keys):
            raise m.error(f"shard {first.path.name} lacks {', '.join(sorted(missing))}, which it speaks of")
        for shard in self._shards:
            if {key for key in shard.entries if not key.startswith("lengths.")} != set(keys):
                raise m.error(f"shards {first.path.name} and {shard.path.name} hold different tensors")
            for name, encoding in shard.encodings.items():
                entry = shard.entries.get(f"inputs.{name}")
                if entry is None or entry.dtype != torch.uint8:
                    raise m.error(
                        f"shard {shard.path.name} has no bytes for the images {name!r} ({encoding['formula']})"
                    )
            for key in keys:
                a, b = first.entries[key], shard.entries[key]
                if len(a.shape) != len(b.shape) or a.shape[2:] != b.shape[2:]:
                    raise m.error(
                        f"{key!r} has shape {a.shape} in {first.path.name} and {b.shape} in {shard.path.name}"
                    )
                if first.dtype(key) != shard.dtype(key):
                    raise m.error(f"{key!r} has different dtypes in {first.path.name} and {shard.path.name}")
        return keys

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"AnchorCache({str(self.path)!r}: {self.describe()})"

    @property
    def settings(self) -> dict[str, Any]:
        """What `build` was asked for, in the types of JSON."""
        spec = {**asdict(self.features), "classes": None, "variances": {}, "layers": list(self.features.layers)}
        return {"features": spec, **self._built_with, "teacher": self._teacher}

    def describe(self) -> str:
        """One line: how many anchors, and what is held of the teacher."""
        return f"{len(self)} anchors, {self.features.describe()}"

    def verify(self) -> None:
        """Compares every shard with its checksum. Reads all of them: seconds per gigabyte.

        Raises:
            AnchorCacheError: A shard is not the one that was written; names it.
        """
        for shard, checksum in zip(self._shards, self._checksums, strict=True):
            try:
                found = shard.checksum()
            except OSError as error:
                raise shard._bad(f"it cannot be read ({error.strerror or error})") from error
            if found != checksum:
                raise shard._bad("its contents differ from what was written (sha256)")

    def read(self, indices: Sequence[int] | Tensor | Iterable[int], *, features: bool = True) -> AnchorBatch:
        """The given anchors, in that order, as new CPU tensors.

        Reads their bytes only. Where they differ in length, shorter ones are padded with zeros on the right, up to the
        longest of them.

        Args:
            indices: Numbers in [0, len(cache)); at least one, repetitions allowed.
            features: False leaves the teacher's outputs where they are.

        Raises:
            IndexError: A number is out of range, or there is none.
            AnchorCacheError: A shard has changed since it was opened.
        """
        wanted = np.asarray(indices.tolist() if isinstance(indices, Tensor) else list(indices), dtype=np.int64).reshape(
            -1
        )
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"`indices` must be in [0, {len(self)}) and at least one. Found {wanted.tolist()!s:.80}.")
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        places = [
            (self._shards[n], int(i - self._starts[n])) for n, i in zip(numbers.tolist(), wanted.tolist(), strict=True)
        ]
        named = {key: _gather(key, places) for key in self._keys if features or key.startswith("inputs.")}
        for n in numbers.tolist():  # in the order of their last use
            self._mapped.pop(n, None)
            self._mapped[n] = None
        while len(self._mapped) > _MAX_MAPPED:
            oldest = next(iter(self._mapped))
            del self._mapped[oldest]
            self._shards[oldest].close()
        inputs = {key.removeprefix("inputs."): x for key, x in named.items() if key.startswith("inputs.")}
        taught = {key.removeprefix("features."): x for key, x in named.items() if key.startswith("features.")}
        return AnchorBatch(self.structure.rebuild(inputs), taught)


def _gather(key: str, places: list[tuple[Shard, int]]) -> Tensor:
    """One tensor's rows from the given shards, padded to the longest, images decoded."""
    first = places[0][0]
    dtype = first.dtype(key)
    shape = [len(places), *first.entries[key].shape[1:]]
    width = 0
    if len(shape) > 1:
        width = shape[1] = max(shard.width(key, row) for shard, row in places)
    formulas = {shard.formula(key) for shard, _ in places}
    if len(formulas) > 1:  # different shards need different decoding: row by row
        out = torch.zeros(shape, dtype=dtype)
        for i, place in enumerate(places):
            row = _gather(key, [place])[0]
            out[i, : len(row)] = row
        return out
    out = torch.empty(shape, dtype=first.entries[key].dtype)
    if out.numel():
        data = out.reshape(len(places), -1).view(torch.uint8).numpy()
        for i, (shard, row_number) in enumerate(places):
            shard.copy_row(key, row_number, data[i], width)
    formula = formulas.pop()
    if formula is None:
        return out
    decoded = images.decode(out, formula, dtype)
    for i, (shard, row_number) in enumerate(places):
        if len(shape) > 1:
            decoded[i, shard.width(key, row_number) :] = 0  # padding is zero, not what byte 0 stands for
    return decoded
