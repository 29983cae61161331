"""For the tests and the doctests alike."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# Their doctests need what they are made for.
_INTEGRATIONS = {"lerobot": "craft_optim/lerobot/*", "transformers": "craft_optim/transformers.py"}
collect_ignore_glob = [files for library, files in _INTEGRATIONS.items() if not find_spec(library)]

settings.register_profile("fixed", derandomize=True)  # the same examples on every run
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
