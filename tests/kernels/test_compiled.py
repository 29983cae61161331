"""The compiled pass: its threads, and its bfloat16."""

import numpy as np
import pytest
import torch

from craft_optim._step.decision import Weights
from craft_optim._step.kernels import compiled
from craft_optim._step.kernels.compiled import CompiledPairs
from craft_optim._step.kernels.pairs import Vectors
from craft_optim.functional import gram

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler")


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
    for t_dtype in compiled.DTYPES:
        for r_dtype in compiled.DTYPES:
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
