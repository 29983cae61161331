"""The folder of a cache that is being built: complete shards survive a kill at any moment, and are used again.

It holds `build.json` with the settings, and for every complete shard the file and a record beside it,
`shard-00000.json`. `cache.json` comes last and makes it a cache. Every file is written aside and renamed.

Several processes may build one cache, each its own shards. They watch each other through lock files, which the system
releases when a process dies.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from .categories import recorded
from .fingerprint import compare_fingerprints
from .folders import is_locked, locked, write_aside, write_json
from .images import Encoding
from .manifest import MANIFEST, PROGRESS, FeatureSpec, dtype_name, manifest_text, tap_key
from .outputs import feature
from .processes import Team
from .shards import AnchorCacheError, Shard, mean_variance, variances
from .structure import Structure

__all__ = ["BuildFolder", "building", "clean", "require_same"]

# Files of a build besides the manifest; safetensors' own temporary files among them
_LEFTOVER = re.compile(
    r"shard-[\d-]+\.(safetensors|json)(\.tmp)?|rank-\d+\.(done|failed)(\.tmp)?|(build|cache)\.json\.tmp|\.tmp\w{6}"
)
_LOCK = re.compile(r"build-(\d+)\.lock")
_GOES_ON = "The shards that are complete stay: the same `build` goes on after them."

_log = logging.getLogger("craft_optim")


class BuildFolder:
    """A folder in which a cache is being built, by this process and the others of its team. See `building`.

    Args:
        path: The folder.
        settings: The arguments of the build, in the types of JSON.
        team: The processes that build in it.
        replicated: True if all of them see the same anchors, and each writes every `world_size`-th shard; False if each
            has its own anchors, stored one process after the other.

    Attributes:
        complete: This process' shards that were on disk already: number -> checksums of their anchors.
        outputs: Outputs of the model, as the manifest has them; None until known.
        structure: Structure of the inputs; None until known.
        units: Of another cache, whose variances the manifest gets in the place of these anchors' own; None for those.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], team: Team, replicated: bool = True) -> None:
        self.path, self.settings, self.team = path, settings, team
        self.replicated = replicated or team.world_size == 1
        self.complete: dict[int, list[str]] = {}
        self.outputs: dict[str, Any] | None = None
        self.structure: Structure | None = None
        self.units: FeatureSpec | None = None

    def is_mine(self, shard: int) -> bool:
        """True if this process writes the shard, one of those whose anchors it sees."""
        return not self.replicated or shard % self.team.world_size == self.team.rank

    def _file(self, shard: int, ending: str, rank: int | None = None) -> Path:
        own = "" if self.replicated else f"{self.team.rank if rank is None else rank:03d}-"
        return self.path / f"shard-{own}{shard:05d}.{ending}"

    def same_outputs(self, outputs: dict[str, Any]) -> None:
        """Raises ValueError if the model's outputs were others so far."""
        if self.outputs is not None and outputs != self.outputs:
            begun = " when the build was begun" if self.complete else ""
            raise ValueError(
                f"All batches must give the same outputs. Found {self.outputs}{begun} and then {outputs}: pass the "
                "same `output`, `class_dim` and `forward`, or start over with overwrite=True."
            )
        self.outputs = outputs

    # The beginning

    def prepare(self, *, start_over: bool) -> str:
        """Prepares the folder, once, for all processes to `load`. Returns a token of this build.

        Raises AnchorCacheError if the folder is half built with other settings.
        """
        progress = self.path / PROGRESS
        # The cache does not depend on the number of processes; the shards' numbers do
        settings = {**self.settings, "processes": None if self.replicated else self.team.world_size}
        half_built = not start_over and progress.exists()
        if half_built:
            before = _read_json(progress).get("settings")
            if before is None:
                raise AnchorCacheError(f"{progress} is damaged: pass resume=False to start over.")
            require_same(self.path, before, settings)
        else:
            # The manifest first: without it, what is left is no cache
            (self.path / MANIFEST).unlink(missing_ok=True)
            progress.unlink(missing_ok=True)
        for file in self.path.iterdir():
            if _LEFTOVER.fullmatch(file.name) and not (half_built and re.fullmatch(r"shard-[\d-]+\.\w+", file.name)):
                file.unlink()
        token = secrets.token_hex(8)
        write_json(progress, {"settings": settings, "token": token})
        return token

    def load(self, token: str) -> None:
        """Loads this process' complete shards. Raises AnchorCacheError if the folder has another token."""
        if _read_json(self.path / PROGRESS).get("token") != token:
            raise AnchorCacheError(
                f"{self.path} is not one folder on all processes: rank {self.team.rank} does not see what rank 0 wrote "
                "there. Pass a `path` on a file system that they share."
            )
        record_name = re.compile(re.escape(self._file(0, "json").name).replace("00000", r"(\d{5,})"))
        for file in sorted(self.path.iterdir()):
            match = record_name.fullmatch(file.name)
            if match is None or not self.is_mine(int(match[1])):
                continue
            record = _read_json(file)
            try:
                self._shard(record)
                outputs, checksums = record["outputs"], list(record["sources"])
            except (KeyError, TypeError, AttributeError, AnchorCacheError):
                continue  # the record or its file is damaged: the shard is written again
            self.same_outputs(outputs)
            self.complete[int(match[1])] = checksums
        if self.complete:
            _log.info("%s is half built: %d shards of it are complete", self.path, len(self.complete))

    # Shards

    def write_shard(
        self,
        shard: int,
        tensors: dict[str, Tensor],
        encodings: Mapping[str, Encoding],
        checksums: list[str],
        categories: list[str],
    ) -> None:
        """Writes a shard, and then the record that makes it complete.

        Args:
            shard: Number of the shard.
            tensors: Tensors by key.
            encodings: Encodings of inputs stored as bytes.
            checksums: Checksum of each anchor.
            categories: Category of each anchor, "" if it has none.
        """
        path = self._file(shard, "safetensors")
        write_aside(path, lambda aside: safetensors.torch.save_file(tensors, aside))
        images = {name: {"formula": x, "dtype": dtype_name(dtype)} for name, (x, dtype) in encodings.items()}
        written = Shard(path, len(checksums), path.stat().st_size, images)
        record = {
            "file": path.name,
            "anchors": written.count,
            "bytes": written.size,
            "sha256": written.checksum(),
            "images": images,
            **recorded(categories),
            "outputs": self.outputs,
            "sources": checksums,
            "inputs": asdict(self.structure) if self.structure else None,
        }
        write_json(self._file(shard, "json"), record)

    def _shard(self, record: Mapping[str, Any]) -> Shard:
        known = (record[name] for name in ("anchors", "bytes", "images", "sha256"))
        return Shard(self.path / record["file"], *known)

    # The end

    def finish(self, shards: int) -> None:
        """Announces that all `shards` are written, and waits until the cache is finished.

        The first process waits for all others and writes the manifest; the others wait for that. Raises
        AnchorCacheError if one has failed or was interrupted.
        """
        if self.team.writes:
            write_json(self.path / f"rank-{self.team.rank}.done", {"shards": shards})
        if self.team.rank == 0 and self.team.writes:
            self._write_manifest(self._wait_for_all(shards))
        else:
            self._wait_for((self.path / MANIFEST).exists, 0)

    def _write_manifest(self, numbers: list[tuple[int, int]]) -> None:
        records, shared = [], []
        for number, rank in numbers:
            file = self._file(number, "json", rank)
            record = _read_json(file)
            if not record:
                raise AnchorCacheError(
                    f"{file} cannot be read: the file system is not shared, or something else writes to the folder. "
                    "Run the same `build` again."
                )
            shared.append([record.pop(key) for key in ("outputs", "sources", "inputs")])
            self.same_outputs(shared[-1][0])
            records.append(record)
        shards = [self._shard(record) for record in records]
        outputs = self.outputs or {}
        features = {**self.settings["features"], "outputs": outputs}
        taps = [tap_key(layer, span) for layer in features["layers"] for span in features["pooling"]]
        features["variances"] = {tap: mean_variance(shards, f"features.{tap}") for tap in taps}
        values = {name: feature("values", name) for name, output in outputs.items() if output["kind"] == "values"}
        features["scales"] = {name: variances(shards, f"features.{key}") for name, key in values.items()}
        if self.units is not None:
            for what, theirs in (("variances", self.units.variances), ("scales", self.units.scales)):
                features[what] = {name: theirs.get(name, own) for name, own in features[what].items()}
        manifest = {
            "anchors": sum(shard.count for shard in shards),
            "inputs": shared[-1][2],
            "features": features,
            "teacher": self.settings["teacher"],
            "built_with": {name: self.settings[name] for name in ("images", "shard_size")},
            "first_anchors": shared[0][1],
            "shards": records,
        }
        write_aside(self.path / MANIFEST, lambda aside: aside.write_text(manifest_text(manifest)))
        clean(self.path)

    # The others

    def check_others(self) -> None:
        """Raises AnchorCacheError if another process has reported a failure."""
        for rank in range(self.team.world_size):
            with suppress(OSError):
                reason = (self.path / f"rank-{rank}.failed").read_text()
                raise AnchorCacheError(
                    f"Rank {rank} could not go on building the anchors in {self.path}: {reason.rstrip('.')}. {_GOES_ON}"
                )

    def fail(self, error: BaseException) -> None:
        """Tells the other processes that this one cannot go on. Cleans a folder without complete shards."""
        if self.team.world_size == 1 and not any(self.path.glob("shard-*.json")):
            clean(self.path)
        if self.team.world_size > 1 and self.team.writes:
            reason = f"{type(error).__name__}: {error}"
            with suppress(AnchorCacheError):  # others will find the lock open
                write_aside(self.path / f"rank-{self.team.rank}.failed", lambda aside: aside.write_text(reason))

    def _wait_for(self, done: Callable[[], bool], rank: int) -> None:
        pause = 0.002
        while not done():
            if self.team.world_size > 1:
                self.check_others()
                if not is_locked(self.path, rank) and not done():
                    self.check_others()  # it may have reported the reason since
                    raise AnchorCacheError(
                        f"Rank {rank} was interrupted while it was building the anchors in {self.path}. {_GOES_ON}"
                    )
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _wait_for_all(self, shards: int) -> list[tuple[int, int]]:
        """(shard, rank) of all shards in order, when all processes are done."""
        numbers = {}
        for rank in range(self.team.world_size):
            marker = self.path / f"rank-{rank}.done"
            self._wait_for(marker.exists, rank)
            numbers[rank] = json.loads(marker.read_bytes())["shards"]
        if not self.replicated:
            return [(number, rank) for rank, count in numbers.items() for number in range(count)]
        if set(numbers.values()) != {shards}:
            raise AnchorCacheError(
                f"The processes saw different numbers of anchors: {numbers} shards by rank. With replicated=True "
                "each of them must be given the same batches."
            )
        return [(number, 0) for number in range(shards)]


@contextmanager
def building(
    path: Path, settings: Mapping[str, Any], team: Team, replicated: bool = True, *, start_over: bool = False
) -> Iterator[BuildFolder]:
    """Locks and prepares the folder; after an exception in the block, tells the other processes.

    The first process prepares it, then all load their parts. If one cannot, none begins. Arguments are those of
    `BuildFolder`; `start_over` discards complete shards.

    Raises:
        AnchorCacheError: Another build is writing to the folder, it is half built with other settings, or cannot be
            written to.
    """
    folder = BuildFolder(path, settings, team, replicated)
    token, problem = None, None
    with ExitStack() as lock:
        try:
            if team.writes:
                lock.enter_context(locked(path, team.rank))
            if team.writes and team.rank == 0:
                token = folder.prepare(start_over=start_over)
        except AnchorCacheError as error:
            problem = error
        told = team.gather((token, None if problem is None else str(problem)))
        if problem is not None:
            raise problem
        if reason := next((words for _, words in told if words), None):
            raise AnchorCacheError(reason)
        folder.load(next(t for t, _ in told if t))
        try:
            yield folder
        except BaseException as error:
            folder.fail(error)
            raise


def clean(path: Path) -> None:
    """Removes the files that a build killed right after its end leaves behind."""
    for file in path.iterdir():
        lock = _LOCK.fullmatch(file.name)
        leftover = _LEFTOVER.fullmatch(file.name) and file.suffix != ".safetensors"
        try:
            if file.name == PROGRESS or leftover or (lock and not is_locked(path, int(lock[1]))):
                file.unlink(missing_ok=True)
        except OSError:  # a finished cache can be used where nothing can be written
            return


def require_same(path: Path, old: Any, new: Mapping[str, Any]) -> None:
    """Raises AnchorCacheError unless two builds have the same settings, naming the first that differs."""
    if old == new:
        return
    before, now = _flat(old), _flat(new)
    difference = ""
    if key := next((key for key, value in now.items() if before.get(key) != value), None):
        is_model = key == "teacher.fingerprint" and isinstance(before.get(key), str)
        why = compare_fingerprints(before[key], now[key]) if is_model else None
        difference = f": {why or f'{key} is {before.get(key)!r} there and {now[key]!r} here'}"
    raise AnchorCacheError(
        f"The folder {path} holds anchors of another build{difference}. Pass overwrite=True to replace them, "
        f"another `path` to keep them, or AnchorCache.open({str(path)!r}) to use them."
    )


def _flat(settings: Any) -> dict[str, Any]:
    """Settings by the names "part" and "part.key"."""
    flat: dict[str, Any] = {}
    for part, value in settings.items() if isinstance(settings, dict) else ():
        flat |= {f"{part}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {part: value}
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
