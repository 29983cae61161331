"""Cache: anchors on disk, opened, checked and read: `cache.json` and safetensors shards.

    anchors/
      cache.json                    schema_version, counts, shards with sizes and checksums, features, teacher
      shard-00000.safetensors       inputs.<name> and features.<name>, see `shards`
      ...

Features are, where the cache has them:

    mask                            [n, ...]      positions whose logits (or tokens) count; absent: all
    logprobs                        [n, ..., V]   the teacher's log-probabilities of classes
    topk_logprobs, topk_indices     [n, ..., k]   its k likeliest classes (indices int32)
    rest_logprob                    [n, ...]      log of the mass of all others
    logits                          [n, ..., L]   its logits of labels
    values                          [n, ..., C]   its outputs that are values
    tokens, token_logprobs          [n, ...]      what it generated (int32), and with which log-probability
    hidden.<tap>.<span>             [n, D]        pooled hidden states, or [n, T, D] unpooled
    span.<span>                     [n, T]        positions of a span; absent: all
    frozen.<module>.<call>.<leaf>   [n, ...]      outputs of modules that do not train

With several outputs, these names end with the output's, such as `logprobs.species`.

With a mask, outputs and tokens are stored at its positions only, anchor after anchor: [positions, ...]; so are unpooled
hidden states of a span, and ragged inputs (`Reading.lengths`). Nothing is ever unpickled.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from craft_optim._paths import local

from .images import Encoding, decode
from .kept import Kept, KeptMean
from .manifest import Manifest, cover, dtype_name, is_index, tap_key
from .outputs import FEATURES, feature
from .reading import Reading, reading_of
from .sampling import spread
from .shards import AnchorCacheError, Place, read_plain
from .structure import Inputs

if TYPE_CHECKING:
    from .cached import CachedRetention

__all__ = ["AnchorBatch", "AnchorCache", "AnchorCacheError"]

_OF_ONE = {"classes": "logits", "labels": "labels", "values": "values"}  # kinds of retention of a single output
_MAX_OPEN = 256  # shards open at a time: each holds a file descriptor, of which a process often has 1024


class AnchorBatch(NamedTuple):
    """Some anchors.

    Attributes:
        inputs: Inputs, in the structure of the batches that the cache was built from.
        features: The teacher's outputs, by name; and "lengths.<input>", rows of each anchor, for ragged inputs, which
            hold the rows of all anchors one after another.
    """

    inputs: Inputs
    features: dict[str, Tensor]

    @property
    def lengths(self) -> dict[str, Tensor]:
        """Name of a ragged input -> number of rows of each anchor."""
        return {name.removeprefix("lengths."): x for name, x in self.features.items() if is_index(name)}


class AnchorCache:
    """Anchors and the teacher's outputs on them. Made by `build` or `AnchorCache.open`.

    Attributes:
        path: The folder.
        features: Description of the teacher's outputs that it holds, and of how they were made.
        reading: The `Reading` that the teacher was run with; functions only if `build` or `open` was given them.
        structure: Structure of its inputs.
        fingerprint: The teacher's, see `fingerprint`; None if unknown, as for imported caches.
        model_id: The teacher's name, as given to `build`, or None.
        teacher_dtypes: Dtypes of its floating-point parameters; empty if unknown.
        origin: Source of an imported cache, or None.
        first_anchors: Checksums of the first anchors, as they were given to `build`.
        joined_features: Names of the features that hold the positions of their mask only, anchor after anchor.
        shards: The cache's files, in the order of the anchors.
        categories: Category of each anchor, from "category" in the batches; "" if it has none.

    Reading costs the bytes of the anchors read and no more, whatever their order; no shard is ever loaded as a whole,
    and memory does not grow with the size of the cache. Threads may read at the same time; an opened cache can be
    pickled, without the functions of its reading, and read from other processes.
    """

    def __init__(self, path: str | os.PathLike[str], reading: Reading | None = None) -> None:
        self.path = local(path)
        manifest = Manifest(self.path)
        self.features, self.structure = manifest.features, manifest.structure
        self.fingerprint: str | None = manifest.teacher.get("fingerprint")
        self.model_id: str | None = manifest.teacher.get("model_id")
        self.origin: str | None = manifest.teacher.get("origin")
        self.teacher_dtypes = manifest.teacher_dtypes
        self.first_anchors, self._settings = manifest.first_anchors, manifest.settings
        self.shards, self.categories = manifest.shards, manifest.categories
        self._starts = np.cumsum([0, *(shard.count for shard in self.shards)])
        self._open: dict[int, None] = {}
        self._lock = threading.Lock()
        self._keys = self._check_keys(manifest)
        self.reading = reading_of(self, reading)

    @classmethod
    def open(cls, path: str | os.PathLike[str], reading: Reading | None = None) -> "AnchorCache":
        """Opens a finished cache and checks it.

        Checks the manifest (checksum, schema, counts), every shard's size and header, and that all shards hold the same
        tensors. Contents are checked by `verify`, which reads everything.

        Args:
            path: The folder.
            reading: The `Reading` that it was built with. Only its functions are needed, above all `forward`: the
                manifest has the rest.

        Raises:
            AnchorCacheError: The folder holds no finished cache, or one whose parts do not fit together.
            AnchorMismatchError: It was built with another reading.
        """
        return cls(path, reading)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of retention: "logits", "labels", "values", "hidden", "tokens"; with several outputs, their names."""
        f = self.features
        others = {"hidden": bool(f.layers), "tokens": f.tokens is not None}
        return (*self._outputs, *(kind for kind, held in others.items() if held))

    @property
    def _outputs(self) -> dict[str, str]:
        """Kind of retention of an output -> its name."""
        return {name or _OF_ONE[output.kind]: name for name, output in self.features.outputs.items()}

    @property
    def kind(self) -> str | None:
        """Default of `kinds`: the only one, or "logits" beside "tokens" alone; None if it must be named."""
        return self.kinds[0] if len(self.kinds) == 1 or self.kinds == ("logits", "tokens") else None

    def retention(
        self, model: nn.Module, kind: str | None = None, batch_size: int = 16, **settings: Any
    ) -> "CachedRetention":
        """Makes the kind's closure: `Logit-`, `Bernoulli-`, `Output-`, `Hidden-` or `TokenRetention`.

        Args:
            model: The model in training.
            kind: One of `kinds`. None: `self.kind`.
            batch_size: Anchors per pass (and process).
            **settings: Further arguments of its class.

        Raises:
            ValueError: There is no such kind, or several and none is named; or as for its class.
        """
        from .bernoulli_retention import BernoulliRetention
        from .hidden_retention import HiddenRetention
        from .logit_retention import LogitRetention
        from .output_retention import OutputRetention
        from .token_retention import TokenRetention

        kind = self.kind if kind is None else kind
        if kind not in self.kinds:
            raise ValueError(
                f"`kind` must be one of {', '.join(map(repr, self.kinds))}, which {self.path} holds and whose units "
                f"differ. Found kind={kind!r}."
            )
        classes: dict[str, Any] = {
            "classes": LogitRetention,
            "labels": BernoulliRetention,
            "values": OutputRetention,
            "hidden": HiddenRetention,
            "tokens": TokenRetention,
        }
        if kind in self._outputs:
            settings["output"] = name = self._outputs[kind]
            kind = self.features.outputs[name].kind
        retention: CachedRetention = classes[kind](model, self, batch_size, **settings)
        return retention

    def _check_keys(self, manifest: Manifest) -> list[str]:
        f = self.features
        wanted = {f"inputs.{name}" for name in self.structure.names}
        for name, output in f.outputs.items():
            some = {"labels": ["logits"], "values": ["values"]}.get(output.kind, ["logprobs"])
            if f.top_k_of(output) is not None:
                some = ["topk_logprobs", "topk_indices"]
            wanted |= {f"features.{feature(key, name)}" for key in some}
        if f.tokens is not None:
            wanted |= {"features.tokens", "features.mask"}
        wanted |= {f"features.{tap_key(layer, span)}" for layer in f.layers for span in f.pooling}
        first = self.shards[0]
        if missing := wanted - set(first.keys):
            raise manifest.error(f"shard {first.path.name} lacks {', '.join(sorted(missing))}, which it speaks of")
        names = [key.removeprefix("features.") for key in first.keys if key.startswith("features.")]
        self._ragged = {f"inputs.{name}" for name in self.structure.ragged}
        self.joined_features = frozenset(x for x in names if first.is_packed(f"features.{x}") and cover(x) in names)
        for shard in self.shards:
            if set(shard.keys) != set(first.keys):
                raise manifest.error(f"shards {first.path.name} and {shard.path.name} hold different tensors")
            for key, encoding in shard.encodings.items():
                if key not in shard.entries or shard.entries[key].dtype != torch.uint8:
                    raise manifest.error(f"shard {shard.path.name} has no bytes for the images {key!r} ({encoding})")
            for key in first.keys:
                same = first.form(key) == shard.form(key)
                joined = key in self._ragged or key.removeprefix("features.") in self.joined_features
                if not same or (joined and not shard.is_packed(key)):
                    raise manifest.error(
                        f"{key!r} is {first.form(key)} in {first.path.name} and {shard.form(key)} in {shard.path.name}"
                    )
        self._check_features(manifest)
        self._same = {  # the usual case, which is read fastest
            key
            for key in first.keys
            if all(
                not shard.is_packed(key)
                and shard.entries[key].shape[1:] == first.entries[key].shape[1:]
                and shard.encodings.get(key) == first.encodings.get(key)
                for shard in self.shards
            )
        }
        return first.keys

    def _check_features(self, manifest: Manifest) -> None:
        """Raises unless features to compare with logits have their last dimension, and indices are integers."""
        f, entries = self.features, self.shards[0].entries
        for head, output in f.outputs.items():
            for name in FEATURES[output.kind]:
                key, size = feature(name, head), f.top_k_of(output) if name.startswith("topk") else output.size
                entry = entries.get(f"features.{key}")
                if entry is not None and name not in ("rest_logprob", "topk_indices") and entry.shape[-1] != size:
                    raise manifest.error(f"its features.{key} have {entry.shape[-1]} entries, it speaks of {size}")
        for name in self._indices:
            entry = entries.get(f"features.{name}")
            if entry is not None and entry.dtype not in (torch.int32, torch.int64):
                raise manifest.error(f"its features.{name} are {entry.dtype} instead of whole numbers")

    @property
    def _indices(self) -> dict[str, int]:
        """Features that hold class indices -> number of classes."""
        held = self.features.outputs
        found = {feature("topk_indices", head): output.size for head, output in held.items()}
        return found | {"tokens": held[""].size if "" in held else 1 << 31}

    def _check_indices(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises unless indices are in range: others would make an accelerator lose the process' whole context."""
        for name, classes in self._indices.items():
            x = tensors.get(f"features.{name}")
            if x is None or not x.numel():
                continue
            low, high = (int(bound) for bound in torch.aminmax(x))
            if low < 0 or high >= classes:
                raise AnchorCacheError(
                    f"{self.path} cannot be used: its features.{name} must name classes from 0 to "
                    f"{classes - 1}. Found {low} to {high}. Build the cache again with "
                    "overwrite=True, or copy its files again from where they are whole."
                )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"AnchorCache({str(self.path)!r}: {self.describe()})"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the build, in the types of JSON."""
        settings: dict[str, Any] = json.loads(json.dumps(self._settings))
        return settings

    @property
    def positions(self) -> int | None:
        """Number of output positions that count, over all anchors; None where the anchors themselves count."""
        key = next((f"features.{x}" for x in sorted(self.joined_features) if cover(x) == "mask"), None)
        if key is None:
            return None
        return sum(int(index.starts[-1]) for shard in self.shards if (index := shard.index(key)) is not None)

    def describe(self) -> str:
        """One line: numbers of anchors and positions, and the teacher's outputs. Reads 4 bytes of each anchor."""
        of = "" if self.positions is None else f" with {self.positions} positions"
        return f"{len(self)} anchors{of}, {self.features.describe()}"

    def tensors(self) -> list[tuple[str, str, str]]:
        """Name, shape for one anchor and dtype on disk (and after reading) of every tensor, for people."""
        first = self.shards[0]
        found = []
        for key in self._keys:
            stored, dtype = first.entries[key].dtype, first.dtype(key)
            joined = key in self._ragged or key.removeprefix("features.") in self.joined_features
            size = ["positions"] if joined else ["length"] if self._varies(key) else []
            tail = first.form(key)[2] if size else first.entries[key].shape[1:]
            shape = " x ".join(map(str, [*size, *tail])) or "scalar"
            names = map(dtype_name, dict.fromkeys((stored, dtype)))
            found.append((key, shape, " -> ".join(names)))
        return found

    def kept(self, count: int = 256) -> dict[str, Kept]:
        """Statistics of the kept classes, by name, for each output of which only the likeliest classes are held.

        Args:
            count: Largest number of anchors to measure on, evenly spaced; their outputs are read.
        """
        found = {}
        for name, output in self.features.outputs.items():
            if self.features.top_k_of(output) is None:
                continue
            logprobs, rest = (feature(key, name) for key in ("topk_logprobs", "rest_logprob"))
            held = [key for key in (logprobs, rest) if f"features.{key}" in self._keys]
            total = KeptMean()
            for place in spread(len(self), count):
                anchor = self.batch(*self.gather([place], held)).features
                total.add(anchor[logprobs], anchor.get(rest))
            found[name] = total.result()
        return found

    @property
    def frozen_features(self) -> list[str]:
        """Names of the outputs of modules that do not train."""
        prefix = "features.frozen."
        return [key.removeprefix("features.") for key in self._keys if key.startswith(prefix)]

    @property
    def nbytes(self) -> int:
        """Size of all shards on disk, in bytes."""
        return sum(shard.size for shard in self.shards)

    def _varies(self, key: str) -> bool:
        entries = self.shards[0].entries[key]
        return any(s.is_packed(key) or s.entries[key].shape[1:2] != entries.shape[1:2] for s in self.shards)

    def verify(self) -> None:
        """Compares every shard with its checksum. Reads all of them: seconds per gigabyte.

        Raises:
            AnchorCacheError: A shard is not the one that was written; the message names it.
        """
        for shard in self.shards:
            shard.verify()

    def read(self, indices: Sequence[int] | Tensor | Iterable[int], *, features: bool = True) -> AnchorBatch:
        """The given anchors, in that order, as new CPU tensors.

        Reads their bytes only. Where they differ in length, shorter ones are padded with zeros on the right, up to the
        longest of them.

        Args:
            indices: Numbers in [0, len(cache)); at least one, repetitions allowed.
            features: False to read no teacher's outputs.

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
        """The tensors of a batch by key, images as bytes where possible, and how to decode these.

        Args:
            indices: Numbers of the anchors, as for `read`.
            features: Names of the features to read. None: all.
            pin_memory: True to read into page-locked memory: the host need not wait for copies to an accelerator.
        """
        wanted = np.asarray(indices.tolist() if isinstance(indices, Tensor) else list(indices), dtype=np.int64).reshape(
            -1
        )
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"`indices` must be in [0, {len(self)}) and at least one. Found {wanted.tolist()!s:.80}.")
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        files = {n: self.shards[n].opened() for n in dict.fromkeys(numbers.tolist())}
        within = (wanted - self._starts[numbers]).tolist()
        places: list[Place] = [
            (self.shards[n], anchor, files[n].fileno()) for n, anchor in zip(numbers.tolist(), within, strict=True)
        ]
        chosen = None if features is None else {f"features.{name}" for name in features}
        tensors: dict[str, Tensor] = {}
        encodings: dict[str, Encoding] = {}
        for key in self._keys:
            if key in self._ragged:
                tensors[key] = _joined(key, places, pin_memory)
                tensors[f"lengths.{key}"] = torch.tensor([last - first for first, last in _rows(key, places)])
            elif key.removeprefix("features.") in self.joined_features:
                if chosen is None or key in chosen:
                    tensors[key] = _joined(key, places, pin_memory)
            elif chosen is None or key in chosen or key.startswith("inputs."):
                tensors[key], encoding = (_alike if key in self._same else _stacked)(key, places, pin_memory)
                if encoding is not None:
                    encodings[key] = encoding
        for n, file in files.items():
            self.shards[n].check_unchanged(file)
        self._close_others(list(files))
        self._check_indices(tensors)
        return tensors, encodings

    def batch(self, tensors: Mapping[str, Tensor], encodings: Mapping[str, Encoding]) -> AnchorBatch:
        """The tensors of `gather`, decoded on the device that they are on now, and put together."""
        named = {key: decode(x, *encodings[key]) if key in encodings else x for key, x in tensors.items()}
        inputs = {key.removeprefix("inputs."): x for key, x in named.items() if key.startswith("inputs.")}
        features = {key.removeprefix("features."): x for key, x in named.items() if key.startswith("features.")}
        features |= {key.replace(".inputs.", ".", 1): x for key, x in named.items() if is_index(key)}
        return AnchorBatch(self.structure.rebuild(inputs), features)

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
                self.shards[oldest].close()
        finally:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_open": {}, "reading": reading_of(self)}  # some functions cannot be pickled
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | own

    def __deepcopy__(self, memo: dict[int, Any]) -> "AnchorCache":
        return self  # it does not change

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _rows(key: str, places: list[Place]) -> Iterator[tuple[int, int]]:
    return (shard.rows(key, anchor) for shard, anchor, _ in places)


def _joined(key: str, places: list[Place], pin_memory: bool) -> Tensor:
    """The counted positions of several anchors, one after another."""
    entry, ends = places[0][0].entries[key], [0]
    for first, last in _rows(key, places):
        ends.append(ends[-1] + last - first)
    out = torch.empty((ends[-1], *entry.shape[1:]), dtype=entry.dtype, pin_memory=pin_memory)
    if out.numel():
        data = out.reshape(-1).view(torch.uint8).numpy()
        for (shard, anchor, _), first, last in zip(places, ends, ends[1:], strict=False):
            shard.read_anchor(key, anchor, data[first * entry.row_bytes : last * entry.row_bytes])
    return out


def _alike(key: str, places: list[Place], pin_memory: bool) -> tuple[Tensor, Encoding | None]:
    """One tensor's anchors, which have the same shape and encoding in all shards."""
    first = places[0][0]
    entry = first.entries[key]
    out = torch.empty((len(places), *entry.shape[1:]), dtype=entry.dtype, pin_memory=pin_memory)
    if out.numel():
        read_plain(key, places, out.reshape(-1).view(torch.uint8).numpy(), entry.row_bytes)
    return out, first.encodings.get(key)


def _stacked(key: str, places: list[Place], pin_memory: bool) -> tuple[Tensor, Encoding | None]:
    """One tensor's anchors, padded to the longest; images as bytes, if all of them are decoded alike."""
    first = places[0][0]
    entry, encoding = first.entries[key], first.encodings.get(key)
    rank, tail = first.form(key)[1:]
    widths = [shard.width(key, anchor) for shard, anchor, _ in places] if rank > 1 else []
    shape = (len(places), *([max(widths)] if widths else []), *tail)
    alike = all(shard.encodings.get(key) == encoding for shard, *_ in places)
    if not alike or (encoding is not None and len(set(widths)) > 1):
        # Decoded anchor by anchor: padding is zero, not the value of byte 0
        out = torch.zeros(shape, dtype=first.dtype(key), pin_memory=pin_memory)
        for i, place in enumerate(places):
            one, encoding = _stacked(key, [place], False)
            out[i, : one.shape[1]] = one[0] if encoding is None else decode(one[0], *encoding)
        return out, None
    out = torch.empty(shape, dtype=entry.dtype, pin_memory=pin_memory)
    if out.numel():
        data = out.reshape(len(places), -1).view(torch.uint8).numpy()
        for i, (shard, anchor, _) in enumerate(places):
            shard.read_anchor(key, anchor, data[i])
    return out, encoding
