import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(Path(__file__).parent)]  # the latter for `pareto_tiny`, which the tests here share
