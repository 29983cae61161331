"""For the tests and the doctests alike."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# Doctests of modules that import what they are made for.
_INTEGRATIONS = {
    "lerobot": "craft_optim/lerobot/*",
    "rich": "craft_optim/report/follow.py",
    "scipy": "craft_optim/evaluation/statistics.py",
    "transformers": "craft_optim/transformers.py",
    "triton": "craft_optim/*kernels/fused.py",
}
collect_ignore_glob = [files for library, files in _INTEGRATIONS.items() if not find_spec(library)]

settings.register_profile("fixed", derandomize=True)  # the same examples on every run
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
