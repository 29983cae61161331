"""The README as a package index shows it: there a path leads nowhere, so each becomes an address in the repository.

Everything else about the package is in pyproject.toml. `python setup.py --long-description` prints it.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]


def address(link: re.Match[str]) -> str:
    """A Markdown link or picture, to the repository's main branch if it was to one of its files."""
    picture, text, target = link.groups()
    if not re.match(r"\w+:|#", target):
        target = f"{REPOSITORY}/{'raw' if picture else 'blob'}/main/{target}"
    return f"{picture}[{text}]({target})"


setup(
    long_description=re.sub(r"(!?)\[([^]]*)\]\(([^)]+)\)", address, (ROOT / "README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
