"""The pieces of one step as functions, for people who write their own loop.

Example:
    >>> import torch
    >>> from craft_optim.functional import project_and_merge_
    >>> task, retention = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    >>> gram = project_and_merge_(task, retention, lam=0.0)
    >>> gram.tr, retention[0].tolist()
    (-1.0, [0.5, 0.5])
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from craft_optim._step.decision import Gram, Products, decide
from craft_optim._step.gradients import Gradients
from craft_optim._step.rules import Rules
from craft_optim._step.surgery import GradientSets
from craft_optim.dual import Controller, Update
from craft_optim.schedules import epsilon_at

__all__ = ["Gram", "epsilon_at", "gram", "project_and_merge_", "project_and_merge_several_", "update_multiplier"]


_DEFAULT = Rules()


def gram(task_grads: Gradients, retention_grads: Gradients) -> Gram:
    """Inner products of two lists of gradients of equal length; entries may be None (zero).

    Sums are formed in float32 or wider. Cost: 2N element reads and one read of the device.

    Returns:
        `Gram` with `tt`, `rr`, `tr` and `cos` as Python floats.

    Raises:
        ValueError: If the lists differ in length, or a pair in its number of elements.
    """
    with torch.no_grad():
        return GradientSets(task_grads, [retention_grads]).inner_products()[0].grams[0]


def project_and_merge_(
    task_grads: Gradients, retention_grads: Gradients, *, lam: float, project: bool = True, **rules: Any
) -> Gram:
    """Writes the merged gradient a g_t + w g_r into `retention_grads` and returns what it measured.

    See docs/method.md for the formula. Entries that cannot be written into are replaced: a missing retention gradient
    becomes the task gradient (times a). With lam = 0, project and threshold 0 this is A-GEM (Chaudhry et al. 2019,
    arXiv:1812.00420).

    Args:
        task_grads: Task gradients; not changed.
        retention_grads: Retention gradients, of the same length and shapes; overwritten.
        lam: The multiplier, >= 0.
        project: True to remove the conflicting component.
        rules: Fields of `craft_optim.Rules` that say how to merge, such as `merge`.

    Raises:
        ValueError: If lam is negative, a rule is invalid, the lists differ in length or a pair in its number of
            elements, or a gradient is not finite; the gradients are then unchanged.
    """
    if not lam >= 0.0:
        raise ValueError(f"`lam` must be >= 0. Found lam={lam!r}.")
    return _merge_(task_grads, [retention_grads], [lam], [project], rules).grams[0]


def project_and_merge_several_(
    task_grads: Gradients,
    retention_grads: Sequence[Gradients],
    *,
    lams: Sequence[float],
    project: Sequence[bool] | None = None,
    **rules: Any,
) -> NDArray[np.float64]:
    """Writes the merged gradient a g_t + sum_j w_j g_j into the last of `retention_grads`; overwrites the others.

    See docs/constraints.md for the formula and the cost. With lams of 0 this is GEM (Lopez-Paz & Ranzato 2017,
    arXiv:1706.08840).

    Args:
        task_grads: Task gradients; not changed.
        retention_grads: Retention gradients of each constraint, as for `project_and_merge_`.
        lams: The multipliers, >= 0.
        project: For each constraint, True to remove the component that conflicts with it; None for all.
        rules: Fields of `craft_optim.Rules`, as for `project_and_merge_`.

    Returns:
        The inner products of all gradients, `[m + 1, m + 1]`; the task's are the first.

    Raises:
        ValueError: As `project_and_merge_`, or if the numbers of lists, lams and project differ.

    Example:
        >>> import torch
        >>> task = [torch.tensor([-1.0, -1.0])]
        >>> retention = [[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])]]
        >>> products = project_and_merge_several_(task, retention, lams=[0.5, 0.0])
        >>> products[0].tolist(), retention[-1][0].tolist()
        ([2.0, -1.0, -2.0], [0.5, 0.0])
    """
    project = [True] * len(lams) if project is None else project
    if not len(retention_grads) == len(lams) == len(project) > 0:
        raise ValueError(
            "`retention_grads`, `lams` and `project` must have one entry per constraint. Found "
            f"{len(retention_grads)}, {len(lams)} and {len(project)}."
        )
    if not all(lam >= 0.0 for lam in lams):
        raise ValueError(f"`lams` must be >= 0. Found lams={lams!r}.")
    return _merge_(task_grads, retention_grads, lams, project, rules).matrix


@torch.no_grad()
def _merge_(
    task: Gradients, retention: Sequence[Gradients], lams: Sequence[float], project: Sequence[bool], given: Any
) -> Products:
    """Writes the merged gradient into the last of `retention`."""
    rules = Rules(**given) if given else _DEFAULT
    rules.check_for(len(retention))
    sets = GradientSets(task, retention)
    products, _ = sets.inner_products()
    if not products.finite:
        raise ValueError(f"The gradients hold NaN or inf: inner products {products.matrix.tolist()}. Skip this step.")
    retention[-1][:] = sets.merge_(decide(products, lams=lams, project=project, rules=rules).merges)
    return products


def update_multiplier(
    controller: Controller,
    state: Mapping[str, float],
    *,
    loss: float,
    epsilon: float,
    cap: float = float("inf"),
    unit: float = 1.0,
    steps: int = 1,
) -> Update:
    """Runs one update of a controller of `craft_optim.dual`: (multiplier, next state, capped). Pure.

    Args:
        state: `controller.initial_state()` at first, then the last `Update.state`.
        cap: Upper bound of the multiplier on this step, for example rho K |g_t| / |g_r|.
        unit: |g_t| / |g_r|, the unit of lambda in "pi"; 0 or infinite if a gradient is missing.
        steps: K, the steps that this pass stands for.
    """
    return controller(state, loss=loss, epsilon=epsilon, cap=cap, unit=unit, steps=steps)
