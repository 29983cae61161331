"""Ratios, not times: what is measured and its peer take turns, and a table at the end holds them together."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


class Row(NamedTuple):
    name: str
    ratio: float
    spread: float
    cpu: float
    seconds: float
    promise: str


_rows = pytest.StashKey[list[Row]]()
_notes = pytest.StashKey[list[tuple[str, float]]]()


def timed(function: Callable[[], Any], taken: list[tuple[float, float]]) -> Callable[[], None]:
    """A function that also keeps its seconds by the clock and, over all threads, of the processor."""

    def run() -> None:
        began = time.perf_counter(), time.process_time()
        function()
        taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))

    return run


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`compare(name, function, peer, promise="")`: medians over rounds, in each of which both run once.

    `between` runs before each of them, and does not count.
    """

    def run(
        name: str,
        function: Callable[[], Any],
        peer: Callable[[], Any],
        promise: str = "",
        rounds: int = 11,
        between: Callable[[], Any] = lambda: None,
    ) -> None:
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        measure_peer = timed(peer, theirs)

        def setup() -> None:
            between()
            measure_peer()
            between()

        benchmark.pedantic(timed(function, ours), setup=setup, rounds=rounds, warmup_rounds=1)
        if benchmark.disabled:
            return
        pairs = list(zip(ours, theirs, strict=True))[1:]  # the first warms up
        ratio, spread = middle([mine[0] / its[0] for mine, its in pairs])
        cpu, _ = middle([mine[1] / its[1] for mine, its in pairs])
        benchmark.extra_info.update(ratio=ratio, spread=spread, cpu_ratio=cpu, promise=promise)
        rows = request.config.stash.setdefault(_rows, [])
        rows.append(Row(name, ratio, spread, cpu, statistics.median(mine[0] for mine, _ in pairs), promise))

    return run


def middle(values: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


@pytest.fixture
def note(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """`note(name, value)`: a number that goes with a benchmark."""

    def add(name: str, value: float) -> None:
        benchmark.extra_info[name] = value
        request.config.stash.setdefault(_notes, []).append((name, value))

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, notes = config.stash.get(_rows, []), config.stash.get(_notes, [])
    if not rows:
        return
    terminalreporter.section("as a multiple of the peer, medians of rounds in which both take turns")
    width = max(len(name) for name in [*(row.name for row in rows), *(name for name, _ in notes)])
    terminalreporter.write_line(f"{'':{width}}  {'time':>15}  {'CPU':>6}  {'ours':>11}  promise")
    for name, ratio, spread, cpu, seconds, promise in rows:
        line = f"{name:{width}}  {ratio:6.3f} +- {spread:5.3f}  {cpu:6.3f}  {seconds * 1e3:8.2f} ms  {promise}"
        terminalreporter.write_line(line.rstrip())
    for name, value in notes:
        terminalreporter.write_line(f"{name:{width}}  {value:6.1f}")
