import sys
from pathlib import Path

import pytest

for _library in ("joblib", "matplotlib", "scipy", "sklearn"):
    pytest.importorskip(_library, reason="pip install 'craft-optim[report]', pip install --group bench")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
