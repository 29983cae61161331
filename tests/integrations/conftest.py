import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `runs`, which the tests here share


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Anchors of `runs.network()`, which is the same network every time it is called."""
    from runs import build_cache

    return build_cache(tmp_path_factory.mktemp("anchors"))
