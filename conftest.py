"""For the tests and the doctests alike."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# Their doctests need what they are made for.
collect_ignore_glob = [] if find_spec("lerobot") else ["craft_optim/lerobot/*"]

settings.register_profile("fixed", derandomize=True)  # the same examples on every run
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
