"""Planning: memory, disk and operations of a run, counted before it from shapes alone, without weights."""

from craft_optim.planning.gpus import Fit
from craft_optim.planning.make import plan
from craft_optim.planning.phases import Pass, Phases
from craft_optim.planning.result import Plan

__all__ = ["Fit", "Pass", "Phases", "Plan", "plan"]
