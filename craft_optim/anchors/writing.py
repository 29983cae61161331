"""Writing a cache: anchors into shards, shards into a folder, and what makes it a cache at the end.

A folder under construction holds `build.json` with the settings, and for every complete shard the file and a record
beside it, `shard-00000.json`. `cache.json` comes last and makes it a cache. Every file is written aside and renamed. So
a build can be killed at any moment: what is complete stays, and the same call takes it up again.

Several processes may write one cache, each its own shards. They watch each other through lock files, which the system
releases when a process dies.
"""

import json
import logging
import os
import re
import secrets
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import images as image_codes
from .cache import AnchorCache
from .folders import LEFTOVER, PROGRESS, clean, is_locked, locked, make_folder, require_same, write_aside, write_json
from .manifest import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    FeatureSpec,
    cover,
    dtype_name,
    is_mask,
    manifest_text,
    tap_key,
)
from .masks import IGNORED
from .shards import AnchorCacheError, Shard, packed
from .structure import Structure, flatten

__all__ = ["Writer", "begins_with", "write_cache"]

_AHEAD = 4  # batches and shards that may wait for the writing thread
_log = logging.getLogger("craft_optim")


class Writer:
    """Collects anchors into shards, writes them in a thread of its own, and knows which are complete.

    Args:
        folder: Where to; locked by the caller.
        settings: What the build was asked for, in the types of JSON.
        rank: Place of this process among those that write to the folder.
        world_size: Their number.
        replicated: Whether all of them see the same anchors, of which this one writes every `world_size`-th shard; or
            each its own, which come one process after the other.
        writes: False for a process that does the same as another one of the same rank, which writes.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        replicated: bool = True,
        *,
        writes: bool = True,
    ) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.rank, self.world_size, self.replicated = rank, world_size, replicated or world_size == 1
        self.writes = writes
        self.size: int = settings["shard_size"]
        self.structure: Structure | None = None
        self._signature: dict[str, tuple[Any, ...]] = {}
        self._widths: dict[str, int] = {}
        self._feature_widths: dict[str, int] = {}
        self._features: set[str] | None = None
        self._complete: dict[int, list[str]] = {}
        self._pieces: list[dict[str, Tensor]] = []
        self._lengths: list[dict[str, Tensor]] = []
        self._formulas: list[dict[str, str]] = []
        self._sources: list[str] = []
        self._pending = 0
        self._seen = 0
        self.classes: int | None = None
        self._thread = ThreadPoolExecutor(1, "craft_optim-anchors")
        self._writing: deque[Future[None]] = deque()

    def _name(self, shard: int, rank: int | None = None) -> str:
        return (
            f"shard-{shard:05d}" if self.replicated else f"shard-{self.rank if rank is None else rank:03d}-{shard:05d}"
        )

    def _is_mine(self, shard: int) -> bool:
        return not self.replicated or shard % self.world_size == self.rank

    # Beginning and end

    def prepare(self, *, start_over: bool) -> str:
        """Makes the folder ready, once, by the first process; the others `load`. Returns a token of this build.

        Raises:
            AnchorCacheError: It is half built otherwise.
        """
        path = self.folder / PROGRESS
        half_built = not start_over and self._is_half_built(path)
        if not half_built:
            # The manifest first: without it, what is left is no cache
            (self.folder / MANIFEST).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        for file in self.folder.iterdir():
            if LEFTOVER.fullmatch(file.name) and not (half_built and re.fullmatch(r"shard-[\d-]+\.\w+", file.name)):
                file.unlink()
        token = secrets.token_hex(8)
        write_json(path, {"settings": self._whole_settings(), "token": token})
        return token

    def _whole_settings(self) -> dict[str, Any]:
        """With more than the cache depends on: what complete shards can be told apart by."""
        return {**self.settings, "processes": None if self.replicated else self.world_size}

    def _is_half_built(self, path: Path) -> bool:
        try:
            settings = json.loads(path.read_bytes())["settings"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            raise AnchorCacheError(f"{path} is damaged: pass resume=False to start over.") from error
        require_same(self.folder, settings, self._whole_settings())
        return True

    def load(self, token: str) -> None:
        """Takes up this process' complete shards.

        Raises:
            AnchorCacheError: The folder is not the one that `prepare` made ready.
        """
        try:
            here = json.loads((self.folder / PROGRESS).read_bytes())["token"]
        except (OSError, ValueError, KeyError, TypeError):
            here = None
        if here != token:
            raise AnchorCacheError(
                f"{self.folder} is not one folder on all processes: rank {self.rank} does not see what rank 0 wrote "
                "there. Pass a `path` on a file system that they share."
            )
        number = re.compile(self._name(0).replace("00000", r"(\d{5,})") + r"\.json")
        for file in sorted(self.folder.iterdir()):
            match = number.fullmatch(file.name)
            if match and self._is_mine(int(match[1])):
                sources = self._recorded(int(match[1]))
                if sources is not None:
                    self._complete[int(match[1])] = sources
        if self._complete:
            _log.info("%s is half built: %d shards of it are complete", self.folder, len(self._complete))

    def _record(self, shard: int, rank: int | None = None) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{self._name(shard, rank)}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return record

    def _recorded(self, number: int) -> list[str] | None:
        """What a complete shard was made of; None if its record or file is damaged: it is written again."""
        record = self._record(number) or {}
        try:
            Shard(self.folder / record["file"], record["anchors"], record["bytes"], record["images"])
            classes, sources = record["classes"], record["sources"]
        except (KeyError, TypeError, AnchorCacheError):
            return None
        self._same_classes(classes)
        return list(sources)

    def finish(self) -> AnchorCache:
        """Writes the last shard and, if this is the first process, the manifest, when all others are done too.

        Raises:
            ValueError: There was nothing to write.
            AnchorCacheError: Another process has failed or was interrupted.
        """
        self._drain()
        if self._pending:
            self._submit(self._flush, self._shard_at(self._seen - 1))
            self._drain()
        if self._seen == 0:
            raise ValueError(f"`batches` yielded nothing: there is no anchor to write to {self.folder}.")
        shards = -(-self._seen // self.size)
        if self.writes:
            write_json(self.folder / f"rank-{self.rank}.done", {"shards": shards})
        if self.rank == 0 and self.writes:
            names = self._wait_for_all(shards)
            self._write_manifest(names)
        else:
            self._wait_for((self.folder / MANIFEST).exists, 0)
        return AnchorCache.open(self.folder)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Ends the thread. After an error, keeps complete shards that are being written, and tells the others."""
        try:
            if error is not None:
                self._failed(error)
        finally:
            self._thread.shutdown()

    def _failed(self, error: BaseException) -> None:
        try:
            self._drain()
        except Exception as another:
            _log.debug("the writing thread failed too: %r", another)
        if self.world_size == 1 and not any(self.folder.glob("shard-*.json")):
            clean(self.folder)  # nothing to take up
        if self.world_size > 1 and self.writes:
            reason = f"{type(error).__name__}: {error}"
            with suppress(AnchorCacheError):  # they will find the lock open
                write_aside(self.folder / f"rank-{self.rank}.failed", lambda aside: aside.write_text(reason))

    def check_others(self) -> None:
        """Raises AnchorCacheError if another process has reported a failure."""
        for rank in range(self.world_size):
            try:
                reason = (self.folder / f"rank-{rank}.failed").read_text()
            except OSError:
                continue
            raise AnchorCacheError(
                f"Rank {rank} could not go on building the anchors in {self.folder}: {reason}. The shards that are "
                "complete stay: the same `build` goes on after them."
            )

    def _wait_for(self, done: Callable[[], bool], rank: int) -> None:
        pause = 0.002
        while not done():
            if self.world_size > 1:
                self.check_others()
                if not is_locked(self.folder, rank) and not done():
                    self.check_others()  # it may have said why since the last look
                    raise AnchorCacheError(
                        f"Rank {rank} was interrupted while it was building the anchors in {self.folder}. The shards "
                        "that are complete stay: the same `build` goes on after them."
                    )
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _wait_for_all(self, shards: int) -> list[tuple[int, int]]:
        """(shard, rank) of all shards in order, when all processes are done."""
        numbers = {}
        for rank in range(self.world_size):
            marker = self.folder / f"rank-{rank}.done"
            self._wait_for(marker.exists, rank)
            numbers[rank] = json.loads(marker.read_bytes())["shards"]
        if self.replicated:
            if set(numbers.values()) != {shards}:
                raise AnchorCacheError(
                    f"The processes saw different numbers of anchors: {numbers} shards by rank. With replicated=True "
                    "each of them must be given the same batches."
                )
            return [(number, 0) for number in range(shards)]
        return [(number, rank) for rank in range(self.world_size) for number in range(numbers[rank])]

    def _write_manifest(self, names: list[tuple[int, int]]) -> None:
        records, sources, inputs = [], [], None
        for number, rank in names:
            record = self._record(number, rank)
            if record is None:
                raise AnchorCacheError(
                    f"{self.folder / self._name(number, rank)}.json cannot be read: the file system is not shared, or "
                    "something else writes to the folder. Run the same `build` again."
                )
            self._same_classes(record.pop("classes"))
            sources.append(record.pop("sources"))
            inputs = record.pop("inputs")
            records.append(record)
        shards = [Shard(self.folder / r["file"], r["anchors"], r["bytes"], r["images"]) for r in records]
        spec = {**self.settings["features"], "classes": self.classes}
        spec["variances"] = {
            tap_key(layer, span): _variance(shards, f"features.{tap_key(layer, span)}")
            for layer in spec["layers"]
            for span in spec["pooling"]
        }
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "anchors": sum(shard.count for shard in shards),
            "inputs": inputs,
            "features": spec,
            "teacher": self.settings["teacher"],
            "built_with": {"images": self.settings["images"], "shard_size": self.size},
            "first_anchors": sources[0],
            "shards": records,
        }
        write_aside(self.folder / MANIFEST, lambda aside: aside.write_text(manifest_text(manifest)))
        clean(self.folder)

    # Batches

    def expect(self, structure: Structure, named: Mapping[str, Tensor]) -> None:
        """Raises unless a batch looks like those before it, up to its number of anchors and their length."""
        signature = {name: (x.dtype, x.ndim, *x.shape[2:]) for name, x in named.items()}
        if self.structure is None:
            self.structure, self._signature = structure, signature
            self._widths = {name: x.shape[1] if x.ndim > 1 else 0 for name, x in named.items()}
        if structure != self.structure or signature != self._signature:
            raise ValueError(
                "All batches must hold the same tensors, with the same dtypes and shapes from dimension 2 on. "
                f"Found {_brief(self.structure, self._signature)} and then {_brief(structure, signature)}."
            )
        changed = [name for name, x in named.items() if x.ndim > 1 and x.shape[1] != self._widths[name]]
        if changed:
            features = self.settings["features"]
            if features["mask"] is None and features["tokens"] is None and "attention_mask" not in named:
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

    def wants(self, size: int) -> bool:
        """Whether some of the next `size` anchors belong into a shard of this process that is not complete."""
        return any(shard not in self._complete for shard, _, _ in self._parts(size))

    def _shard_at(self, anchor: int) -> int:
        return anchor // self.size

    def _parts(self, size: int) -> list[tuple[int, int, int]]:
        """This process' shards among the next `size` anchors: (shard, first and last + 1 of its rows of the batch)."""
        parts, at = [], 0
        while at < size:
            shard = self._shard_at(self._seen + at)
            end = min(size, (shard + 1) * self.size - self._seen)
            if self._is_mine(shard):
                parts.append((shard, at, end))
            at = end
        return parts

    def skip(self, source: Mapping[str, Tensor], size: int) -> None:
        """Takes note of a batch that `wants` said no to: complete shards of this process must be made of it.

        Raises:
            AnchorCacheError: They are not.
        """
        for shard, at, end in self._parts(size):
            self._compare(shard, source, at, end)
        self._seen += size

    def _compare(self, shard: int, source: Mapping[str, Tensor], at: int, end: int) -> None:
        first = self._seen + at - shard * self.size
        stored = self._complete[shard][first : first + end - at]
        given = _digests(source, at, end)
        if stored != given:
            row = next((i for i, (a, b) in enumerate(zip(stored, given, strict=False)) if a != b), len(stored))
            raise AnchorCacheError(
                f"{self.folder} is half built from other anchors: number {self._seen + at + row} differs. Pass the "
                "same batches in the same order, or resume=False to start over."
            )

    def add(
        self,
        named: Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        classes: int | None,
        joined: Collection[str] = (),
        source: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Takes a batch with its features, and writes every shard of this process that becomes full.

        Args:
            named: The inputs, first dimension the anchors.
            features: By name, on the CPU; first dimension the anchors.
            classes: Size of the logits' last dimension, or None.
            joined: Names of features that hold, instead, the positions of their mask (see `cover`) one after another.
            source: The batch as it was given, if `named` was made of it.
        """
        source = named if source is None else source
        self._same_classes(classes)
        self._same_features(features, joined)
        counts = {name: mask.flatten(1).sum(1).int() for name, mask in features.items() if is_mask(name)}
        piece = {f"inputs.{name}": x.detach().cpu() for name, x in named.items()}
        piece |= {f"features.{name}": x for name, x in features.items()}
        lengths = {f"features.{name}": counts[cover(name) or ""] for name in joined}
        size = len(next(iter(named.values())))
        for shard, at, end in self._parts(size):
            if shard in self._complete:
                self._compare(shard, source, at, end)
                continue
            self._submit(self._push, *_rows(piece, lengths, at, end), source, at, end)
            if self._seen + end == (shard + 1) * self.size:
                self._submit(self._flush, shard)
        self._seen += size

    def _same_classes(self, classes: int | None) -> None:
        if self.classes is not None and classes != self.classes:
            raise ValueError(
                f"All batches must have the same number of classes. Found {self.classes} and then {classes}."
            )
        self.classes = classes

    def _same_features(self, features: Mapping[str, Tensor], joined: Collection[str]) -> None:
        if self._features is not None and self._features != set(features):
            raise ValueError(
                f"All batches must give the same features. Found {sorted(self._features ^ set(features))}."
            )
        self._features = set(features)
        for name, x in features.items():
            if name in joined or is_mask(name) or x.ndim < 2:
                continue
            width = self._feature_widths.setdefault(name, x.shape[1])
            if x.shape[1] != width:
                raise ValueError(
                    f"The teacher's {name!r} differs in size between batches, {width} and {x.shape[1]}, and no "
                    "mask says which positions count: pass `mask=` (logits) or `spans=` (hidden states)."
                )

    # In the thread

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        if not self.writes:
            return
        while len(self._writing) >= _AHEAD:
            self._writing.popleft().result()
        self._writing.append(self._thread.submit(function, *args))

    def _drain(self) -> None:
        """Waits for the thread; what follows a failure in it is not run."""
        while self._writing:
            try:
                self._writing.popleft().result()
            except BaseException:
                for future in self._writing:
                    future.cancel()
                self._writing.clear()
                raise

    def _push(
        self, piece: dict[str, Tensor], lengths: dict[str, Tensor], source: Mapping[str, Tensor], at: int, end: int
    ) -> None:
        """Keeps a part of a shard, its images as bytes already: floats would take four times the memory."""
        formulas: dict[str, str] = {}
        if self.settings["images"] == "uint8":
            for key, x in piece.items():
                if key.startswith("inputs.") and x.is_floating_point() and x.ndim >= 4:
                    encoded = image_codes.encode(x)
                    if encoded is not None:
                        piece[key], formulas[key] = encoded
        self._pieces.append(piece)
        self._lengths.append(lengths)
        self._formulas.append(formulas)
        self._sources += _digests(source, at, end)
        self._pending += end - at

    def _flush(self, number: int) -> None:
        """Writes what is pending as one shard, and its record."""
        tensors: dict[str, Tensor] = {}
        encodings: dict[str, dict[str, str]] = {}
        for key in self._pieces[0]:
            parts = [piece[key] for piece in self._pieces]
            name = key.removeprefix("inputs.")
            used = {formulas.get(key) for formulas in self._formulas}
            formula = used.pop() if len(used) == 1 else None
            if used:  # no common formula: an image may fit several, so try one for all
                dtype = self._signature[name][0]
                pairs = zip(parts, self._formulas, strict=True)
                parts = [image_codes.decode(x, f[key], dtype) if key in f else x for x, f in pairs]
                alike = image_codes.encode_alike(parts)
                if alike is not None:
                    parts, formula = alike
            if formula is not None:
                encodings[name] = {"formula": formula, "dtype": dtype_name(self._signature[name][0])}
            if key in self._lengths[0]:
                tensors[key] = torch.cat(parts)
                tensors[f"lengths.{key}"] = torch.cat([lengths[key] for lengths in self._lengths])
            else:
                tensors |= packed(key, parts)
        path = self.folder / f"{self._name(number)}.safetensors"
        tensors = {key: x.contiguous() for key, x in tensors.items()}
        write_aside(path, lambda aside: safetensors.torch.save_file(tensors, aside))
        shard = Shard(path, self._pending, path.stat().st_size, encodings)
        record = {
            "file": path.name,
            "anchors": shard.count,
            "bytes": shard.size,
            "sha256": shard.checksum(),
            "images": encodings,
            "classes": self.classes,
            "sources": self._sources,
            "inputs": asdict(self.structure) if self.structure else None,
        }
        write_json(path.with_suffix(".json"), record)
        self._pieces, self._lengths, self._formulas, self._sources, self._pending = [], [], [], [], 0


def _rows(
    piece: Mapping[str, Tensor], lengths: Mapping[str, Tensor], at: int, end: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The anchors from `at` to `end` of a batch."""
    rows = {}
    for key, x in piece.items():
        first, last = at, end
        if key in lengths:
            first, last = int(lengths[key][:at].sum()), int(lengths[key][:end].sum())
        rows[key] = x[first:last]
    return rows, {key: x[at:end] for key, x in lengths.items()}


def _digests(source: Mapping[str, Tensor], at: int, end: int) -> list[str]:
    """A checksum of each anchor from `at` to `end` of a batch."""
    sums = [0] * (end - at)
    for _, x in sorted(source.items()):
        rows = x[at:end].detach().cpu().contiguous()
        shape = str((x.dtype, *x.shape[1:])).encode()
        data = rows.reshape(len(rows), -1).view(torch.uint8).numpy() if rows.numel() else [b""] * len(rows)
        sums = [zlib.crc32(row, zlib.crc32(shape, total)) for row, total in zip(data, sums, strict=True)]
    return [f"{total:08x}" for total in sums]


def begins_with(cache: AnchorCache, source: Mapping[str, Tensor], size: int) -> bool:
    """Whether a finished cache was built from batches of which this is the first."""
    stored, given = list(cache.first_anchors), _digests(source, 0, size)
    return stored[: len(given)] == given[: len(stored)]


def _variance(shards: Iterable[Shard], key: str) -> float:
    """Variance over anchors (and positions) of a stored feature, averaged over its last dimension.

    In float64, shard by shard: means and squared deviations of parts combine exactly (Chan et al. 1979).
    """
    count, mean, deviation = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for shard in shards:
        rows = shard.whole(key)
        rows = rows.reshape(-1, rows.shape[-1]).double()
        n, m = len(rows), rows.mean(0)
        deviation = deviation + (rows - m).square().sum(0) + (m - mean).square() * (count * n / (count + n))
        mean = mean + (m - mean) * (n / (count + n))
        count += n
    return float(f"{float((deviation / count).mean()):.9g}")  # the last digits depend on the number of threads


def _brief(structure: Structure, signature: Mapping[str, tuple[Any, ...]]) -> str:
    return f"{structure.kind} {signature}"


def write_cache(
    path: str | os.PathLike[str],
    batches: Iterable[tuple[Any, Mapping[str, Tensor]]],
    *,
    layers: Sequence[int | str] = (),
    pooling: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
    images: str = "uint8",
    shard_size: int = 256,
    model_id: str | None = None,
    origin: str | None = None,
    overwrite: bool = False,
) -> AnchorCache:
    """Writes anchors whose teacher has spoken elsewhere; see `build` for one that is here.

    Args:
        path: The cache's folder; created if need be.
        batches: (inputs as for `build`, features by name) of each batch, first dimension the anchors: "labels" `[n, T]`
            is the token that each position of the logits shall give, or -100; `tap_key(layer, span)` `[n, D]` are
            pooled hidden states.
        layers: Of the hidden states.
        pooling: Span -> how they were pooled.
        dtype: Of hidden states on disk.
        images: As in `build`.
        shard_size: Anchors per file.
        model_id: A name for the teacher.
        origin: Where the anchors come from.
        overwrite: Replace what the folder holds.

    Raises:
        AnchorCacheError: The folder holds a cache, or cannot be written to.
        ValueError: The batches do not fit together, or there are none.
    """
    folder = Path(path)
    make_folder(folder)
    if (folder / MANIFEST).exists() and not overwrite:
        raise AnchorCacheError(f"The folder {folder} holds anchors already. Pass overwrite=True to replace them.")
    spec = FeatureSpec(dtype=dtype_name(dtype), layers=tuple(layers), pooling=dict(pooling or {}))
    settings: dict[str, Any] = {
        "features": {**asdict(spec), "layers": list(layers)},
        "images": images,
        "shard_size": shard_size,
        "teacher": {"fingerprint": None, "class": None, "model_id": model_id, "origin": origin},
    }
    with locked(folder), Writer(folder, settings) as writer:
        writer.load(writer.prepare(start_over=True))
        for inputs, features in batches:
            structure, named, _ = flatten(inputs)
            stored: dict[str, Tensor] = {}
            if "labels" in features:
                labels = features["labels"]
                stored["mask"] = labels != IGNORED
                stored["tokens"] = labels[stored["mask"]].int()
                writer.settings["features"]["tokens"] = "imported"
            stored |= {
                name: x.to(dtype) if name.startswith("hidden.") else x
                for name, x in features.items()
                if name != "labels"
            }
            writer.expect(structure, named)
            writer.add(named, stored, None, ["tokens"] if "tokens" in stored else [])
        return writer.finish()
