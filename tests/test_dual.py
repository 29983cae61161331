import math
import random

import pytest

from craft_optim.dual import AugmentedLagrangian, DualAscent, MultiplicativePI, NuPI, make_controller

NAMES = ["pi", "ascent", "nupi", "augmented_lagrangian"]
CONTROLLERS = [MultiplicativePI, DualAscent, NuPI, AugmentedLagrangian]


def run(controller, losses, epsilon, cap=math.inf, **more):
    state, updates = controller.initial_state(), []
    for loss in losses:
        updates.append(controller(state, loss=loss, epsilon=epsilon, cap=cap, **more))
        state = updates[-1].state
    return updates


def by_hand(losses, epsilon, units, intervals, initial=1.0, ki=0.1, kp=1.0):
    """The rule of the docstring, written down once more: the multipliers, the shares and the average units."""
    share, log_unit, passes, before = initial, 0.0, 0, 1
    found = []
    for loss, unit, steps in zip(losses, units, intervals, strict=True):
        if passes or loss >= epsilon / 2:
            passes += 1
        weight = max(0.1, 10 / (10 + passes))  # of this pass in the average
        log_unit = (1 - weight) * log_unit + weight * math.log(unit)
        error = min(max(math.log(loss / epsilon), -4.0), 2.0)
        multiplier = steps * share * (loss / epsilon if -4.0 < error < 2.0 else math.exp(error)) ** kp
        excess = min(max(loss / epsilon - 1.0, -1.0), 30.0)
        share = min(max(share * math.exp(min(ki * before * excess, 3.0)), 1e-3), 1e6)
        before = steps
        found.append((multiplier * math.exp(log_unit), share, math.exp(log_unit)))
    return found


def test_pi_follows_its_formula():
    losses = [1e-7, 0.01, 0.03, 0.2, 0.06, 0.9, 0.05, 0.04, *[0.05] * 120]
    units = [1e9, 300.0, 20.0, 2.0, 3.0, 0.5, 1.0, 4.0, *[2.0, 8.0] * 60]
    intervals = [1, 1, 1, 3, 2, 1, 10, 5, *[4] * 120]
    pi = MultiplicativePI(initial=2.0, ki=0.05, kp=0.5)
    state = pi.initial_state()
    expected = by_hand(losses, 0.05, units, intervals, 2.0, 0.05, 0.5)
    for loss, unit, steps, (multiplier, share, average) in zip(losses, units, intervals, expected, strict=True):
        update = pi(state, loss=loss, epsilon=0.05, unit=unit, steps=steps)
        state = update.state
        assert update.multiplier == pytest.approx(multiplier, rel=1e-9)
        assert state["integral"] == pytest.approx(share, rel=1e-9)
        assert math.exp(state["log_unit"]) == pytest.approx(average, rel=1e-9)
        assert not update.capped
    assert 3.7 < math.exp(state["log_unit"]) < 4.3, "of 2 and 8 in turn, in the logarithm"


@pytest.mark.parametrize(
    ("loss", "proportional", "integral"),
    [(1e9, 2.0, 30.0), (0.1, math.log(2.0), 1.0), (1e-9, -4.0, -1.0), (0.0, -4.0, -1.0)],
)
def test_pi_clips_the_error(loss, proportional, integral):
    (update,) = run(MultiplicativePI(), [loss], 0.05)
    assert update.multiplier == pytest.approx(math.exp(proportional))
    assert update.state["integral"] == pytest.approx(math.exp(0.1 * integral))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_pi_does_not_care_about_the_unit_of_the_loss(scale):
    losses = [0.2, 0.1, 0.04, 0.05]
    plain = [u.multiplier for u in run(MultiplicativePI(), losses, 0.05)]
    scaled = [u.multiplier for u in run(MultiplicativePI(), [x * scale for x in losses], 0.05 * scale)]
    assert scaled == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_multiplier_of_pi_is_in_the_unit_of_the_gradients(scale):
    """A task loss times c, or L_ret and epsilon divided by c: each multiplier is c times as large."""
    losses, units = [1e-4, 0.02, 0.2, 0.1, 0.04, 0.05], [40.0, 5.0, 2.0, 1.0, 3.0, 2.0]
    runs = []
    for factor in (1.0, scale):
        state, found = MultiplicativePI().initial_state(), []
        for loss, unit in zip(losses, units, strict=True):
            update = MultiplicativePI()(state, loss=loss, epsilon=0.05, unit=unit * factor)
            state = update.state
            found.append((update.multiplier / factor, state["integral"]))
        runs.append(found)
    for plain, scaled in zip(*runs, strict=True):
        assert scaled[1] == plain[1], "retention's share has no unit"
    # The first pass's unit is all that is known then: so the factor is there from the first.
    assert [x for x, _ in runs[1]] == pytest.approx([x for x, _ in runs[0]], rel=1e-9)


def test_a_pass_of_pi_weighs_as_much_as_the_steps_that_it_stands_for():
    pi = MultiplicativePI()
    one, ten = (run(pi, [0.06], 0.05, steps=steps)[0] for steps in (1, 10))
    assert ten.multiplier == pytest.approx(10.0 * one.multiplier)
    assert ten.state["integral"] == one.state["integral"], "the steps to come say nothing of this batch"
    after = run(pi, [0.05, 0.06], 0.05, steps=10)[-1].state["integral"]
    assert after == pytest.approx(run(pi, [0.06] * 10, 0.05)[-1].state["integral"]), "those before it do"


@pytest.mark.parametrize("steps", [1, 4])
def test_a_least_share_bounds_lambda_of_pi_from_below(steps):
    dual, alone = MultiplicativePI(least_share=0.3), MultiplicativePI()
    state = dual.initial_state()
    within = {"loss": 1e-3, "epsilon": 0.1, "cap": 20.0, "unit": 2.0, "steps": steps}  # far below epsilon
    assert alone(state, **within).multiplier < 0.6 * steps
    assert dual(state, **within) == alone(state, **within)._replace(multiplier=pytest.approx(0.6 * steps))
    assert dual(state, **(within | {"cap": 0.1})).multiplier == pytest.approx(0.1)
    above = within | {"loss": 0.2}
    assert dual(state, **above) == alone(state, **above)
    nothing = {"loss": 0.0, "epsilon": 0.1, "unit": math.inf}  # of a gradient that is zero
    assert dual(state, **nothing) == alone(state, **nothing)


def test_the_share_of_pi_grows_while_lambda_is_held_down_and_not_beyond_three_times_the_cap():
    """A batch that is heavy by chance has a small cap: to leave it out would move the mean above epsilon."""
    capped = run(MultiplicativePI(), [0.2] * 20, 0.05, cap=6.0, unit=2.0, steps=1)
    assert all(update.capped and update.multiplier == 6.0 for update in capped)
    assert capped[0].state["integral"] == pytest.approx(math.exp(0.3))
    assert capped[-1].state["integral"] == pytest.approx(9.0), "3 x 6 / 2"
    assert run(MultiplicativePI(20.0), [0.2], 0.05, cap=6.0, unit=2.0)[0].state["integral"] == 20.0, "nor less"
    assert run(MultiplicativePI(), [0.2], 0.05, cap=0.0, unit=math.inf)[0].state["integral"] == 1.0, "no gradient"


def test_the_cap_of_pi_is_for_single_passes_and_half_of_it_lasts():
    """Drift that no multiplier lowers shall not take the whole of what is learned."""
    path = run(MultiplicativePI(), [0.1] * 400, 0.05, cap=6.0, unit=2.0, steps=1)
    assert path[20].multiplier == 6.0
    later = path[200:]
    assert sum(update.multiplier for update in later) / len(later) == pytest.approx(3.0, rel=0.05)
    assert all(update.capped for update in later), "nothing binds without a word"
    without = run(MultiplicativePI(), [0.1] * 400, 0.05, unit=2.0, steps=1)
    assert without[-1].state["used"] == 0.0, "no cap, no half of it"
    assert without[-1].state["integral"] == 1e6


def test_the_integral_of_pi_rests_where_the_mean_is_epsilon():
    """Noise whose mean is epsilon moves it nowhere in the long run; its logarithm, whose mean is below, would."""
    draws = random.Random(0)
    for spread in (0.25, 0.5):
        losses = [0.05 * math.exp(spread * draws.gauss(0, 1) - spread**2 / 2) for _ in range(20000)]
        mean = sum(losses) / len(losses) / 0.05 - 1.0
        (last,) = run(MultiplicativePI(ki=1e-3), losses, 0.05)[-1:]
        assert math.log(last.state["integral"]) == pytest.approx(20.0 * mean, abs=1e-6), "no draw is clipped"
        drawn = sum(math.log(x / 0.05) for x in losses) * 1e-3
        assert abs(20.0 * mean) < abs(drawn) / 4, "the mean of the logarithm is -spread^2 / 2"


def test_pi_bounds_and_zero_epsilon():
    assert run(MultiplicativePI(), [1e3] * 200, 0.05)[-1].state["integral"] == 1e6
    assert run(MultiplicativePI(), [1e3] * 200, 0.05)[-1].capped, "at the largest share it has come to its end"
    assert run(MultiplicativePI(), [1e-12] * 500, 0.05)[-1].state["integral"] == 1e-3
    (update,) = run(MultiplicativePI(), [0.1], 0.0)
    assert update.multiplier == pytest.approx(math.exp(2.0))
    assert update.state["integral"] == pytest.approx(math.exp(3.0))
    (update,) = run(MultiplicativePI(), [0.0], 0.0)
    assert update.multiplier == pytest.approx(math.exp(-4.0))
    assert update.state["integral"] == pytest.approx(math.exp(-0.1))


@pytest.mark.parametrize("unit", [0.0, math.inf, 1e-154, 1e154])
@pytest.mark.parametrize("epsilon", [0.0, 1e-300, 0.05, 1e300])
@pytest.mark.parametrize("loss", [-1.0, 0.0, 5e-324, 1e-6, 1e300])
def test_pi_is_finite_whatever_it_is_told(loss, epsilon, unit):
    updates = run(MultiplicativePI(), [loss] * 300, epsilon, unit=unit, steps=10)
    for update in updates:
        assert all(map(math.isfinite, [update.multiplier, *update.state.values()]))
        assert update.multiplier >= 0.0
    if unit in (0.0, math.inf):
        assert updates[-1].state["log_unit"] == 0.0, "no gradient, no unit"


def test_pi_has_no_bound_in_the_unit_of_a_loss():
    for bound in ("maximum", "minimum"):
        with pytest.raises(TypeError, match=bound):
            MultiplicativePI(**{bound: 3.0})
    with pytest.raises(ValueError, match=r"Found maximum=3\.0: set `rho`"):
        make_controller("pi", maximum=3.0)


@pytest.mark.parametrize("name", ["nupi", "augmented_lagrangian"])
def test_no_windup_while_capped(name):
    controller = make_controller(name)
    updates = run(controller, [10.0] * 50, 0.05, cap=0.5)
    assert all(u.capped and u.multiplier == 0.5 for u in updates)
    memory = {"nupi": "integral", "augmented_lagrangian": "multiplier"}[name]
    assert updates[-1].state[memory] == controller.initial_state()[memory]
    # Falling is allowed under the cap.
    assert run(controller, [0.001] * 5, 0.05, cap=1e-3)[-1].state[memory] < 1.0


@pytest.mark.parametrize("name", ["nupi", "augmented_lagrangian"])
def test_a_small_violation_winds_nothing_up_while_capped(name):
    (update,) = run(make_controller(name), [0.06], 0.05, cap=0.5)
    remembered, *_ = update.state.values()
    assert update.capped
    assert remembered == 1.0


@pytest.mark.parametrize("make", CONTROLLERS)
def test_a_cap_counts_where_it_holds_the_multiplier_down(make):
    controller = make(initial=2.0)
    free = controller(controller.initial_state(), loss=0.5, epsilon=0.5)  # on the constraint: nothing moves
    assert (free.multiplier, free.capped) == (2.0, False)
    for cap, held in [(2.0, False), (1.5, True)]:
        (update,) = run(controller, [0.5], 0.5, cap=cap)
        assert (update.multiplier, update.capped) == (cap, held)
        used = {"used": pytest.approx(0.03)} if "used" in free.state else {}  # of "pi", which has used the whole
        assert update.state == free.state | used


def test_ascent_is_the_published_rule():
    ascent = DualAscent(1.0, 0.01, 10.0)
    first, second, third = run(ascent, [3.0, 0.2, 0.2], 1.0)
    assert first.multiplier == 1.0
    assert second.multiplier == pytest.approx(1.0 + 0.01 * 2.0)
    assert third.multiplier == pytest.approx(1.0 + 0.01 * 2.0 - 0.01 * 0.8)
    assert run(ascent, [1e6] * 3, 1.0)[-1].multiplier == 10.0
    assert run(ascent, [0.0] * 300, 1.0)[-1].multiplier == 0.0


def test_nupi_seeds_its_average_with_the_first_violation():
    nupi = NuPI(initial=1.0, ki=0.0, kp=1.0, nu=0.9)
    first, second = run(nupi, [0.55, 0.05], 0.05)
    assert first.multiplier == pytest.approx(1.5)  # an average that starts at 0 would give 1.05
    assert second.multiplier == pytest.approx(1.0 + 0.9 * 0.5)


def test_nupi_by_hand():
    nupi = NuPI(initial=1.0, ki=0.5, kp=2.0, nu=0.75)
    updates = run(nupi, [1.5, 3.0, 0.0], 1.0)  # violations 0.5, 2, -1; their averages 0.5, 0.875, 0.40625
    assert [u.multiplier for u in updates] == [1.25 + 1.0, 2.25 + 1.75, 1.75 + 0.8125]
    assert updates[-1].state == {"integral": 1.75, "average": 0.40625, "seeded": 1.0}
    (update,) = run(NuPI(ki=0.0, kp=5.0), [0.0], 1.0)
    assert update.multiplier == 0.0, "1 - 5 is held at 0"


def test_nupi_with_nu_zero_is_a_pi_controller():
    losses = [0.3, 0.1, 0.02]
    updates = run(NuPI(initial=1.0, ki=0.5, kp=2.0, nu=0.0), losses, 0.05)
    errors = [x - 0.05 for x in losses]
    for t, update in enumerate(updates):
        assert update.multiplier == pytest.approx(1.0 + 0.5 * sum(errors[: t + 1]) + 2.0 * errors[t])


def test_augmented_lagrangian_is_the_gradient_of_its_penalty():
    al = AugmentedLagrangian(initial=0.5, learning_rate=0.2, penalty=3.0)
    first, second = run(al, [0.4, 0.01], 0.1)
    assert first.multiplier == pytest.approx(0.5 + 3.0 * 0.3)
    assert second.multiplier == pytest.approx(max(0.0, 0.5 + 0.2 * 0.3 - 3.0 * 0.09))
    assert run(al, [0.0], 1.0)[0].multiplier == 0.0


@pytest.mark.parametrize(
    ("controller", "state"),
    [
        (MultiplicativePI(0.5), {"integral": 0.5, "log_unit": 0.0, "passes": 0.0, "steps": 1.0, "used": 0.0}),
        (MultiplicativePI(1e9), {"integral": 1e6, "log_unit": 0.0, "passes": 0.0, "steps": 1.0, "used": 0.0}),
        (DualAscent(0.5), {"multiplier": 0.5}),
        (NuPI(0.5), {"integral": 0.5, "average": 0.0, "seeded": 0.0}),
        (AugmentedLagrangian(0.5), {"multiplier": 0.5}),
        *[(make(initial=5.0, maximum=3.0), None) for make in CONTROLLERS[1:]],
    ],
)
def test_a_run_starts_at_the_initial_multiplier(controller, state):
    found = controller.initial_state()
    assert found == state if state else 3.0 in found.values()


@pytest.mark.parametrize("name", NAMES)
def test_controllers_are_pure_and_their_state_is_finite_floats(name):
    controller = make_controller(name)
    state = controller.initial_state()
    before = dict(state)
    a = controller(state, loss=0.3, epsilon=0.1)
    b = controller(state, loss=0.3, epsilon=0.1)
    assert state == before
    assert a == b
    assert set(a.state) == set(state)
    assert all(type(v) is float and math.isfinite(v) for v in [*state.values(), *a.state.values()])


def test_unknown_names_and_objects():
    with pytest.raises(ValueError, match="Found dual='pid'"):
        make_controller("pid")
    for neither in (3, lambda state, **measured: None, type("NoCall", (), {"initial_state": dict})()):
        with pytest.raises(TypeError, match=f"Found {type(neither).__name__}"):
            make_controller(neither)
    own = NuPI()
    assert make_controller(own) is own


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: MultiplicativePI(initial=0.0), "initial"),
        (lambda: MultiplicativePI(ki=-1.0), "ki"),
        (lambda: MultiplicativePI(least_share=-0.1), "least_share"),
        (lambda: DualAscent(initial=-1.0), "initial"),
        (lambda: DualAscent(learning_rate=math.nan), "learning_rate"),
        (lambda: NuPI(nu=1.0), "nu"),
        (lambda: AugmentedLagrangian(penalty=0.0), "penalty"),
    ],
)
def test_bad_settings_name_themselves(build, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        build()


@pytest.mark.parametrize(
    ("make", "name", "least"),
    [
        (MultiplicativePI, "initial", "> 0"),
        (MultiplicativePI, "ki", ">= 0"),
        (MultiplicativePI, "kp", ">= 0"),
        (DualAscent, "initial", ">= 0"),
        (DualAscent, "learning_rate", ">= 0"),
        (DualAscent, "maximum", ">= 0"),
        (NuPI, "initial", ">= 0"),
        (NuPI, "ki", ">= 0"),
        (NuPI, "kp", ">= 0"),
        (NuPI, "maximum", ">= 0"),
        (AugmentedLagrangian, "initial", ">= 0"),
        (AugmentedLagrangian, "learning_rate", ">= 0"),
        (AugmentedLagrangian, "penalty", "> 0"),
        (AugmentedLagrangian, "maximum", ">= 0"),
    ],
)
def test_settings_have_a_least_value(make, name, least):
    sign, bound = least.split()
    for bad in (-1.0, math.nan, math.inf, *([float(bound)] if sign == ">" else [])):
        message = f"^{make.__name__}: `{name}` must be a finite number {least}\\. Found {name}={bad!r}\\.$"
        with pytest.raises(ValueError, match=message):
            make(**{name: bad})
    for fine in (float(bound) + 1e-6, *([float(bound)] if sign == ">=" else [])):
        assert getattr(make(**{name: fine}), name) == fine


def test_defaults():
    assert MultiplicativePI() == MultiplicativePI(initial=1.0, ki=0.1, kp=1.0, least_share=0.0)
    assert DualAscent() == DualAscent(initial=1.0, learning_rate=0.1, maximum=1e4)
    assert NuPI() == NuPI(initial=1.0, ki=0.1, kp=1.0, nu=0.0, maximum=1e4)
    assert AugmentedLagrangian() == AugmentedLagrangian(initial=1.0, learning_rate=0.1, penalty=1.0, maximum=1e4)


def test_a_name_stands_for_its_class():
    assert [make_controller(name) for name in NAMES] == [make() for make in CONTROLLERS]
    assert make_controller("pi", initial=2.0, gain=0.0) == MultiplicativePI(2.0, ki=0.0)
    assert [make_controller(name, initial=0.0, gain=0.0, maximum=5.0) for name in NAMES[1:]] == [
        DualAscent(0.0, learning_rate=0.0, maximum=5.0),
        NuPI(0.0, ki=0.0, maximum=5.0),
        AugmentedLagrangian(0.0, learning_rate=0.0, maximum=5.0),
    ]
