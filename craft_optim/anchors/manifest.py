"""`cache.json`: contents and files of a cache, written with a checksum and read with a check of every value."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import images
from .categories import categories_in
from .files import Folder
from .kinds import KINDS, Output
from .shards import AnchorCacheError, Shard
from .structure import Structure

__all__ = [
    "MANIFEST",
    "PROGRESS",
    "FeatureSpec",
    "Manifest",
    "cover",
    "dtype_name",
    "is_index",
    "is_mask",
    "manifest_text",
    "tap_key",
]

MANIFEST = "cache.json"
PROGRESS = "build.json"  # exists while the cache is being built

_FORMAT = "craft_optim.anchors"
_SCHEMA_VERSION = 4
_MAX_SIZE = 1 << 31  # indices of classes are int32


def tap_key(layer: int | str, span: str) -> str:
    """Feature name of one hidden-state tap. Module names get a prefix: a module may be called "3"."""
    return f"hidden.{layer if isinstance(layer, int) else 'module:' + layer}.{span}"


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype: "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def is_mask(name: str) -> bool:
    """True if the feature is a mask of the positions that count."""
    return name == "mask" or name.startswith("span.")


def is_index(key: str) -> bool:
    """True if the key holds lengths of a shard's anchors."""
    return key.startswith("lengths.")


def cover(name: str) -> str | None:
    """Name of the mask of a feature's positions; None if it has none."""
    if name.startswith("hidden."):
        return f"span.{name.rsplit('.', 1)[1]}"
    return None if is_mask(name) or name.startswith("frozen.") else "mask"


@dataclass(frozen=True)
class FeatureSpec:
    """Features of a cache: the teacher's outputs that it holds, and how they were made.

    Attributes:
        logits: Form of classes: "full", "top_k" or "auto", "full" up to a number of classes; None if no output is held.
        top_k: Number k of classes, or None for "full".
        full_up_to: Largest number of classes that "auto" keeps in full; 0 without "auto".
        outputs: Outputs that are held, by name; "" is the name of a single one.
        dtype: Storage dtype of outputs and hidden states, e.g. "float16".
        layers: Hidden-state taps: layer numbers >= 0 and module names.
        pooling: Span -> pooling mode, the same for every tap.
        variances: Tap key -> variance of that feature over the anchors (and positions), averaged over its last
            dimension.
        scales: Name of an output of values -> variance of each of its channels over the anchors (and positions).
        mask: Source of the logits' mask: an input's name, a function's name, or None.
        spans: Name of the function that gave the spans, or None for the default.
        forward: Name of the function that replaced the model's call, or None.
        autocast: Autocast dtype that the teacher ran under, or None.
        tokens: Method by which the teacher generated tokens, or None if it did not.
        frozen: Modules whose outputs are kept.
        batch_dim: Dimension of the anchors in the hidden states: 0 or 1.
        lengths: Name of the function that counts each anchor's rows of ragged inputs, or None.
    """

    logits: str | None = None
    top_k: int | None = None
    full_up_to: int = 0
    outputs: dict[str, Output] = field(default_factory=dict)
    dtype: str = "float16"
    layers: tuple[int | str, ...] = ()
    pooling: dict[str, str] = field(default_factory=dict)
    variances: dict[str, float] = field(default_factory=dict)
    scales: dict[str, list[float]] = field(default_factory=dict)
    mask: str | None = None
    spans: str | None = None
    forward: str | None = None
    autocast: str | None = None
    tokens: str | None = None
    frozen: tuple[str, ...] = ()
    batch_dim: int = 0
    lengths: str | None = None

    def top_k_of(self, output: Output) -> int | None:
        """Number of classes of an output that are held; None for all, and for labels and values."""
        return self.top_k if output.kind == "classes" and output.size > self.full_up_to else None

    def describe(self) -> str:
        """One line for people."""
        parts = []
        for name, output in self.outputs.items():
            k = self.top_k_of(output)
            full = "full logits of" if k is None else f"the top {k} of"
            held = {"classes": full, "labels": "logits of", "values": "values of"}[output.kind]
            parts.append(f"{f'{name}: ' if name else ''}{held} {output.describe()}")
        if self.tokens:
            parts.append(f"tokens ({self.tokens})")
        if self.layers:
            pools = ", ".join(f"{span}: {mode}" for span, mode in self.pooling.items())
            parts.append(f"hidden states of layers {', '.join(map(str, self.layers))} ({pools})")
        if self.frozen:
            parts.append(f"outputs of {', '.join(self.frozen)}")
        return f"{' and '.join(parts) or 'nothing'} as {self.dtype}"


def manifest_text(data: Mapping[str, Any]) -> str:
    """Text of `cache.json`: format and version, the data, and a checksum of all that."""
    data = {"format": _FORMAT, "schema_version": _SCHEMA_VERSION, **data}
    body = json.dumps({**data, "sha256": ""}, indent=1)
    return json.dumps({**data, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1) + "\n"


class Manifest:
    """`cache.json` of a folder after reading, and the shards that it names.

    Attributes:
        path: The file.
        features: The cache's features.
        structure: Structure of its batches of inputs.
        teacher: Fingerprint, class, name and dtypes of the teacher; origin of an imported cache.
        teacher_dtypes: Dtypes of the teacher's parameters, if recorded.
        settings: The arguments of the build, in the types of JSON.
        first_anchors: Checksums of the first anchors, as they were given to `build`.
        shards: Files of the cache, at least one, in the order of the anchors.
        categories: Category of each anchor, "" if it has none.

    Raises:
        AnchorCacheError: The file is missing, a value in it is invalid, or a shard is not as recorded.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST
        try:
            self._read(self._load())
        except (OverflowError, RecursionError) as error:
            raise self.error("its numbers are too large, or it is nested too deeply") from error

    def error(self, problem: str, remedy: str = "Build the cache again with overwrite=True.") -> AnchorCacheError:
        """The error to raise about this cache."""
        return AnchorCacheError(f"{self.path} cannot be used: {problem}. {remedy}")

    def _load(self) -> dict[str, Any]:
        try:
            text = self.path.read_bytes()
            data = json.loads(text)
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise self.error("there is no such folder", "Check the path, or build the cache.") from None
            half_built = (self.path.parent / PROGRESS).exists()
            remedy = "Run the same `build` again to finish it." if half_built else "Check the path."
            raise self.error("there is no such file in the folder", remedy) from None
        except OSError as error:
            raise self.error(f"it cannot be read ({error.strerror or error})", "Check the path.") from error
        except (ValueError, RecursionError) as error:
            raise self.error("it is not JSON") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise self.error(f"it is not a cache of anchors (its 'format' is not {_FORMAT!r})", "Check the path.")
        version = data.get("schema_version")
        if version != _SCHEMA_VERSION:
            raise self.error(
                f"it has schema_version {version!r}, this library reads {_SCHEMA_VERSION}",
                "Build the cache again with overwrite=True, or use the version of craft-optim that wrote it.",
            )
        data.pop("sha256", None)
        if manifest_text(data).encode() != text:
            raise self.error("it was changed after it was written (sha256)")
        return data

    def _read(self, data: dict[str, Any]) -> None:
        self.features = self._features(self._get(data, "features", dict))
        inputs = self._get(data, "inputs", dict)
        kind, names = self._get(inputs, "kind", str), self._strings(inputs, "names")
        if kind not in ("tensor", "tuple", "mapping") or not names:
            raise self.error(f"its 'kind' of inputs is unknown: {kind!r:.60} {names!r:.60}")
        ragged = self._strings(inputs, "ragged") if "ragged" in inputs else ()  # missing in older caches
        if not set(ragged) <= set(names):
            raise self.error(f"its 'ragged' inputs {ragged!r:.60} are not among {names!r:.60}")
        self.structure = Structure(kind, names, self._strings(inputs, "skipped"), ragged)
        self.teacher: dict[str, Any] = self._get(data, "teacher", dict)
        for key in ("fingerprint", "model_id", "origin"):
            self._get(self.teacher, key, str, optional=True)
        names = self._strings(self.teacher, "dtypes") if "dtypes" in self.teacher else ()
        dtypes = [getattr(torch, name, None) for name in names]
        if wrong := [name for name, dtype in zip(names, dtypes, strict=True) if not isinstance(dtype, torch.dtype)]:
            raise self.error(f"its teacher has parameters of unknown dtypes: {wrong!s:.60}")
        self.teacher_dtypes = [dtype for dtype in dtypes if isinstance(dtype, torch.dtype)]
        self.first_anchors = self._strings(data, "first_anchors")
        self.settings: dict[str, Any] = {
            "features": {**asdict(self.features), "outputs": {}, "variances": {}, "scales": {}},
            **self._get(data, "built_with", dict),
            "teacher": self.teacher,
        }
        folder = Folder(self.path.parent)
        records = self._get(data, "shards", list)
        self.shards = tuple(self._shard(record, folder) for record in records)
        self.categories = [
            x for record, shard in zip(records, self.shards, strict=True) for x in self._of(record, shard)
        ]
        anchors, found = self._get(data, "anchors", int), sum(shard.count for shard in self.shards)
        if not self.shards or anchors != found:
            raise self.error(f"it speaks of {anchors} anchors, its shards hold {found}")

    def _get(self, owner: Any, key: str, *types: type, optional: bool = False) -> Any:
        value = owner.get(key) if isinstance(owner, dict) else None
        if optional and value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join(t.__name__ for t in types)
            raise self.error(f"its {key!r} must be {names}. Found {value!r:.60}")
        return value

    def _strings(self, owner: Any, key: str) -> tuple[str, ...]:
        values = self._get(owner, key, list)
        if not all(isinstance(v, str) for v in values):
            raise self.error(f"its {key!r} must be strings. Found {values!r:.60}")
        return tuple(values)

    def _shard(self, record: Any, folder: Folder) -> Shard:
        name = self._get(record, "file", str)
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise self.error(f"a shard's file name must name a file in the folder. Found {name!r:.60}")
        encodings = self._get(record, "images", dict)
        for key, encoding in encodings.items():
            formula, dtype = self._get(encoding, "formula", str), self._get(encoding, "dtype", str)
            if formula not in images.FORMULAS or not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise self.error(f"the images {key!r} have an unknown encoding {formula!r:.40} as {dtype!r:.40}")
        count, size = self._get(record, "anchors", int), self._get(record, "bytes", int)
        if count < 1:
            raise self.error(f"shard {name!r} must have at least one anchor. Found {count}")
        sha256 = self._get(record, "sha256", str)
        return Shard(self.path.with_name(name), count, size, encodings, sha256, folder)

    def _of(self, record: Any, shard: Shard) -> list[str]:
        try:
            return categories_in(record, shard.count)
        except ValueError as error:
            raise self.error(f"of {shard.path.name}, {error}") from error

    def _features(self, owner: Any) -> FeatureSpec:
        layers = self._get(owner, "layers", list)
        if not all(isinstance(x, str | int) and not isinstance(x, bool) for x in layers):
            raise self.error(f"its 'layers' must be numbers or names. Found {layers!r:.60}")
        words = {
            key: self._get(owner, key, str, optional=True)
            for key in ("logits", "mask", "spans", "forward", "autocast", "tokens", "lengths")
        }
        if words["logits"] not in (None, "full", "top_k", "auto"):
            raise self.error(f"its 'logits' must be 'full', 'top_k', 'auto' or null. Found {words['logits']!r:.60}")
        variances, scales = self._get(owner, "variances", dict), self._get(owner, "scales", dict)
        outputs = {name: self._output(x) for name, x in self._get(owner, "outputs", dict).items()}
        channels = {name: output.size for name, output in outputs.items() if output.kind == "values"}
        sizes = {name: len(values) if isinstance(values, list) else None for name, values in scales.items()}
        if sizes != channels:
            raise self.error(f"its 'scales' must be a number for each channel. Found {scales!r:.60}")
        spec = FeatureSpec(
            top_k=self._get(owner, "top_k", int, optional=True),
            full_up_to=self._get(owner, "full_up_to", int),
            outputs=outputs,
            dtype=self._get(owner, "dtype", str),
            layers=tuple(layers),
            pooling={str(k): str(v) for k, v in self._get(owner, "pooling", dict).items()},
            variances={k: float(self._get(variances, k, float, int)) for k in variances},
            scales={k: [float(self._get({k: x}, k, float, int)) for x in values] for k, values in scales.items()},
            frozen=self._strings(owner, "frozen"),
            batch_dim=self._get(owner, "batch_dim", int),
            **words,
        )
        classes = min((x.size for x in outputs.values() if spec.top_k_of(x) is not None), default=_MAX_SIZE)
        if spec.logits in ("top_k", "auto") and not 1 <= (spec.top_k or 0) <= classes:
            raise self.error(f"its 'top_k' must be >= 1, at most the classes. Found {spec.top_k}")
        numbers = spec.variances | {f"scales of {key}": x for key, values in spec.scales.items() for x in values}
        if wrong := {key: x for key, x in numbers.items() if not 0.0 <= x < math.inf}:
            raise self.error(f"its 'variances' must be finite and >= 0. Found {wrong!s:.60}")
        if spec.dtype not in ("float16", "bfloat16", "float32"):
            raise self.error(f"its 'dtype' must be float16, bfloat16 or float32. Found {spec.dtype!r:.60}")
        return spec

    def _output(self, owner: Any) -> Output:
        kind, dim, size = self._get(owner, "kind", str), self._get(owner, "dim", int), self._get(owner, "size", int)
        if kind not in KINDS or dim < 1 or not 1 <= size <= _MAX_SIZE:
            raise self.error(f"its 'outputs' must be a kind, a dimension and a size. Found {owner!r:.60}")
        return Output(kind, dim, size)
