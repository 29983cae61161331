"""CRaFT: fine-tune under the constraint that a pretrained model does not drift.

`CraftOptimizer` wraps any torch optimizer; `craft_optim.anchors` builds the cached snapshot that drift is measured
against.
"""

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
