import itertools
import math

import pytest

from craft_optim.schedules import Constant, Cosine, Exponential, Linear, as_schedule, epsilon_at

RAMPS = [Linear, Cosine, Exponential]


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_start_and_end_exactly_and_stay_there(ramp):
    schedule = ramp(1.0, 0.1, 40)
    assert schedule(0) == pytest.approx(1.0, abs=0, rel=1e-15)
    assert schedule(40) == pytest.approx(0.1, abs=0, rel=1e-15)
    assert schedule(4000) == schedule(40)
    values = [schedule(t) for t in range(41)]
    assert all(a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("ramp", "quarter"),
    [
        (Linear, 1.0 - 0.9 * 0.25),
        (Cosine, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
        (Exponential, 0.1**0.25),
    ],
)
def test_ramps_follow_their_formula(ramp, quarter):
    assert ramp(1.0, 0.1, 40)(10) == pytest.approx(quarter, rel=1e-14)


def test_an_exponential_reaches_its_end():
    # One earlier implementation only approached it.
    assert Exponential(0.5, 0.05, 7)(7) == pytest.approx(0.05, rel=1e-14)


def test_a_number_is_constant_and_a_callable_stays_itself():
    assert as_schedule(0.05) == Constant(0.05)
    assert as_schedule(1)(10**9) == 1.0

    def own(step: int) -> float:
        return 0.5 / (1 + step)

    assert as_schedule(own) is own
    assert epsilon_at(own, 4) == 0.1


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_values_are_refused_with_the_value(bad):
    with pytest.raises(ValueError, match=f"Found epsilon={bad!r}"):
        as_schedule(bad)
    with pytest.raises(ValueError, match="start"):
        Linear(bad, 0.1, 10)
    with pytest.raises(ValueError, match="end"):
        Cosine(0.1, bad, 10)
    with pytest.raises(ValueError, match=r"epsilon\(3\)"):
        epsilon_at(lambda step: bad, 3)


@pytest.mark.parametrize("ends", [(0.0, 0.1), (0.1, 0.0)])
def test_an_exponential_needs_positive_ends(ends):
    with pytest.raises(ValueError, match="> 0"):
        Exponential(*ends, 10)


def test_no_drift_at_all_may_be_asked_for():
    assert as_schedule(0.0)(7) == Linear(1.0, 0.0, 10)(10) == Cosine(0.0, 1.0, 10)(0) == 0.0
    with pytest.raises(ValueError, match=r"finite number >= 0\."):
        Linear(-0.1, 0.1, 10)


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_ramp_needs_steps(ramp):
    with pytest.raises(ValueError, match="steps=0"):
        ramp(1.0, 0.1, 0)
    assert [ramp(1.0, 0.1, 1)(step) for step in (0, 1)] == pytest.approx([1.0, 0.1], rel=1e-15)


@pytest.mark.parametrize("bad", ["0.05", None, True])
def test_epsilon_of_another_type_is_refused(bad):
    with pytest.raises(TypeError, match=type(bad).__name__):
        as_schedule(bad)
