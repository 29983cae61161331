"""Loading of compiled.cpp: its functions are compiled at the first use, and kept for later processes.

Loaded code runs with the user's rights. So a kept file is used only if it and its folder belong to this user, nobody
else can write to them, and its checksum proves that it is the compiled one. The compared bytes are loaded, not whatever
has the file's name by then.
"""

import ctypes
import hashlib
import logging
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import torch

__all__ = ["library"]

_SOURCE = Path(__file__).with_name("compiled.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# By the processor's features as torch reports them, not -march=native: machines may share a home folder.
_FLAGS_OF_PROCESSOR = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"),
}
_COMPILERS = ("c++", "g++", "clang++")
_SEAL = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def library() -> ctypes.CDLL | None:
    """The compiled functions. None without a compiler, on a system other than POSIX, or if the user turned it off."""
    return None if os.environ.get("CRAFT_OPTIM_COMPILE") == "0" or os.name != "posix" else _library()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return _kept_or_compiled()
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        _log.warning(
            "no compiled surgery, torch operations do the work, slower: %s. Install g++ or clang++, or name a compiler "
            "in CXX; CRAFT_OPTIM_COMPILE=0 asks for none",
            " ".join(str(getattr(error, "stderr", None) or error).split()).rstrip(".")[:1000],
        )
        return None


def _kept_or_compiled() -> ctypes.CDLL:
    flags = (*_FLAGS, *_FLAGS_OF_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ()))
    what = (_SOURCE.read_text("utf-8"), *flags, platform.system(), platform.machine(), *platform.libc_ver())
    name = f"surgery-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    with _cache_folder() as folder:
        if folder is not None:
            try:
                kept = _read(folder, name)
                if kept is not None:
                    return _loaded(kept)
            except (OSError, ValueError, AttributeError) as error:
                _log.warning("the kept surgery is not used, and compiled again: %s", error)
        content = _compiled(flags)
        made = _loaded(content)
        if folder is not None:
            try:
                _keep(folder, name, content)
            except OSError as error:
                _log.warning("the compiled surgery cannot be kept, the next process compiles it again: %s", error)
        return made


def _compiled(flags: Sequence[str]) -> bytes:
    """Bytes of the compiled library.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: If there is no compiler, or it fails.
    """
    wanted = os.environ.get("CXX", "")
    compiler = [wanted] if shutil.which(wanted) else shlex.split(wanted)  # a path with blanks, or "ccache g++"
    compiler = compiler or [*filter(None, map(shutil.which, _COMPILERS))][:1]
    if not compiler:
        raise FileNotFoundError(f"no C++ compiler among {', '.join(_COMPILERS)}")
    with tempfile.TemporaryDirectory(prefix="craft-optim-") as folder:
        made = Path(folder, "surgery.so")
        command = [*compiler, *flags, str(_SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)
        return made.read_bytes()


def _loaded(content: bytes) -> ctypes.CDLL:
    try:
        with _in_memory(content) as path:
            return _functions(path)
    except (AttributeError, OSError):  # a system without such files, or without their execution
        with _on_disk(content) as path:
            return _functions(path)


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file in memory only."""
    with open(os.memfd_create("craft-optim-surgery"), "wb") as file:
        file.write(content)
        file.flush()
        # A unique name: the linker would return an earlier library of the same name
        yield f"/proc/{os.getpid()}/task/{threading.get_native_id()}/fd/{file.fileno()}"


@contextmanager
def _on_disk(content: bytes) -> Iterator[str]:
    """The path of this process' own file. It is removed afterwards: the loaded library no longer needs it."""
    with tempfile.TemporaryDirectory(prefix="craft-optim-") as folder:
        path = Path(folder, "surgery.so")
        path.write_bytes(content)
        yield str(path)


def _functions(path: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(path)
    for function in (loaded.craft_dots, loaded.craft_merge):
        function.restype = None
    return loaded


# The folder of kept files. Accessed by descriptor only: its path may lead elsewhere a moment later.


@contextmanager
def _cache_folder() -> Iterator[int | None]:
    """The folder's descriptor; None if no folder belongs to this user alone."""
    try:
        folder = _opened_folder()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _log.warning("the compiled surgery is not kept, every process compiles it: %s", error)
        yield None
        return
    try:
        yield folder
    finally:
        os.close(folder)


def _opened_folder() -> int:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # ignored, as the XDG specification says
        base = Path.home() / ".cache"
    if not base.is_absolute():
        raise FileNotFoundError(f"HOME must be an absolute path. Found {str(base.parent)!r}")
    path = base / "craft-optim"
    missing = [*takewhile(lambda folder: not folder.exists(), (path, *path.parents))]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if missing and os.fstat(opened).st_uid == os.geteuid():
            os.fchmod(opened, 0o700)  # whatever the umask removed
        _require_own(opened, path)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _require_own(descriptor: int, path: Path | str) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"{path} must be this user's, and writable by nobody else. Found owner {status.st_uid} and mode "
            f"{status.st_mode & 0o777:04o}: change them, or set XDG_CACHE_HOME to a folder of your own"
        )


def _sealed(name: str, content: bytes) -> bytes:
    """The content followed by a checksum of name and content, which the system's linker ignores."""
    return content + hashlib.sha256(name.encode() + content).digest()


def _read(folder: int, name: str) -> bytes | None:
    """The content of a kept file; None if there is none.

    Raises:
        OSError, ValueError: The file is another user's, or damaged.
    """
    try:
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        return None
    with open(opened, "rb") as file:
        _require_own(opened, name)
        sealed = file.read()
    content = sealed[:-_SEAL]
    if sealed != _sealed(name, content):
        raise ValueError(f"{name} is damaged: it is not what was compiled (sha256)")
    return content


def _keep(folder: int, name: str, content: bytes) -> None:
    """Writes under another name, syncs to disk, and renames: several processes may do so at once."""
    aside = f"{name}.{secrets.token_hex(8)}"
    try:
        opened = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with open(opened, "wb") as file:
            os.fchmod(opened, 0o600)
            file.write(_sealed(name, content))
            file.flush()
            os.fsync(opened)
        os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        raise
