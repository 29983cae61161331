"""The anchors on disk: `cache.json` and safetensors shards. Open, check, read.

    anchors/
      cache.json                    schema_version, counts, shards with sizes and checksums, features, teacher
      shard-00000.safetensors       inputs.<name> and features.<name>, see `shards`
      ...

Features are, where the cache has them:

    mask                            [n, ...]      positions whose logits (or tokens) count; absent: all
    logprobs                        [n, ..., V]   the teacher's log-probabilities
    topk_logprobs, topk_indices     [n, ..., k]   its k likeliest classes (indices int32)
    rest_logprob                    [n, ...]      log of the mass of all others
    tokens, token_logprobs          [n, ...]      what it generated (int32), and with which log-probability
    hidden.<tap>.<span>             [n, D]        pooled hidden states, or [n, T, D] unpooled
    span.<span>                     [n, T]        positions of a span; absent: all
    frozen.<module>.<call>.<leaf>   [n, ...]      outputs of modules that do not train

Where there is a mask, logits and tokens are those of its positions only, anchor after anchor: [positions, ...]; so are
unpooled hidden states of a span. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import images
from .reading import Reading, reading_of
from .shards import AnchorCacheError, Place, Shard, read_plain
from .structure import Inputs, Structure

if TYPE_CHECKING:
    from .cached import CachedRetention

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SCHEMA_VERSION",
    "AnchorBatch",
    "AnchorCache",
    "AnchorCacheError",
    "Encoding",
    "FeatureSpec",
    "cover",
    "dtype_name",
    "is_mask",
    "manifest_text",
    "tap_key",
]

SCHEMA_VERSION = 2
FORMAT = "craft_optim.anchors"
MANIFEST = "cache.json"

Encoding = tuple[str, torch.dtype]

_MAX_OPEN = 256  # shards open at a time: each holds a file descriptor, of which a process often has 1024


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


def dtype_name(dtype: torch.dtype) -> str:
    """The name of torch.float16 is "float16"."""
    return str(dtype).removeprefix("torch.")


def is_mask(name: str) -> bool:
    """Whether a feature says which positions count."""
    return name == "mask" or name.startswith("span.")


def cover(name: str) -> str | None:
    """The mask that says which positions of a feature count, if there is one; None for masks and the like."""
    if name.startswith("hidden."):
        return f"span.{name.rsplit('.', 1)[1]}"
    return None if is_mask(name) or name.startswith("frozen.") else "mask"


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
        tokens: How the teacher generated tokens, or None if it did not.
        frozen: Modules whose outputs are kept.
        batch_dim: Where the anchors are in the hidden states: dimension 0 or 1.
    """

    logits: str | None = None
    top_k: int | None = None
    classes: int | None = None
    dtype: str = "float16"
    layers: tuple[int | str, ...] = ()
    pooling: dict[str, str] = field(default_factory=dict)
    variances: dict[str, float] = field(default_factory=dict)
    mask: str | None = None
    spans: str | None = None
    forward: str | None = None
    autocast: str | None = None
    tokens: str | None = None
    frozen: tuple[str, ...] = ()
    batch_dim: int = 0

    def describe(self) -> str:
        """One line for people."""
        parts = []
        if self.logits == "full":
            parts.append(f"full logits of {self.classes} classes")
        if self.logits == "top_k":
            parts.append(f"the top {self.top_k} of {self.classes} logits")
        if self.tokens:
            parts.append(f"tokens ({self.tokens})")
        if self.layers:
            pools = ", ".join(f"{span}: {mode}" for span, mode in self.pooling.items())
            parts.append(f"hidden states of layers {', '.join(map(str, self.layers))} ({pools})")
        if self.frozen:
            parts.append(f"outputs of {', '.join(self.frozen)}")
        return f"{' and '.join(parts) or 'nothing'} as {self.dtype}"


def manifest_text(data: Mapping[str, Any]) -> str:
    """`cache.json`, with a checksum of everything else in it."""
    body = json.dumps({**data, "sha256": ""}, indent=1)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**data, "sha256": digest}, indent=1) + "\n"


class _Manifest:
    """`cache.json`, read with a check of every value's type."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, problem: str, remedy: str = "Build the cache again with overwrite=True.") -> AnchorCacheError:
        return AnchorCacheError(f"{self.path} cannot be used: {problem}. {remedy}")

    def load(self) -> dict[str, Any]:
        try:
            text = self.path.read_bytes()
            data = json.loads(text)
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
        data.pop("sha256", None)
        if manifest_text(data).encode() != text:
            raise self.error("it was changed after it was written (sha256)")
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

    def features(self, owner: Any) -> FeatureSpec:
        layers = self.get(owner, "layers", list)
        if not all(isinstance(x, str | int) and not isinstance(x, bool) for x in layers):
            raise self.error(f"its 'layers' must be numbers or names. Found {layers!r:.60}")
        words = {
            key: self.get(owner, key, str, optional=True)
            for key in ("logits", "mask", "spans", "forward", "autocast", "tokens")
        }
        if words["logits"] not in (None, "full", "top_k"):
            raise self.error(f"its 'logits' must be 'full', 'top_k' or null. Found {words['logits']!r:.60}")
        variances = self.get(owner, "variances", dict)
        spec = FeatureSpec(
            top_k=self.get(owner, "top_k", int, optional=True),
            classes=self.get(owner, "classes", int, optional=True),
            dtype=self.get(owner, "dtype", str),
            layers=tuple(layers),
            pooling={str(k): str(v) for k, v in self.get(owner, "pooling", dict).items()},
            variances={k: float(self.get(variances, k, float, int)) for k in variances},
            frozen=self.strings(owner, "frozen"),
            batch_dim=self.get(owner, "batch_dim", int),
            **words,
        )
        if spec.dtype not in ("float16", "bfloat16", "float32"):
            raise self.error(f"its 'dtype' must be float16, bfloat16 or float32. Found {spec.dtype!r:.60}")
        return spec


class AnchorCache:
    """Anchors and what the teacher said about them. Made by `build` or `AnchorCache.open`.

    Attributes:
        path: The folder.
        features: What it holds of the teacher.
        reading: How the teacher was read; of its functions those that `build` or `open` was given.
        structure: How its inputs are put together.
        fingerprint: The teacher's, see `fingerprint`; None if it is not known, as of imported caches.
        model_id: The teacher's name, as given to `build`; or None.
        origin: Where an imported cache came from; or None.
        first_anchors: Checksums of the first anchors, as they were given to `build`.

    Reading costs the bytes of the anchors read and no more, whatever their order; no shard is ever loaded as a whole,
    and memory does not grow with the size of the cache. Threads may read at the same time; an opened cache can be
    pickled and read from other processes, which leaves the functions of its reading behind.
    """

    def __init__(self, path: str | os.PathLike[str], reading: Reading | None = None) -> None:
        self.path = Path(path)
        m = _Manifest(self.path / MANIFEST)
        try:
            self._load(m, m.load())
        except (OverflowError, RecursionError) as error:
            raise m.error("its numbers are too large, or it is nested too deeply") from error
        self.reading = reading_of(self, reading)

    def _load(self, m: _Manifest, data: dict[str, Any]) -> None:
        self.features = m.features(m.get(data, "features", dict))
        inputs = m.get(data, "inputs", dict)
        self.structure = Structure(m.get(inputs, "kind", str), m.strings(inputs, "names"), m.strings(inputs, "skipped"))
        if self.structure.kind not in ("tensor", "tuple", "mapping") or not self.structure.names:
            raise m.error(f"its 'kind' of inputs is unknown: {self.structure.kind!r:.60} {self.structure.names!r:.60}")
        teacher = m.get(data, "teacher", dict)
        self.fingerprint: str | None = m.get(teacher, "fingerprint", str, optional=True)
        self.model_id: str | None = m.get(teacher, "model_id", str, optional=True)
        self.origin: str | None = m.get(teacher, "origin", str, optional=True)
        self.first_anchors = m.strings(data, "first_anchors")
        self._settings = {
            "features": {**asdict(self.features), "classes": None, "variances": {}},
            **m.get(data, "built_with", dict),
            "teacher": teacher,
        }
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
        self._open: dict[int, None] = {}
        self._lock = threading.Lock()
        self._starts = np.cumsum([0, *(shard.count for shard in self._shards)])
        total = m.get(data, "anchors", int)
        if not self._shards or total != int(self._starts[-1]):
            raise m.error(f"it speaks of {total} anchors, its shards hold {int(self._starts[-1])}")
        self._keys = self._check_keys(m)

    @classmethod
    def open(cls, path: str | os.PathLike[str], reading: Reading | None = None) -> "AnchorCache":
        """Opens a finished cache and checks it.

        Checked are the manifest, against its checksum, the schema, the counts, every shard's size and header and that
        all shards hold the same tensors. Contents are not: `verify` does that, at the price of reading everything.

        Args:
            path: The folder.
            reading: The one that it was built with. Only functions are needed, `forward` above all: the rest is in the
                manifest.

        Raises:
            AnchorCacheError: The folder holds no finished cache, or one whose parts do not fit together.
            AnchorMismatchError: It was built with another reading.
        """
        return cls(path, reading)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of retention that it serves: "logits", "hidden", "tokens"."""
        f = self.features
        held = {"logits": f.logits, "hidden": f.layers or None, "tokens": f.tokens}
        return tuple(kind for kind, what in held.items() if what is not None)

    def retention(
        self, model: nn.Module, kind: str | None = None, batch_size: int = 16, **settings: Any
    ) -> "CachedRetention":
        """The retention closure that fits: `LogitRetention`, `HiddenRetention` or `TokenRetention`.

        Args:
            model: The model in training.
            kind: One of `kinds`. None: the only one.
            batch_size: Anchors per pass (and process).
            **settings: Further arguments of its class.

        Raises:
            ValueError: There is no such kind, or there are several; and as its class.
        """
        from .cached import CachedRetention
        from .hidden_retention import HiddenRetention
        from .logit_retention import LogitRetention
        from .token_retention import TokenRetention

        classes: dict[str, type[CachedRetention]] = {
            "logits": LogitRetention,
            "hidden": HiddenRetention,
            "tokens": TokenRetention,
        }
        if kind is None and len(self.kinds) == 1:
            (kind,) = self.kinds
        if kind not in self.kinds:
            raise ValueError(
                f"`kind` must be one of {', '.join(map(repr, self.kinds))}, which {self.path} holds and whose units "
                f"differ. Found kind={kind!r}."
            )
        return classes[kind](model, self, batch_size, **settings)

    def _check_keys(self, m: _Manifest) -> list[str]:
        f = self.features
        wanted = {f"inputs.{name}" for name in self.structure.names}
        if f.logits == "full":
            wanted.add("features.logprobs")
        elif f.logits == "top_k":
            wanted |= {"features.topk_logprobs", "features.topk_indices"}
        if f.tokens is not None:
            wanted |= {"features.tokens", "features.mask"}
        wanted |= {f"features.{tap_key(layer, span)}" for layer in f.layers for span in f.pooling}
        first = self._shards[0]
        if missing := wanted - set(first.keys):
            raise m.error(f"shard {first.path.name} lacks {', '.join(sorted(missing))}, which it speaks of")
        names = [key.removeprefix("features.") for key in first.keys if key.startswith("features.")]
        self._joined = {
            f"features.{name}" for name in names if first.is_packed(f"features.{name}") and cover(name) in names
        }
        for shard in self._shards:
            if set(shard.keys) != set(first.keys):
                raise m.error(f"shards {first.path.name} and {shard.path.name} hold different tensors")
            for key, encoding in shard.encodings.items():
                if key not in shard.entries or shard.entries[key].dtype != torch.uint8:
                    raise m.error(f"shard {shard.path.name} has no bytes for the images {key!r} ({encoding})")
            for key in first.keys:
                same = first.form(key) == shard.form(key)
                if not same or (key in self._joined and not shard.is_packed(key)):
                    raise m.error(
                        f"{key!r} is {first.form(key)} in {first.path.name} and {shard.form(key)} in {shard.path.name}"
                    )
        self._same = {  # the usual case, which is read fastest
            key
            for key in first.keys
            if all(
                not shard.is_packed(key)
                and shard.entries[key].shape[1:] == first.entries[key].shape[1:]
                and shard.encoding(key) == first.encoding(key)
                for shard in self._shards
            )
        }
        return first.keys

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"AnchorCache({str(self.path)!r}: {self.describe()})"

    @property
    def settings(self) -> dict[str, Any]:
        """What `build` was asked for, in the types of JSON."""
        settings: dict[str, Any] = json.loads(json.dumps(self._settings))
        return settings

    def describe(self) -> str:
        """One line: how many anchors, and what is held of the teacher."""
        return f"{len(self)} anchors, {self.features.describe()}"

    def tensors(self) -> list[tuple[str, str, str]]:
        """For people: name, shape of one anchor, dtype on disk (and after reading) of every tensor."""
        first = self._shards[0]
        rows = []
        for key in self._keys:
            stored, dtype = first.entries[key].dtype, first.dtype(key)
            size = ["positions"] if key in self._joined else ["length"] if self._varies(key) else []
            tail = first.form(key)[2] if size else first.entries[key].shape[1:]
            shape = " x ".join(map(str, [*size, *tail])) or "scalar"
            names = map(dtype_name, dict.fromkeys((stored, dtype)))
            rows.append((key, shape, " -> ".join(names)))
        return rows

    @property
    def frozen_features(self) -> list[str]:
        """Names of the outputs of modules that do not train."""
        prefix = "features.frozen."
        return [key.removeprefix("features.") for key in self._keys if key.startswith(prefix)]

    @property
    def joined_features(self) -> set[str]:
        """Names of the features that are those of their mask's positions only, anchor after anchor."""
        return {key.removeprefix("features.") for key in self._joined}

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Its files, in the order of the anchors."""
        return tuple(self._shards)

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk, in bytes."""
        return sum(shard.size for shard in self._shards)

    def _varies(self, key: str) -> bool:
        entries = self._shards[0].entries[key]
        return any(s.is_packed(key) or s.entries[key].shape[1:2] != entries.shape[1:2] for s in self._shards)

    def verify(self) -> None:
        """Compares every shard with its checksum. Reads all of them: seconds per gigabyte.

        Raises:
            AnchorCacheError: A shard is not the one that was written; names it.
        """
        for shard, checksum in zip(self._shards, self._checksums, strict=True):
            shard.verify(checksum)

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
        return self.batch(*self.gather(indices, None if features else ()))

    def gather(
        self,
        indices: Sequence[int] | Tensor | Iterable[int],
        features: Iterable[str] | None = None,
        *,
        pin_memory: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
        """The tensors of a batch by key, images as bytes where that is possible, and how to decode those.

        Args:
            indices: As for `read`.
            features: Names of the features to read. None: all.
            pin_memory: Whether to read into page-locked memory, from which copies to an accelerator need not be waited
                for.
        """
        wanted = np.asarray(indices.tolist() if isinstance(indices, Tensor) else list(indices), dtype=np.int64).reshape(
            -1
        )
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"`indices` must be in [0, {len(self)}) and at least one. Found {wanted.tolist()!s:.80}.")
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        files = {n: self._shards[n].opened() for n in dict.fromkeys(numbers.tolist())}
        rows = (wanted - self._starts[numbers]).tolist()
        places: list[Place] = [
            (self._shards[n], row, files[n].fileno()) for n, row in zip(numbers.tolist(), rows, strict=True)
        ]
        chosen = None if features is None else {f"features.{name}" for name in features}
        tensors: dict[str, Tensor] = {}
        encodings: dict[str, Encoding] = {}
        for key in self._keys:
            if key in self._joined:
                if chosen is None or key in chosen:
                    tensors[key] = _joined(key, places, pin_memory)
            elif chosen is None or key in chosen or key.startswith("inputs."):
                tensors[key], encoding = (_alike if key in self._same else _stacked)(key, places, pin_memory)
                if encoding is not None:
                    encodings[key] = encoding
        for n, file in files.items():
            self._shards[n].check_unchanged(file)
        self._close_others(list(files))
        return tensors, encodings

    def batch(self, tensors: Mapping[str, Tensor], encodings: Mapping[str, Encoding]) -> AnchorBatch:
        """What `gather` gave, decoded where it is now and put together."""
        named = {key: images.decode(x, *encodings[key]) if key in encodings else x for key, x in tensors.items()}
        inputs = {key.removeprefix("inputs."): x for key, x in named.items() if key.startswith("inputs.")}
        taught = {key.removeprefix("features."): x for key, x in named.items() if key.startswith("features.")}
        return AnchorBatch(self.structure.rebuild(inputs), taught)

    def _close_others(self, just_read: list[int]) -> None:
        # If another thread is at it, or was when this process was forked, it can wait for the next time
        if not self._lock.acquire(blocking=False):
            return
        try:
            for n in just_read:  # in the order of their last use
                self._open.pop(n, None)
                self._open[n] = None
            while len(self._open) > _MAX_OPEN:
                oldest = next(iter(self._open))
                del self._open[oldest]
                self._shards[oldest].close()
        finally:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        # Functions may be such as cannot be pickled
        own = {"_open": {}, "reading": reading_of(self)}
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | own

    def __deepcopy__(self, memo: dict[int, Any]) -> "AnchorCache":
        return self  # it does not change

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _joined(key: str, places: list[Place], pin_memory: bool) -> Tensor:
    """The positions that count of several anchors, one after another."""
    counts = [shard.stored(key, row) for shard, row, _ in places]
    entry = places[0][0].entries[key]
    out = torch.empty((sum(counts), *entry.shape[1:]), dtype=entry.dtype, pin_memory=pin_memory)
    if out.numel():
        data, at = out.reshape(-1).view(torch.uint8).numpy(), 0
        for (shard, row, _), count in zip(places, counts, strict=True):
            end = at + count * entry.row_bytes
            shard.read_row(key, row, data[at:end])
            at = end
    return out


def _alike(key: str, places: list[Place], pin_memory: bool) -> tuple[Tensor, Encoding | None]:
    """One tensor's anchors, which have the same shape and encoding in all shards."""
    first = places[0][0]
    entry = first.entries[key]
    out = torch.empty((len(places), *entry.shape[1:]), dtype=entry.dtype, pin_memory=pin_memory)
    if out.numel():
        read_plain(key, places, out.reshape(-1).view(torch.uint8).numpy(), entry.row_bytes)
    return out, first.encoding(key)


def _stacked(key: str, places: list[Place], pin_memory: bool) -> tuple[Tensor, Encoding | None]:
    """One tensor's anchors, padded to the longest; images as bytes, if all of them are decoded alike."""
    first = places[0][0]
    entry, encoding = first.entries[key], first.encoding(key)
    rank, tail = first.form(key)[1:]
    widths = [shard.width(key, row) for shard, row, _ in places] if rank > 1 else []
    shape = (len(places), *([max(widths)] if widths else []), *tail)
    if any(shard.encoding(key) != encoding for shard, *_ in places) or (encoding is not None and len(set(widths)) > 1):
        # Decoded anchor by anchor: padding is zero, not what the byte 0 stands for
        out = torch.zeros(shape, dtype=first.dtype(key), pin_memory=pin_memory)
        for i, (shard, row, _) in enumerate(places):
            values = shard.row(key, row)
            out[i, : len(values)] = values
        return out, None
    out = torch.empty(shape, dtype=entry.dtype, pin_memory=pin_memory)
    if out.numel():
        data = out.reshape(len(places), -1).view(torch.uint8).numpy()
        for i, (shard, row, _) in enumerate(places):
            shard.read_row(key, row, data[i])
    return out, encoding
