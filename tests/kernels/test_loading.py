"""The compiled functions: their compiler, and which of the files that are kept for later are loaded."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from craft_optim._step.kernels import loading
from craft_optim._step.surgery import GradientPairs
from craft_optim.functional import project_and_merge_

pytestmark = pytest.mark.skipif(loading.library() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def forget():
    """The library is looked for again, in the test and after it."""
    loading._library.cache_clear()
    yield
    loading._library.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What a compiler makes of the source."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("made")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        loading._library.cache_clear()
        assert loading.library() is not None
        (file,) = (folder / "craft-optim").iterdir()
        made = folder / "made.so"
        made.write_bytes(file.read_bytes()[: -loading._SEAL])
        return made


@pytest.fixture(autouse=True)
def quick(made, tmp_path, monkeypatch):
    """A compiler that need not think: the tests are about what happens before and after."""
    script = tmp_path / "quick"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\nexec cp {made} "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return str(script)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of kept files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "craft-optim"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder: empty after each test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []


def found_anew(monkeypatch, compiler="no-such-compiler"):
    """The library as the next process finds it, with another compiler."""
    loading._library.cache_clear()
    monkeypatch.setenv("CXX", compiler)
    return loading.library()


def kept_file(cache):
    (file,) = cache.iterdir()
    return file


@pytest.mark.parametrize("compiler", ["no-such-compiler", "no-such-compiler g++", "g++ 'unclosed", "/", "false"])
def test_without_a_compiler_torch_does_the_work_and_the_log_says_so(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    task, retention = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]
    for _ in range(2):
        project_and_merge_(task, retention, lam=1.0, project=False)
    torch.testing.assert_close(retention[0], torch.tensor([5.0, 3.0]))
    (record,) = caplog.records  # said once
    assert record.levelno == logging.WARNING
    assert "torch operations do the work" in record.message
    assert "CRAFT_OPTIM_COMPILE=0" in record.message


def test_nothing_is_compiled_for_gradients_on_a_device(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    there = [torch.ones(3, device="meta")]
    assert GradientPairs(there, there).ways == {"portable"}
    assert caplog.records == []


def test_what_the_compiler_says_is_in_the_log(cache, tmp_path, monkeypatch, caplog):
    failing = tmp_path / "failing"
    failing.write_bytes(b"#!/bin/sh\nprintf 'unknown flag \\377' >&2; exit 1\n")  # in an encoding of its own
    failing.chmod(0o755)
    assert found_anew(monkeypatch, str(failing)) is None
    assert "unknown flag" in caplog.text
    assert list(cache.iterdir()) == [], "nothing half-made is left"


@pytest.mark.parametrize("wrapped", ["env {}", "env {} -fPIC -DNAME='a b'", "  env   {} ", "env g++"])
def test_a_compiler_may_be_called_through_another_and_with_arguments(wrapped, quick, monkeypatch, caplog):
    assert found_anew(monkeypatch, wrapped.format(quick)) is not None
    assert caplog.records == []


def test_a_compiler_in_a_folder_with_a_blank_in_its_name(quick, tmp_path, monkeypatch):
    folder = tmp_path / "my tools"
    folder.mkdir()
    (folder / "compiler").symlink_to(quick)
    assert found_anew(monkeypatch, str(folder / "compiler")) is not None


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_it_is_compiled_once_and_kept_for_this_user_alone(umask, cache, monkeypatch, caplog):
    before = os.umask(umask)
    try:
        assert loading.library() is not None
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.parent.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(kept_file(cache).stat().st_mode) == 0o600
    assert found_anew(monkeypatch) is not None
    assert caplog.records == []


def cut_short(file):
    file.write_bytes(file.read_bytes()[:1000])


def one_byte_off(file):
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)


def under_another_name(file):
    """What was compiled of another source, say."""
    name, content = file.name, file.read_bytes()[: -loading._SEAL]
    file.write_bytes(loading._sealed(f"not-{name}", content))


def behind_a_link(file):
    elsewhere = file.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        one_byte_off,
        under_another_name,
        behind_a_link,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x7fELF" + bytes(5000)),
        lambda file: file.write_bytes(file.read_bytes()[: -loading._SEAL]),
        lambda file: file.chmod(0o620),
        lambda file: file.chmod(0o602),
    ],
)
def test_a_kept_file_that_is_not_as_it_was_written_is_made_again(damage, cache, monkeypatch, caplog, quick):
    loading.library()
    file = kept_file(cache)
    whole = file.read_bytes()
    damage(file)
    assert found_anew(monkeypatch, quick) is not None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "compiled again" in record.message
    caplog.clear()
    assert not file.is_symlink()
    assert file.read_bytes()[:4] == whole[:4]
    assert found_anew(monkeypatch) is not None
    assert caplog.records == []


def test_a_damaged_file_is_not_loaded_where_it_cannot_be_made_again(cache, monkeypatch, caplog):
    loading.library()
    cut_short(kept_file(cache))
    assert found_anew(monkeypatch) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_files_of_another_user_are_not_loaded(cache, monkeypatch, caplog, quick):
    loading.library()
    before = kept_file(cache).read_bytes()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert found_anew(monkeypatch) is None, "without a compiler there is nothing that may be loaded"
    assert f"Found owner {os.getuid()} and mode 0700" in caplog.text
    assert found_anew(monkeypatch, quick) is not None
    assert kept_file(cache).read_bytes() == before


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(mode, cache, monkeypatch, caplog, quick):
    loading.library()
    cache.chmod(mode)
    assert found_anew(monkeypatch) is None
    assert "writable by nobody else" in caplog.text
    assert found_anew(monkeypatch, quick) is not None


def test_a_shared_cache_home_is_used_by_a_folder_of_ones_own(cache, monkeypatch, caplog):
    cache.parent.mkdir()
    cache.parent.chmod(0o1777)
    assert loading.library() is not None
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert found_anew(monkeypatch) is not None
    assert caplog.records == []


def blocked(cache):
    cache.parent.write_text("")


def a_file_in_its_place(cache):
    cache.parent.mkdir()
    cache.write_text("")


def a_link(cache):
    cache.parent.mkdir()
    (cache.parent / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to("elsewhere")


def a_link_to_nowhere(cache):
    cache.parent.symlink_to("nowhere")


@pytest.mark.parametrize("how", [blocked, a_file_in_its_place, a_link, a_link_to_nowhere])
def test_without_a_folder_to_keep_it_in_each_process_compiles(how, cache, caplog):
    how(cache)
    assert isinstance(loading.library(), ctypes.CDLL)
    (record,) = caplog.records
    assert "is not kept" in record.message
    assert not (cache.is_dir() and list(cache.iterdir()))


def test_a_cache_home_behind_a_link_is_used(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "scratch").mkdir()
    cache.parent.symlink_to(tmp_path / "scratch")
    assert loading.library() is not None
    assert found_anew(monkeypatch) is not None
    assert caplog.records == []


@pytest.mark.parametrize("relative", ["", ".", "cache", "~/cache"])
def test_a_relative_cache_home_is_ignored(relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert loading.library() is not None
    assert kept_file(tmp_path / "home" / ".cache" / "craft-optim")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["home", "quick", "temporary"]


def no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


@pytest.mark.parametrize("how", [no_home, lambda patch: patch.setenv("HOME", "relative")])
def test_a_user_without_a_home(how, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    how(monkeypatch)
    assert loading.library() is not None
    (record,) = caplog.records
    assert "is not kept" in record.message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quick", "temporary"]


def test_a_full_disk_costs_the_kept_file_only(cache, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert loading.library() is not None
    assert "cannot be kept" in caplog.text
    assert list(cache.iterdir()) == []


def test_where_files_in_memory_cannot_be_executed(monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", denied, raising=False)
    assert loading.library() is not None
    assert found_anew(monkeypatch) is not None


def test_several_processes_may_compile_at_once(cache, monkeypatch):
    monkeypatch.delenv("CXX")
    code = """
import os
from craft_optim._step.kernels import loading
from craft_optim._step.surgery import GradientPairs
first = os.fork()
found = loading.library() is not None
if not first:
    os._exit(0 if found else 1)
assert found and os.waitpid(first, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert kept_file(cache)
