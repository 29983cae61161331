import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `toys`, which the tests here share
collect_ignore = ["toys.py"]  # needs transformers and has no doctests
