"""Numbers, shares and times as pages and tables write them."""

import math

import pytest

from craft_optim.report.numbers import duration, number, percent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.05239, "-0.0524"),
        (1.0, "1"),
        (0.9996, "1"),
        (44.23, "44.2"),
        (563.0, "563"),
        (1234.5, "1,230"),
        (75_000.0, "75,000"),
        (999_999.0, "1e6"),
        (1.5e5, "150,000"),
        (1.53e7, "1.53e7"),
        (1e-4, "0.0001"),
        (0.000123, "0.000123"),
        (9.7e-5, "9.7e-5"),
        (math.inf, "inf"),
        (None, "-"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.004, "<1 %"), (0.912, "91 %"), (0.9951, ">99 %"), (1.0, "100 %"), (None, "-")],
)
def test_shares_are_none_or_all_only_where_they_are(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(55.61, "55.6 ms"), (999.0, "999 ms"), (9700.0, "9.7 s"), (None, "-")]
)
def test_times(milliseconds, text):
    assert duration(milliseconds) == text
