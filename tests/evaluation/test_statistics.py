"""Intervals and paired tests, against published and hand-made numbers and against scipy's own."""

import builtins
import math

import numpy as np
import pytest

from craft_optim.evaluation.statistics import mcnemar, mean_interval, paired_difference, wilson

stats = pytest.importorskip("scipy.stats", reason="pip install 'craft-optim[evaluation]'")


def by_hand(successes, trials, z=1.959963984540054):
    middle = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return middle - half, middle + half


@pytest.mark.parametrize(("successes", "trials"), [(8, 10), (0, 10), (10, 10), (1, 1), (61, 120)])
def test_wilson_is_its_formula(successes, trials):
    assert wilson(successes, trials) == pytest.approx(by_hand(successes, trials))
    low, high = wilson(successes, trials, 0.5)
    assert high - low < wilson(successes, trials)[1] - wilson(successes, trials)[0]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_cannot_be_counted(successes, trials):
    with pytest.raises(ValueError, match=f"Found successes={successes}, trials={trials}"):
        wilson(successes, trials)


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(0.3, 2.0, 17)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert mean_interval(list(values), 0.9) == pytest.approx((expected.low, expected.high))
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert mean_interval([2.0]) is None
    assert mean_interval([]) is None


def test_mcnemar_counts_the_binomial_tail():
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(0, 0) == 1.0
    with pytest.raises(ValueError, match="lost=-1"):
        mcnemar(-1, 0)


def test_the_paired_difference_is_newcombes():
    # His own example, of which he gives the interval 0.0569 to 0.3404 for the first's minus the second's.
    assert paired_difference(36, 12, 2, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    low, high = paired_difference(36, 2, 12, 0)
    assert (-high, -low) == pytest.approx(paired_difference(36, 12, 2, 0))


@pytest.mark.parametrize(
    "counts", [(20, 0, 0, 0), (0, 0, 0, 7), (10, 0, 0, 10), (0, 5, 5, 0), (30, 9, 0, 1), (0, 9, 0, 0)]
)
def test_the_paired_difference_has_a_width_and_its_estimate_within(counts):
    _, lost, won, _ = counts
    low, high = paired_difference(*counts)
    assert -1.0 - 1e-12 <= low <= (won - lost) / sum(counts) <= high <= 1.0 + 1e-12
    assert high - low > 0.05


def test_the_paired_difference_covers_the_truth():
    rng = np.random.default_rng(1)
    shares = [0.55, 0.15, 0.05, 0.25]
    draws = rng.multinomial(40, shares, size=400)
    covered = [low <= shares[2] - shares[1] <= high for low, high in (paired_difference(*map(int, d)) for d in draws)]
    assert 0.92 <= np.mean(covered) <= 0.985


def test_the_paired_difference_refuses_nothing_and_less():
    for counts in ((0, 0, 0, 0), (1, -1, 1, 1)):
        with pytest.raises(ValueError, match="Counts must be"):
            paired_difference(*counts)


def test_without_scipy_it_says_what_to_install(monkeypatch):
    genuine = builtins.__import__

    def refuse(name, *args, **settings):
        if name == "scipy":
            raise ImportError("no scipy")
        return genuine(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"craft-optim\[evaluation\]"):
        wilson(1, 2)
