"""The documentation builds without a warning, and its reference has every public name."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="pip install --group docs")
pytest.importorskip("furo", reason="pip install --group docs")
pytest.importorskip("myst_parser", reason="pip install --group docs")
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_extensions"))
from plain_docstrings import restructured  # noqa: E402


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "-d", str(out / "read")]
    done = subprocess.run([*command, str(DOCS), str(out / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def documented(pages):
    with (pages / "objects.inv").open("rb") as file:
        return InventoryFile.load(file, "", lambda base, path: path)


def exported(*parts):
    """`__all__` of a module, without importing it."""
    for node in ast.parse((ROOT / "craft_optim").joinpath(*parts).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(parts)


def of_kind(inventory, kind):
    return {name for role, names in inventory.items() if role.startswith(kind) for name in names}


@pytest.mark.parametrize(
    "parts",
    [
        ("__init__.py",), ("functional.py",), ("dual.py",), ("schedules.py",), ("metrics.py",), ("transformers.py",),
        ("anchors", "__init__.py"), ("evaluation", "__init__.py"), ("lerobot", "__init__.py"),
        ("report", "__init__.py"),
    ],
    ids="/".join,
)  # fmt: skip
def test_the_reference_has_every_public_name(pages, parts):
    known = of_kind(documented(pages), "py:")
    place = ".".join(("craft_optim", *parts)).removesuffix(".__init__.py").removesuffix(".py")
    names = {f"{place}.{name}" for name in exported(*parts)}
    assert {name for name in names if name not in known} == set()


def test_every_command_has_its_help(pages):
    """The directive is run by the parser itself; the page must name all commands."""
    from craft_optim.cli import _COMMANDS

    text = (pages / "api" / "commands.html").read_text("utf-8")
    names = {module.__name__.rpartition(".")[2].replace("_", "-") for module in _COMMANDS}
    assert {name for name in names if f"usage: craft-optim {name}" not in text} == set()


def test_pages_need_no_network(pages):
    """Scripts, styles and pictures are beside the pages."""
    for page in pages.rglob("*.html"):
        parts = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*>', page.read_text("utf-8"))
        assert parts
        assert not [part for part in parts if '="http' in part], page.name


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("`a` and |b|, *c*, 2 * d, e_.", "``a`` and \\|b\\|, *c*, 2 \\* d, e\\_."),
        ("`LogitRetention` of `x.py`", ":py:obj:`.LogitRetention` of :py:obj:`.x.py`"),
        ("`over\nlines`", "``over\nlines``"),
        ("Formula:\n\n    |a| * b\n\nText.", "Formula:\n\n::\n\n    |a| * b\n\nText."),
        ("Args:\n    a: `b`.\n        More.", "Args:\n    a: ``b``.\n        More."),
        ("Returns:\n    The status: 0.", ":returns: The status: 0."),
        ("Example:\n    >>> `a`\n    1", "Example:\n    >>> `a`\n    1"),
        ("Example:\n    a = b", "Example:\n    .. code-block:: python\n\n        a = b\n"),
        ("Example:\n    - W&B: `log`", "Example:\n    - W&B: ``log``"),
        ("- `a`:\n  more", "- ``a``:\n  more"),
    ],
)
def test_docstrings_mean_what_they_look_like(docstring, expected):
    assert restructured(docstring.split("\n")) == expected.split("\n")
