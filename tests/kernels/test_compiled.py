"""The compiled pass: its compiler, its cache, its threads, and its bfloat16."""

import ctypes
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from craft_optim._step.decision import Weights
from craft_optim._step.kernels import compiled
from craft_optim._step.kernels.compiled import CompiledPairs, Vectors
from craft_optim.functional import gram, project_and_merge_

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")


@pytest.fixture
def forget():
    """The library is looked for again, in the test and after it."""
    compiled._library.cache_clear()
    yield
    compiled._library.cache_clear()


def compiled_pairs(task, retention, segments=None):
    return CompiledPairs(compiled.library(), Vectors(task), Vectors(retention), segments)


def pairs(*lengths, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=generator).to(dtype) for n in lengths] for _ in range(2)]


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(compiled, "_PER_THREAD", 1000)
    found = []
    for threads in (1, 2, 5):
        task, retention = pairs(3, 700_001, 0, 4097, 250_000)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        work = compiled_pairs(task, retention, [0, 1, 0, 0, 1])
        sums = work.sums(2)
        work.merge_([Weights(1.0, 0.3), Weights(0.5, 0.7)])
        found.append((sums.tobytes(), [r.numpy().tobytes() for r in retention]))
    assert found[0] == found[1] == found[2]
    task, retention = pairs(3, 700_001, 0, 4097, 250_000)
    exact = [sum((task[i].double() * retention[i].double()).sum().item() for i in of) for of in ([0, 2, 3], [1, 4])]
    np.testing.assert_allclose(np.frombuffer(found[0][0]).reshape(3, 2)[2], exact, rtol=1e-12)


def test_only_retention_gradients_are_written_to():
    task, retention = pairs(5, 9)
    kept = [t.clone() for t in task], [r.clone() for r in retention]
    work = compiled_pairs([task[0], None], [None, retention[1]])
    work.merge_([Weights(2.0, 3.0)])
    assert all(torch.equal(a, b) for a, b in zip(task, kept[0], strict=True))
    assert torch.equal(retention[0], kept[1][0])
    assert torch.equal(retention[1], 3.0 * kept[1][1])


def test_bfloat16_rounds_as_torch_does():
    # Every bfloat16 there is, and sums that lie halfway between two of them.
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    halves = torch.tensor([1.0, 1.0078125, 3.3e38, -3.3e38, 1e-40, float("nan")]).bfloat16()
    for other in halves:
        retention = [every.clone()]
        task = [other.expand(1 << 16).contiguous()]
        compiled_pairs(task, retention).merge_([Weights(1.0, 0.50390625)])
        expected = (other.float() + 0.50390625 * every.float()).bfloat16()
        assert torch.equal(retention[0].isnan(), expected.isnan())
        found, wanted = retention[0].nan_to_num(0.0), expected.nan_to_num(0.0)
        assert torch.equal(found.view(torch.uint16), wanted.view(torch.uint16))


def test_dtypes_may_differ_within_a_pair():
    for t_dtype in compiled.KINDS:
        for r_dtype in compiled.KINDS:
            task, retention = [torch.randn(1000).to(t_dtype)], [torch.randn(1000).to(r_dtype)]
            work = compiled_pairs(task, retention)
            exact = (task[0].double() * retention[0].double()).sum().item()
            assert work.sums(1)[2, 0] == pytest.approx(exact, rel=1e-12, abs=1e-12)
            expected = task[0].double() + 0.5 * retention[0].double()
            work.merge_([Weights(1.0, 0.5)])
            step = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}
            error = (retention[0].double() - expected).abs().max().item()
            assert error <= 4 * max(step[r_dtype], 1e-7 if t_dtype != torch.float64 else 0.0)


def test_scales_that_float32_cannot_hold_need_no_second_pass():
    big, small = [torch.full((64,), 1e30)], [torch.full((64,), 1e-30)]
    sums = compiled_pairs(big, small).sums(1)
    np.testing.assert_allclose(sums[:, 0], [64e60, 64e-60, 64.0], rtol=1e-6)


def test_gradients_of_different_size_are_refused_before_memory_is_touched():
    with pytest.raises(ValueError, match="same shapes"):
        gram([torch.ones(4)], [torch.ones(5)])


def test_without_a_compiler_torch_does_the_work_and_the_log_says_so(forget, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        assert compiled.library() is None
        task, retention = pairs(5)
        expected = task[0] + retention[0]
        project_and_merge_(task, retention, lam=1.0, project=False)
        torch.testing.assert_close(retention[0], expected)
    assert len(caplog.records) == 1, "said once"
    assert "no-such-compiler" in caplog.text


def test_what_the_compiler_says_is_in_the_log(forget, tmp_path, monkeypatch, caplog):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho unknown flag >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(failing))
    with caplog.at_level(logging.INFO, logger=compiled.__name__):
        assert compiled.library() is None
    assert "unknown flag" in caplog.text
    assert list((tmp_path / "craft-optim").iterdir()) == [], "nothing half-made is left"


def test_it_is_compiled_once(forget, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.library() is not None
    assert len(list((tmp_path / "craft-optim").iterdir())) == 1
    compiled._library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.library() is not None


def test_a_home_that_cannot_be_written_to(forget, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert isinstance(compiled.library(), ctypes.CDLL)


def test_several_processes_may_compile_at_once(tmp_path):
    code = """
import os
from craft_optim._step.kernels import compiled
first = os.fork()
found = compiled.library() is not None
if not first:
    os._exit(0 if found else 1)
assert found and os.waitpid(first, 0)[1] == 0
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert len(list((tmp_path / "craft-optim").iterdir())) == 1
