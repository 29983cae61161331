"""Rules: the options of a retention step, checked once."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from craft_optim._numbers import number, whole

__all__ = ["Every", "GradientMemory", "Merge", "Projection", "Rules"]

Every = int | Literal["auto"]
Projection = Literal["violated", "always", "never"]
Merge = Literal["weighted", "equal", "task_priority"]
GradientMemory = Literal["copy", "bfloat16", "host"]
_CHOICES = {"projection": Projection, "merge": Merge, "gradient_memory": GradientMemory}


@dataclass(frozen=True)
class Rules:
    """Rules for when retention runs and how its gradients are merged with the task's.

    `CraftOptimizer` takes these as keywords and keeps them as `optimizer.rules`; lerobot's flags have the same names.

    Attributes:
        rho: Cap on the retention gradient's share: lambda |g_r| <= rho K |g_t| on a pass that stands for K steps; with
            dual="pi" half of that averaged over many passes, so that rho < 2 may leave drift above epsilon. `math.inf`
            turns it off. The projection, at most |g_t|, is not counted.
        projection: Times of the projection: "violated" (only while drift is above epsilon), "always", or "never".
        conflict_threshold: *Cosine* of the gradients below which the projection acts; in [-1, 1], with several
            constraints in [-1, 0].
        merge: Rule of the merge: "weighted", "equal" or "task_priority".
        retention_every: Steps per pass. "auto": as drift needs it, from every step to every tenth. Or K: every K-th
            step, beginning with the first, whatever happens between. Other steps are the base's alone.
        total_steps: Length of the run in optimizer steps, so that "auto" has a pass on its last one; None if unknown.
        trust_region: Multiple of epsilon that no step may lead beyond, 1 at the start of a run; None to check no step.
            A longer step is shortened: theta goes back along it until the drift just meets the bound, with L_ret's root
            taken as linear along the step. A step that might come near costs a copy of the trained parameters and two
            forwards on anchors, before and after the base's step, without a backward; at the start, four. Closures that
            are plain functions, and bases that move the parameters to evaluate a closure, have no trust region.
        max_grad_norm: Cap on the norm of the merged gradient on retention steps; None for no cap. The steps between are
            not clipped: clip task gradients as usual, before `step`.
        gradient_memory: Storage of the task gradients from the retention pass until the base has stepped; see the
            table.

    For N elements of float32, beyond the base optimizer's own peak:

    | `gradient_memory` | they wait | in the pass | in the base's step | error | cost |
    |---|---|---|---|---|---|
    | "copy" | where they are | N | N | none | none |
    | "bfloat16" | rounded | N/2 | N/2 | at most 2^-8 of an element | 2 conversions |
    | "host" | in host memory | 0 | 0; N in between, for the merge | none | 3 transfers |

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is out of its range, or a name is unknown.
    """

    rho: float = 3.0
    projection: Projection = "violated"
    conflict_threshold: float = 0.0
    merge: Merge = "weighted"
    retention_every: Every = "auto"
    total_steps: int | None = None
    trust_region: float | None = 3.0
    max_grad_norm: float | None = None
    gradient_memory: GradientMemory = "copy"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(choices):
                allowed = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"`{name}` must be one of {allowed}. Found {name}={value!r}.")
        found = {
            "conflict_threshold": number("conflict_threshold", self.conflict_threshold),
            "rho": number("rho", self.rho, least=0.0, above=True, finite=False),
        }
        if isinstance(self.retention_every, str) and self.retention_every != "auto":
            raise ValueError(
                f"`retention_every` must be 'auto' or a whole number. Found retention_every={self.retention_every!r}."
            )
        if self.retention_every != "auto":
            found["retention_every"] = whole("retention_every", self.retention_every)
        if self.total_steps is not None:
            found["total_steps"] = whole("total_steps", self.total_steps)
        if self.max_grad_norm is not None:
            found["max_grad_norm"] = number(
                "max_grad_norm", self.max_grad_norm, least=0.0, above=True, finite=False, or_else=", or None"
            )
        if self.trust_region is not None:
            found["trust_region"] = number(
                "trust_region", self.trust_region, least=1.0, above=True, or_else=", or None"
            )
        for name, value in found.items():
            object.__setattr__(self, name, value)
        if not -1.0 <= self.conflict_threshold <= 1.0:
            raise ValueError(
                f"`conflict_threshold` is a cosine and must be in [-1, 1]. Found {self.conflict_threshold!r}."
            )

    @property
    def most(self) -> float:
        """The largest multiplier that `merge` does not cut off."""
        return 1.0 if self.merge == "task_priority" else math.inf

    def check_for(self, constraints: int) -> None:
        """Raises ValueError if these rules do not allow that many constraints."""
        if constraints > 1 and (found := self.conflict_threshold) > 0.0:
            raise ValueError(
                "`conflict_threshold` must be <= 0 with several constraints: to remove what helps one of them may "
                f"harm another. Found {found!r}."
            )
