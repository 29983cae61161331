"""Prints the promised lower bounds as requirements: `torch>=2.6` becomes `torch==2.6`.

    python tools/lower_bounds.py [NAME ...]

Args:
    NAME: Extras or dependency groups besides the core. Requirements with another bound are printed as they are.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
named = project["project"]["optional-dependencies"] | project["dependency-groups"]
requirements = [*project["project"]["dependencies"], *(line for name in sys.argv[1:] for line in named[name])]
print("\n".join(dict.fromkeys(line.replace(">=", "==") for line in requirements)))
