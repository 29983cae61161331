"""Files of a cache, open for reading, and their folder."""

import io
import os
import weakref
from pathlib import Path
from typing import Any

__all__ = ["Folder", "OpenFile"]


class OpenFile(io.FileIO):
    """A file to read from, closed with its last reference, without the usual warning."""

    def __del__(self) -> None:
        self.close()


class Folder:
    """A folder that is also found under a new name as long as this process holds it.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            try:
                self._descriptor = os.open(path, os.O_RDONLY)
            except OSError:  # a folder whose files may be read, but not listed
                return
            weakref.finalize(self, os.close, self._descriptor)

    def open(self, name: str) -> OpenFile:
        """Opens one of its files. Raises OSError."""
        return OpenFile(self.path / name, "rb", opener=self._open)

    def _open(self, path: str, flags: int) -> int:
        if self._descriptor is not None:
            try:
                return os.open(Path(path).name, flags, dir_fd=self._descriptor)
            except FileNotFoundError:  # it was deleted; there may be a copy in its place
                pass
        return os.open(path, flags)

    def __reduce__(self) -> Any:
        return Folder, (self.path,)
