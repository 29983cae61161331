"""What the documentation says exists: settings, commands, links, messages, numbers. Nothing here imports lerobot.

`python tests/test_docs.py` writes the tables that are made of docstrings or of results.
"""

import argparse
import ast
import json
import re
import shlex
from functools import cache, partial
from pathlib import Path

import pytest

from craft_optim.cli import _parser, settings_help
from craft_optim.cli.options import existing_file
from craft_optim.metrics import METRICS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("[!_]*.md"))]
PACKAGE = ROOT / "craft_optim"
CHOOSING = ROOT / "docs" / "choosing.md"
LEROBOT = ROOT / "docs" / "lerobot.md"
TROUBLE = ROOT / "docs" / "troubleshooting.md"
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Of each run of lerobot-train that is not a setting
OUTSIDE = {"config", "discover_packages_path"}


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def tree(*parts):
    return ast.parse(read(PACKAGE.joinpath(*parts)))


# Tables of settings, metrics and results


def settings():
    """(name, default, what it is) of each setting, as the command's help has them."""
    return [(flag.removeprefix("--craft."), str(default), text) for flag, default, text in settings_help.settings()]


def table(header, rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *lines, ""])


def settings_table():
    rows = [(f"`--craft.{name}`", f"`{default}`", text.replace("|", "\\|")) for name, default, text in settings()]
    return table(("setting", "default", "what it is"), rows)


def metrics_table():
    meanings = {name: metric.meaning for name, metric in METRICS.items()}
    of_run = {
        "drift_anchors": "drift on the anchors, where it is measured",
        "drift_heldout": "drift on held-out ones, where it is measured",
    }
    rows = [(f"`{name}`", text.replace("|", "\\|")) for name, text in (meanings | of_run).items()]
    return table(("name", "what it is"), rows)


def budget_table(name):
    result = json.loads(read(ROOT / "benchmarks" / "evidence" / "results" / f"{name}.json"))
    header = ("retention every", "anchors per pass", "cost of a step", "highest drift on the way")
    rows = []
    for row in [result["adamw"], *result["points"]]:
        every, anchors = row["retention_every"], row["anchor_batch"]
        words = {1: "step", "auto": "auto"}.get(every, f"{every} steps")
        which = (words, f"{anchors}") if every else ("never: AdamW", "-")
        drifts = (f"{row[f'drift_{kind}']:.3f}" for kind in ("highest", "anchor", "heldout"))
        rows.append((*which, f"{row['cost']:.2f}", *drifts, f"{row['loss']:.2f}"))
    return table((*header, "drift on anchors", "drift on held-out frames", "new task: loss, last 50 steps"), rows)


TABLES = {
    "settings": (LEROBOT, settings_table),
    "metrics": (LEROBOT, metrics_table),
    **{name: (CHOOSING, partial(budget_table, name)) for name in ("retention-budget", "retention-budget-lr-0.0003")},
}


def with_table(text, name):
    begin = f"<!-- {name}: written by `python tests/test_docs.py` -->\n"
    before, rest = text.split(begin)
    return f"{before}{begin}{TABLES[name][1]()}<!-- end -->{rest.split('<!-- end -->', 1)[1]}"


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_docstrings_and_results_say(name):
    text = read(TABLES[name][0])
    assert with_table(text, name) == text, "run python tests/test_docs.py"


def test_every_setting_is_found():
    """The table is read off the source: it must not lose a part of it."""
    names = [name for name, *_ in settings()]
    assert {"epsilon", "rho", "statistics", "anchors.path", "anchors.heldout"} <= set(names)
    assert all(text for *_, text in settings())
    assert "anchors" not in names


def test_what_is_kept_of_which_policy():
    known = next(
        node.value
        for node in tree("lerobot", "adapters.py").body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_POLICIES"
    )
    expected = {key.value: ast.literal_eval(value.args[1]) for key, value in zip(known.keys, known.values, strict=True)}
    section = read(LEROBOT).split("## What it keeps of which policy")[1].split("\n## ")[0]
    found, policy = {}, None
    for name, keep in re.findall(r"^\| (\w*) ?\| `(\w+)` \|", section, re.MULTILINE):
        policy = name or policy
        found[policy] = (*found.get(policy, ()), keep)
    assert found == expected


def test_names_that_the_hook_replaces():
    replaced = next(
        ast.literal_eval(node.value)
        for node in tree("lerobot", "plugin.py").body
        if isinstance(node, ast.Assign) and node.targets[0].id == "REPLACED"
    )
    section = read(LEROBOT).split("## How the hook works")[1]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(replaced)


# Flags and commands


@EVERY_PAGE
def test_settings_that_are_named_exist(page):
    known = {name for name, *_ in settings()} | OUTSIDE
    known |= {"anchors", "<name>"}  # all below, and any
    unknown = {name.rstrip(".") for name in re.findall(r"--craft\.([\w.<>]+)", read(page))} - known
    assert not unknown


def commands(text):
    """The commands of this package in blocks of shell, as words."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["craft-optim"]:
                yield words[1:]
            elif "craft_optim.cli" in words:
                yield words[words.index("craft_optim.cli") + 1 :]


def lenient(parser):
    """The parser, content with files that are not there."""
    for action in parser._actions:
        if action.type is existing_file:
            action.type = str
        for below in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            lenient(below)
    return parser


@EVERY_PAGE
def test_commands_are_understood(page):
    parser = lenient(_parser())
    for words in commands(read(page)):
        args, rest = parser.parse_known_args(words)
        assert getattr(args, "takes_rest", False) or not rest, words


WIDE = {"experiments.md", "report.md", "vla_benchmark.md", "CONTRIBUTING.md"}


@EVERY_PAGE
def test_commands_fit_a_narrow_screen(page):
    """Broken by hand: a page of the documentation is 80 columns wide, and cuts what is longer."""
    long = [line for block in blocks(read(page), "bash") for line in block.splitlines() if len(line) > 80]
    assert page.name in WIDE or not long


@EVERY_PAGE
def test_options_in_the_text_exist(page):
    """`--option` of `craft-optim command` within one pair of backticks."""
    (below,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for command, rest in re.findall(r"`craft-optim ([\w-]+)([^`]*)`", read(page)):
        assert command in below.choices, command
        known = set(below.choices[command]._option_string_actions)
        named = {word.partition("=")[0] for word in rest.split() if word.startswith("--")}
        assert command == "train" or named <= known, (command, named - known)


def test_the_commands_are_all_documented():
    (below,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    text = "".join(map(read, PAGES))
    assert not [command for command in below.choices if f"craft-optim {command}" not in text]


# Links, messages, numbers


def anchors_of(page):
    """What GitHub makes of headings."""
    titles = re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


@cache
def messages():
    """All texts in the source; where values are filled in, a mark."""
    return list(_messages())


def _messages():
    mark = "\0"
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else mark for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def is_quoted(message, known):
    """Whether one text has all pieces of the message, in their order; between them it may have anything."""
    pieces = [re.escape(piece.strip(". \n")) for piece in message.split("...") if piece.strip(". \n")]
    return any(re.search(".*?".join(pieces), text, re.DOTALL) for text in known)


QUOTED = [" ".join(block.split()) for block in blocks(read(TROUBLE), "text")]


@pytest.mark.parametrize("message", QUOTED, ids=range(len(QUOTED)))
def test_messages_are_those_of_the_source(message):
    assert is_quoted(message, messages()), message


def test_a_message_that_is_not_there_is_found_out():
    assert not is_quoted("The drift is too large: ... of epsilon.", messages())
    assert len(QUOTED) > 20


if __name__ == "__main__":
    for name, (page, _) in TABLES.items():
        page.write_text(with_table(read(page), name), encoding="utf-8")
