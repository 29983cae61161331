import functools
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "common")]  # for `runs`, which the tests here share


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Of a dtype of autocast, or None: anchors of `runs.network()`, which is the same network every time."""
    from runs import build_cache

    return functools.cache(lambda autocast: build_cache(tmp_path_factory.mktemp("anchors"), autocast))


@pytest.fixture(scope="session")
def cache(caches):
    return caches(None)


@pytest.fixture
def without_a_compiler():
    """torchao compiles its step, half a minute of C++ on a CPU; the arithmetic is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield
