"""Folders of the evidence. To import this puts the demo (examples/) and peers and tables (benchmarks/) on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RESULTS = Path(__file__).parent / "results"  # what is in the repository
WORK = ROOT / ".benchmarks"  # what runs leave

sys.path += [str(EXAMPLES), str(ROOT / "benchmarks")]
