"""Sphinx: `make docs`, or `sphinx-build -W -n docs docs/_build/html`. Nothing is downloaded."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_extensions"), str(Path(__file__).parents[1])]

import craft_optim  # noqa: E402 - found by the line above, also where it is not installed

project = "craft-optim"
author = "the craft-optim authors"
copyright = author
version = release = craft_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "plain_docstrings", "commands"]
exclude_patterns = ["_build", "_extensions"]
html_theme = "furo"
html_title = f"craft-optim {version}"
html_show_sphinx = False
smartquotes_action = "D"  # dashes alone: "pi" is a string, not a quotation
highlight_language = "none"  # formulas are no Python

# Headings are link targets, as on GitHub.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_custom_sections = ["Cost"]
# The reference is the same whether these are installed or not, and is built without importing them.
autodoc_mock_imports = ["lerobot", "transformers", "datasets", "draccus", "PIL"]

# `-n` is for our own names. Those of other packages would need their inventories, which are downloads.
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:exc", ".*"),
    ("py:(class|data)", r"(?!craft_optim\b).*"),
]
