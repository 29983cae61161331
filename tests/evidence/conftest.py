import sys
from pathlib import Path

import pytest

for _library in ("joblib", "matplotlib", "scipy", "sklearn"):
    pytest.importorskip(_library, reason="pip install 'craft-optim[evaluation,report]', pip install --group bench")

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "benchmarks" / "evidence", ROOT / "benchmarks", ROOT / "examples", Path(__file__).parent]
sys.path[:0] = map(str, FOLDERS)  # the last for `pareto_tiny`, which the tests here share
