"""The gradients of the benchmarks have the shapes of the models that they are named after."""

import math

import pytest
import torch
from floor import axpy
from shapes import elements, gpt2, pair, paligemma, same_size


@pytest.mark.parametrize(("model", "count", "total"), [(gpt2, 148, 124_439_808), (paligemma, 603, 2_923_335_408)])
def test_models(model, count, total):
    pytest.importorskip("transformers")
    shapes = model()
    assert (len(shapes), sum(map(math.prod, shapes))) == (count, total)


@pytest.mark.parametrize(("count", "total"), [(1, 7), (3, 10), (100, 1 << 20)])
def test_same_size(count, total):
    shapes = same_size(count, total)
    assert len(shapes) == count
    assert sum(n for (n,) in shapes) == total
    assert max(shapes)[0] - min(shapes)[0] <= 1


def test_pairs_conflict():
    task, retention = (torch.cat([g.flatten() for g in gradients]) for gradients in pair([(300, 10), (70,)]))
    assert torch.cosine_similarity(task, retention, dim=0) == pytest.approx(-(0.2**0.5), abs=0.05)
    assert task.std() == pytest.approx(1.0, abs=0.05)


def test_the_floor_has_as_many_elements_and_their_dtype():
    y = axpy([torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)])()
    assert (y.shape, y.dtype) == ((17,), torch.bfloat16)
    assert elements([torch.zeros(3, 4), torch.zeros(5)]) == 17
