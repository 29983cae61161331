"""The folder that a cache is built in: files that are whole or not there, locks, and what is left to clean up."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
from filelock import FileLock, Timeout

from .fingerprint import compare_fingerprints
from .shards import AnchorCacheError

__all__ = [
    "LEFTOVER",
    "PROGRESS",
    "clean",
    "is_locked",
    "locked",
    "make_folder",
    "require_same",
    "write_aside",
    "write_json",
]

PROGRESS = "build.json"
# What a build writes besides the manifest; safetensors' own temporary files among it
LEFTOVER = re.compile(
    r"shard-[\d-]+\.(safetensors|json)(\.tmp)?|rank-\d+\.(done|failed)(\.tmp)?|(build|cache)\.json\.tmp|\.tmp\w{6}"
)
_LOCK = re.compile(r"build-(\d+)\.lock")


def make_folder(folder: Path) -> None:
    """Creates the folder if need be.

    Raises:
        AnchorCacheError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes aside, makes sure that it is on disk, and renames.

    Raises:
        AnchorCacheError: It cannot be written.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: Exception) -> AnchorCacheError:
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error)
    remedy = "Make the folder writable, or pass another `path`."
    if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in reason:
        free = shutil.disk_usage(path.parent).free
        remedy = f"There are {free / 1e9:.3g} GB left: make room, or pass another `path`."
    return AnchorCacheError(
        f"{path} cannot be written ({reason}). {remedy} The shards that are complete stay: the same `build` goes on "
        "after them."
    )


def write_json(path: Path, value: Any) -> None:
    """See `write_aside`."""
    write_aside(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Within the block no other process of this rank writes to the folder.

    Raises:
        AnchorCacheError: One does, or the folder cannot be written to.
    """
    path = folder / f"build-{rank}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AnchorCacheError(
            f"Another process is building the anchors in {folder} right now. Wait for it, or pass another `path`. If "
            "several processes are to build them together, all of them must be in `process_group`."
        ) from None
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # before the release: whoever has opened it meanwhile finds it gone, and makes another
            path.unlink(missing_ok=True)
        lock.release()


def is_locked(folder: Path, rank: int) -> bool:
    """Whether a process of this rank is still at work; tells a killed one from a slow one."""
    path = folder / f"build-{rank}.lock"
    if not path.exists():  # the process has come to its end
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def clean(folder: Path) -> None:
    """Removes what a build leaves behind if it is killed right after it has finished."""
    for file in folder.iterdir():
        lock = _LOCK.fullmatch(file.name)
        leftover = LEFTOVER.fullmatch(file.name) and file.suffix != ".safetensors"
        try:
            if file.name == PROGRESS or leftover or (lock and not is_locked(folder, int(lock[1]))):
                file.unlink(missing_ok=True)
        except OSError:  # a finished cache can be used where nothing can be written
            return


def require_same(folder: Path, old: Any, new: Mapping[str, Any]) -> None:
    """Raises unless two builds have the same settings, naming the first that differs."""
    if old == new:
        return
    old = old if isinstance(old, dict) else {}
    pairs = []
    for part, value in new.items():
        before = old.get(part)
        if isinstance(before, dict) and isinstance(value, dict):
            pairs += [(f"{part}.{key}", before.get(key), value[key]) for key in value]
        else:
            pairs.append((part, before, value))
    difference = ""
    for key, a, b in pairs:
        if a != b:
            why = compare_fingerprints(a, b) if key == "teacher.fingerprint" and isinstance(a, str) else None
            difference = f": {why}" if why else f": {key} is {a!r} there and {b!r} here"
            break
    raise AnchorCacheError(
        f"The folder {folder} holds anchors of another build{difference}. Pass overwrite=True to replace them, "
        f"another `path` to keep them, or AnchorCache.open({str(folder)!r}) to use them."
    )
