"""CRaFT: fine-tune under the constraint that a pretrained model does not drift.

`CraftOptimizer` wraps any torch optimizer; `craft_optim.anchors` builds the cached snapshot that drift is measured
against.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from craft_optim import anchors, dual, functional, metrics, schedules
    from craft_optim._step.constraint import Constraint
    from craft_optim._step.rules import Rules
    from craft_optim.calibration import Calibration, calibrate
    from craft_optim.heldout import HeldOutDrift
    from craft_optim.optimizer import CraftOptimizer
    from craft_optim.planning import Plan, plan
    from craft_optim.retention import Retention, RetentionClosure

__all__ = [
    "Calibration",
    "Constraint",
    "CraftOptimizer",
    "HeldOutDrift",
    "Plan",
    "Retention",
    "RetentionClosure",
    "Rules",
    "anchors",
    "calibrate",
    "dual",
    "functional",
    "metrics",
    "plan",
    "schedules",
]

__version__ = "0.1.0"

_PLACES = {
    "Calibration": "calibration",
    "Constraint": "_step.constraint",
    "CraftOptimizer": "optimizer",
    "HeldOutDrift": "heldout",
    "Plan": "planning",
    "Retention": "retention",
    "RetentionClosure": "retention",
    "Rules": "_step.rules",
    "calibrate": "calibration",
    "plan": "planning",
}
"""Name -> module that defines it; all other names are modules themselves"""


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use: with torch, all names at once would cost each command 2 s."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PLACES.get(name, name)}")
    found = getattr(module, name) if name in _PLACES else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
