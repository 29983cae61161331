"""Numbers as users have them, and what is none."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from craft_optim import Constraint, CraftOptimizer, Rules, schedules
from craft_optim.anchors.sampling import AnchorSampler
from craft_optim.dual import AugmentedLagrangian, DualAscent, MultiplicativePI, NuPI

REAL = [0.25, np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25), Fraction(1, 4)]
WHOLE = [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)]
NO_NUMBERS = [True, np.bool_(True), torch.tensor(True), "1", [1.0], torch.ones(2), 1j]


def optimizer(**settings):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return CraftOptimizer(torch.optim.SGD([p], lr=0.1), lambda: p.square().sum(), **settings)


REALS = {
    "epsilon": lambda x: optimizer(epsilon=x).constraints[None].schedule(0),
    "epsilon of a constraint": lambda x: Constraint(sum, x).schedule(0),
    "Constant": lambda x: schedules.Constant(x).value,
    "Linear": lambda x: schedules.Linear(x, 0.1, 5).start,
    "Exponential": lambda x: schedules.Exponential(0.5, x, 5).end,
    "rho": lambda x: Rules(rho=x).rho,
    "max_grad_norm": lambda x: Rules(max_grad_norm=x).max_grad_norm,
    "conflict_threshold": lambda x: Rules(conflict_threshold=x).conflict_threshold,
    "pi": lambda x: MultiplicativePI(ki=x).ki,
    "ascent": lambda x: DualAscent(learning_rate=x).learning_rate,
    "nupi": lambda x: NuPI(nu=x).nu,
    "augmented": lambda x: AugmentedLagrangian(penalty=x).penalty,
}
COUNTS = {
    "retention_every": lambda x: Rules(retention_every=x).retention_every,
    "steps": lambda x: schedules.Linear(1.0, 0.1, x).steps,
    "batch_size": lambda x: AnchorSampler(10, x).batch_size,
    "seed": lambda x: AnchorSampler(10, 2, x).seed,
}


@pytest.mark.parametrize("of", REALS)
def test_a_real_number_of_any_kind_is_one(of):
    for value in REAL:
        found = REALS[of](value)
        assert type(found) is float
        assert found == 0.25
    for value in NO_NUMBERS:
        with pytest.raises(TypeError, match="must be a number"):
            REALS[of](value)


@pytest.mark.parametrize("of", COUNTS)
def test_a_whole_number_of_any_kind_is_one(of):
    for value in WHOLE:
        found = COUNTS[of](value)
        assert type(found) is int
        assert found == 4
    for value in (*NO_NUMBERS, 2.0, np.float32(2.0), None):
        with pytest.raises(ValueError, match=r"must be ('auto' or )?a whole number"):
            COUNTS[of](value)


def test_a_schedule_may_return_any_kind():
    for value in REAL:
        craft = optimizer(epsilon=lambda step, value=value: value)
        craft.step()
        assert craft.metrics["epsilon"] == 0.25
    craft = optimizer(epsilon=lambda step: "small")
    with pytest.raises(TypeError, match=r"`epsilon\(0\)` must be a number"):
        craft.step()
