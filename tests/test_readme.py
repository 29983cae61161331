"""The README's numbers are those of committed results, and its Chinese edition says the same."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import craft_optim

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
TEXT, TRANSLATED = README.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
WORKS_WITH = (ROOT / "docs" / "works_with.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`[^`]*?(?<!tests/)(examples/\w+\.py)[^`]*`", TEXT)


def results(*parts):
    return json.loads((ROOT.joinpath(*parts)).read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", sorted(set(COMMANDS)))
def test_what_it_names_exists(target):
    assert (ROOT / target).exists()


def test_every_cell_of_the_table_has_a_test():
    """Or is empty: no claim without one."""
    table = next(part for part in WORKS_WITH.split("\n\n") if part.startswith("| | trains |"))
    rows = [line.split("|")[2:-1] for line in table.splitlines()[2:]]
    assert len(rows) == 7
    for cell in (cell.strip() for row in rows for cell in row):
        assert re.sub(r"\[[^]]+\]\(\.\./tests/[^)]+\.py\)", "", cell).strip(",; ") == "", cell


# Numbers


def demo_rows():
    """The demo's table, of examples/results/summary.json."""
    kept = results("examples", "results", "summary.json")
    columns = [kept[name] for name in ("pretrained", "adamw", "craft")]

    def rate(row, task):
        low, high = row[f"{task}_success_interval"]
        return f"{row[f'{task}_success']:.2f} [{low:.2f}, {high:.2f}]"

    def milliseconds(row):
        return "" if row["ms_per_step"] is None else f"{row['ms_per_step']:.0f}"

    return [
        *([rate(row, task) for row in columns] for task in ("new", "old")),
        [f"{row['old_worst']:.2f}" for row in columns],
        *([f"{row[f'{task}_ce']:.3f}" for row in columns] for task in ("old", "new")),
        *([f"{row[f'drift_{kind}']:.4f}" for row in columns] for kind in ("anchor", "heldout")),
        [milliseconds(row) for row in columns],
    ]


@pytest.mark.parametrize("text", [TEXT, TRANSLATED, EXPERIMENTS], ids=["README", "zh-CN", "experiments"])
def test_the_demos_table_is_that_of_the_run(text):
    table = next(part for part in text.split("\n\n") if re.match(r"\| \| \S+ ?\| AdamW \|", part))
    found = [[cell.strip(" *") for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    assert found == demo_rows()
    settings = results("examples", "results", "summary.json")["settings"]
    assert f"--seeds {settings['seeds']} --rollouts {settings['rollouts']}" in text
    assert f"epsilon = {settings['epsilon']:g}" in text


def test_the_six_experiments_table_is_that_of_the_run():
    table = (ROOT / "benchmarks" / "evidence" / "results" / "six_experiments" / "table.md").read_text(encoding="utf-8")
    assert table.split("\n\n")[0] in EXPERIMENTS


def test_the_costs_are_those_of_the_benchmark():
    rows = {row["name"]: row for row in results("benchmarks", "results", "cpu.json")["rows"]}
    names = [f"step of GPT-2 124M, {which}" for which in ("K = 1", "K = 1, quarter of the anchors", "auto, at epsilon")]
    expected = [f"{rows[name]['cpu']:.1f}" for name in names]
    for text, begin in ((TEXT, "GPT-2's shapes"), (TRANSLATED, "GPT-2 的形状")):
        sentence = re.split(r"peak|峰值", text.split(begin)[1])[0]
        assert re.findall(r"\d\.\d", sentence) == expected
    of_pass, of_penalty = (rows[f"memory, {of} over 257152 classes"]["value"] for of in ("pass", "plain KL's pass"))
    assert (f"{of_pass:.2f}", f"{of_penalty:.1f}") == ("0.06", "4.0")
    assert all("0.06" in text for text in (TEXT, TRANSLATED))
    assert rows["memory, default"]["value"] == 1.0  # "one more copy of the gradients"
    assert f"{rows['step without retention, GPT-2 124M']['cpu']:.2f}" == "1.00"


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 100


def test_what_held_is_that_of_the_benchmark():
    kept = results("benchmarks", "evidence", "results", "retention_pareto.json")
    rows = [row for row in kept["robustness"] if (row["method"], row["strength"]) in (("craft", 0.05), ("fixed", 1.0))]
    assert len(rows) == 6
    ratios = [drift / 0.05 for row in rows if row["method"] == "craft" for drift in row["drifts"]]
    spreads = [max(row["drifts"]) / min(row["drifts"]) for row in rows if row["method"] == "fixed"]
    assert len(ratios) == 3 * 9 * len(kept["seeds"])
    expected = [f"{min(ratios):.2f}", f"{max(ratios):.2f}", f"{min(spreads):.0f}", f"{max(spreads):.0f}"]
    for text in (TEXT, TRANSLATED):
        sentences = text.split("`make pareto FULL=1`")[1].split("**")[0]
        assert re.findall(r"(?<![x\d.])\d+(?:\.\d+)?(?=[ -])", sentences.split("0.05")[1]) == [
            *expected[:2], "1", *expected[2:]
        ]  # fmt: skip


def test_the_citation_is_of_this_version():
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert version == craft_optim.__version__


# The Chinese edition


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def meant(text):
    """What would be wrong if it differed: code without comments, links and pictures, figures."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    tables = [line for line in prose.splitlines() if line.startswith("|")]
    return {
        "python": [ast.dump(ast.parse(block)) for block in blocks(text, "python")],
        "shell": [shlex.split(block, comments=True) for block in blocks(text, "bash")],
        "links": [x for x in re.findall(r"\]\(([^)]+)\)", prose) if not x.startswith("README")],
        "numbers of tables": [re.findall(r"\d+(?:\.\d+)?", line) for line in tables],
        "numbers": sorted(re.findall(r"\d+\.\d+", prose)),
    }


@pytest.mark.parametrize("part", sorted(meant(TEXT)))
def test_both_editions_say_the_same(part):
    assert meant(TRANSLATED)[part] == meant(TEXT)[part]


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("python", "epsilon=0.05)", "epsilon=0.5)"),
        ("shell", "demo vision", "demo chat"),
        ("links", "docs/guide.md", "docs/method.md"),
        ("numbers of tables", "0.2724", "0.2725"),
        ("numbers", "为 1.5", "为 1.8"),
    ],
)
def test_a_difference_is_found(part, old, new):
    assert old in TRANSLATED
    assert meant(TRANSLATED.replace(old, new, 1))[part] != meant(TEXT)[part]


def test_the_editions_link_to_each_other():
    assert f"]({CHINESE.name})" in TEXT
    assert f"]({README.name})" in TRANSLATED
