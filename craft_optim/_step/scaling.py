"""Scaling: a private loss scale for retention passes in float16, whose small gradients would round to zero.

The backward runs on S * L_ret, S a power of two; the merge's coefficients divide it out, so no gradient is read or
written for it. When gradients overflow, S shrinks and the pass is repeated; after many passes without overflow S grows.
A GradScaler does the same for the task; it never sees retention gradients.
"""

from collections.abc import Mapping
from operator import attrgetter

from torch import float16

from .gradients import Graph

__all__ = ["grown", "initial_scale", "reaches_float16", "shrunk"]

_DTYPE = attrgetter("dtype")
# S starts like torch's GradScaler; it shrinks faster, as a repeated pass costs more than a skipped step.
_INITIAL = 2.0**16
_SHRINK = 2.0**-4
_INTERVAL = 2000
_LARGEST = 2.0**64


def initial_scale() -> dict[str, float]:
    """S, and the number of passes since it last changed."""
    return {"craft_scale": _INITIAL, "craft_scale_passes": 0.0}


def shrunk(state: Mapping[str, float]) -> dict[str, float]:
    """The floats after an overflow: S / 16, but at least 1."""
    return {"craft_scale": max(1.0, state["craft_scale"] * _SHRINK), "craft_scale_passes": 0.0}


def grown(state: Mapping[str, float]) -> dict[str, float]:
    """The floats after a finite pass: 2 S if it was the 2000th in a row."""
    passes = state["craft_scale_passes"] + 1.0
    if passes < _INTERVAL:
        return {"craft_scale": state["craft_scale"], "craft_scale_passes": passes}
    return {"craft_scale": min(_LARGEST, state["craft_scale"] * 2.0), "craft_scale_passes": 0.0}


def reaches_float16(graph: Graph) -> bool:
    """True if any gradient in the graph is float16, or may be: a reentrant checkpoint hides its operations."""
    if float16 in map(_DTYPE, graph.written):
        return True
    for node in graph.inner:  # a loop, as it visits every node at every pass
        if hasattr(node, "run_function"):
            return True
        for output in node._input_metadata:
            if output.dtype == float16:
                return True
    return False
