"""The package's own names, which are imported when they are first asked for."""

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

import craft_optim


def test_every_public_name_is_there():
    assert {*craft_optim.__all__} <= {*dir(craft_optim)}
    for name in craft_optim.__all__:
        found = getattr(craft_optim, name)
        if isinstance(found, ModuleType):
            assert found is import_module(f"craft_optim.{name}")
    with pytest.raises(AttributeError, match="module 'craft_optim' has no attribute 'CraftOptimiser'"):
        craft_optim.CraftOptimiser  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import craft_optim; assert 'torch' not in sys.modules; craft_optim.plan; assert 'torch' in sys.modules",
        "from craft_optim import *; CraftOptimizer, anchors.build, Rules",
        "import craft_optim.optimizer; craft_optim.anchors.LogitRetention, craft_optim.optimizer.CraftOptimizer",
        "from craft_optim import retention, Retention; assert retention.Retention is Retention",
        "from craft_optim.planning import plan; import craft_optim; assert craft_optim.plan is plan",
    ],
)
def test_in_a_new_process(code):
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True)
