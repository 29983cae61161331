import sys
from pathlib import Path

import pytest

pytest.importorskip("lerobot", reason="pip install 'craft-optim[example]', Python >= 3.12")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
