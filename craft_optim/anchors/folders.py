"""Folders that survive killed processes: files that are whole or absent, and locks that a death releases."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
from filelock import FileLock, Timeout

from .shards import AnchorCacheError

__all__ = ["is_locked", "locked", "write_aside", "write_json"]


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name, syncs it to disk, and renames it.

    Raises:
        AnchorCacheError: The file cannot be written.
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
    """Writes a value as JSON; see `write_aside`."""
    write_aside(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Locks the folder within the block against other processes of this rank; creates it if needed.

    Raises:
        AnchorCacheError: Another process has the lock, or the folder cannot be written to.
    """
    path = folder / f"build-{rank}.lock"
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise AnchorCacheError(
            f"Another process is building the anchors in {folder} right now. Wait for it, or pass another `path`. If "
            "several processes are to build them together, all of them must be in `process_group`."
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # before the release: whoever has opened it meanwhile finds it gone, and makes another
            path.unlink(missing_ok=True)
        lock.release()


def is_locked(folder: Path, rank: int) -> bool:
    """True while a process of this rank is at work: slow, but not killed."""
    path = folder / f"build-{rank}.lock"
    if not path.exists():  # the process has come to its end
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
