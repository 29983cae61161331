"""Fingerprints: the same for the same weights, different otherwise, and they say what differs."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from craft_optim.anchors import fingerprint
from craft_optim.anchors.fingerprint import compare_fingerprints


def test_the_same_weights_have_the_same_fingerprint(noisy: nn.Module) -> None:
    mark = fingerprint(noisy)
    assert mark == fingerprint(copy.deepcopy(noisy).eval())
    assert mark == fingerprint(torch.compile(noisy))
    wrapped = nn.Module()
    wrapped.module = noisy  # as DistributedDataParallel names it
    assert mark == fingerprint(wrapped)


def test_it_is_the_same_in_another_process() -> None:
    script = (
        "import torch; from craft_optim.anchors import fingerprint; torch.manual_seed(0);"
        "m = torch.nn.Linear(300, 7); m.weight.data = m.weight.data.t().contiguous().t(); print(fingerprint(m))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    assert run.stdout.strip() == fingerprint(nn.Linear(300, 7))


def test_one_optimizer_step_changes_it(noisy: nn.Module) -> None:
    before = fingerprint(noisy)
    optimizer = torch.optim.SGD(noisy.head.parameters(), lr=1e-4)
    noisy(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    assert compare_fingerprints(before, fingerprint(noisy)) == (
        "the model has other weights than the one the cache was built with"
    )


def test_it_says_what_differs(noisy: nn.Module) -> None:
    mark = fingerprint(noisy)
    assert compare_fingerprints(mark, mark) is None
    assert "dtype" in str(compare_fingerprints(mark, fingerprint(copy.deepcopy(noisy).bfloat16())))
    assert "other tensors" in str(compare_fingerprints(mark, fingerprint(noisy.body)))
    assert "cannot be compared" in str(compare_fingerprints("v0-a", mark))


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="load the weights"):
        fingerprint(nn.Linear(2, 2))
