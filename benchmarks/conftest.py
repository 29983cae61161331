"""Ratios, not times: what is measured and its peer take turns, and a table at the end holds them together.

Measures on a GPU where there is one; `--bench-device=cpu` does not.
"""

import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]

from performance_table import promise_of  # noqa: E402  # found by the line above


class Row(NamedTuple):
    """One line of the report, and one entry of `extra_info["rows"]`.

    Attributes:
        name: What is measured, and where it matters of what size and dtype.
        value: A multiple of the peer's time, or a number in `unit`.
        spread: Half the distance between the quartiles; None for a single number.
        cpu: A multiple of the peer's time on all processors; None where that is not known.
        seconds: Median time; None for a single number.
        unit: "x" for a multiple.
        promise: What `value` is promised to be, such as "<= 1.5"; may be empty.
    """

    name: str
    value: float
    spread: float | None
    cpu: float | None
    seconds: float | None
    unit: str
    promise: str


_rows = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--bench-device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")


@pytest.fixture(autouse=True)
def _comes_to_an_end() -> None:
    """Benchmarks are not bound to the processor time of a test: those at epsilon have to come there first."""


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """What the benchmarks of the optimizer run on."""
    return torch.device(pytestconfig.getoption("--bench-device"))


@pytest.fixture(scope="session")
def synchronize(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done all it was told."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def timed(
    function: Callable[[], Any], taken: list[tuple[float, float]], synchronize: Callable[[], None]
) -> Callable[[], None]:
    """A function that also keeps its seconds by the clock and, over all threads, of the processor."""

    def run() -> None:
        synchronize()
        began = time.perf_counter(), time.process_time()
        function()
        synchronize()
        taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))

    return run


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, synchronize: Callable[[], None]) -> Callable[..., None]:
    """`compare(name, function, peer, promise="")`: medians over rounds, in each of which both run once.

    `between` runs before each of them, and does not count. The peer's time counts `peer_counts` times: 5 where the
    function does five steps and the peer one. With `elsewhere` other processes do the work, and processor time is
    unknown. Without `promise` it is what the table promises, if anything.
    """

    def run(
        name: str,
        function: Callable[[], Any],
        peer: Callable[[], Any],
        promise: str = "",
        rounds: int = 11,
        between: Callable[[], Any] = lambda: None,
        peer_counts: float = 1.0,
        elsewhere: bool = False,
    ) -> None:
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        measure_peer = timed(peer, theirs, synchronize)

        def setup() -> None:
            between()
            measure_peer()
            between()

        benchmark.pedantic(timed(function, ours, synchronize), setup=setup, rounds=rounds, warmup_rounds=1)
        if benchmark.disabled:
            return
        pairs = list(zip(ours, theirs, strict=True))[1:]  # the first warms up
        ratio, spread = middle([mine[0] / (its[0] * peer_counts) for mine, its in pairs])
        cpu = None if elsewhere else middle([mine[1] / (its[1] * peer_counts) for mine, its in pairs])[0]
        seconds = statistics.median(mine[0] for mine, _ in pairs)
        report(request, benchmark, Row(name, ratio, spread, cpu, seconds, "x", promise or promise_of(name)))

    return run


def middle(values: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


@pytest.fixture
def note(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`note(name, value, unit="", spread=None)`: a number that goes with a benchmark."""

    def add(name: str, value: float, unit: str = "", spread: float | None = None) -> None:
        report(request, benchmark, Row(name, value, spread, None, None, unit, promise_of(name)))

    return add


def report(request: pytest.FixtureRequest, benchmark: Any, row: Row) -> None:
    benchmark.extra_info.setdefault("rows", []).append(row._asdict())
    request.config.stash.setdefault(_rows, []).append(row)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the numbers depend on and pytest-benchmark does not ask."""
    compiler = shutil.which("c++")
    device = config.getoption("--bench-device")
    machine_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=device,
        device_name=torch.cuda.get_device_name() if device == "cuda" else machine_info["cpu"].get("brand_raw", ""),
        compiler=subprocess.check_output([compiler, "--version"], text=True).splitlines()[0] if compiler else None,
        system=platform.system(),
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(_rows, [])
    if not rows:
        return
    terminalreporter.section("as a multiple of the peer, medians of rounds in which both take turns")
    width = max(len(row.name) for row in rows)
    terminalreporter.write_line(f"{'':{width}}  {'time':>15}  {'CPU':>6}  {'ours':>11}  promise")
    for name, value, spread, cpu, seconds, unit, promise in rows:
        within = f" +- {spread:5.3f}" if spread is not None else ""
        number = f"{value:6.3f}{within}" if unit == "x" else f"{value:6.1f}{within} {unit}"
        processor = "" if cpu is None else f"{cpu:6.3f}"
        took = "" if seconds is None else f"{seconds * 1e3:8.2f} ms"
        terminalreporter.write_line(f"{name:{width}}  {number:15}  {processor:6}  {took:11}  {promise}".rstrip())
