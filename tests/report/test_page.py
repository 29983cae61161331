"""The page as text: what it says, and that it is one that loads nothing and runs nothing of others."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from craft_optim.report import read_runs, render
from craft_optim.report.panels import POINTS

EVIL = '</script><script>alert(1)</script><img src="http://x.invalid/a.png">'


class Page(HTMLParser):
    """Elements and text by element; properly nested but for those that have no end."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text, self.scripts = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.elements[-1][1], data))
        elif "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(self.text)

    @property
    def data(self):
        return next(json.loads(text) for attrs, text in self.scripts if attrs.get("id") == "data")


@pytest.fixture
def page(runs_folder):
    return Page(render(read_runs([str(runs_folder)]), title="Both <methods>"))


def test_it_says_what_came_of_the_runs(page):
    assert "Both <methods>" in page.words
    assert "4 runs, up to step 99" in page.words
    assert "Held at the end in 2 of 2 runs" in page.words
    assert "Nothing was constrained: drift ended from 2 to 2.1 in 2 runs." in page.words
    assert page.words.count("held") >= 3
    for name in ("craft seed 0", "craft seed 1", "adamw seed 0", "adamw seed 1"):
        assert name in page.words
    assert "Every row is drawn" in page.words
    assert "MIT License" in page.scripts[1][1]


def test_charts_have_numbers_and_words(page):
    figures = [attrs for attrs in page.all("figure") if "data-panel" in attrs]
    assert len(figures) == len(page.data["panels"]) == 9
    described = [attrs["aria-label"] for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(described) == 9
    assert any(re.search(r"Drift: craft average from .* to 0\.05", text) for text in described)
    assert page.data["groups"] == ["craft", "adamw"]
    drift = page.data["panels"][0]
    assert drift["limits"] == [{"group": None, "label": "epsilon 0.05", "x": [0.0, 99.0], "y": [0.05, 0.05]}]
    assert [panel["unit"] for panel in page.data["panels"]][:3] == ["drift", "task loss", "lambda"]
    assert len(drift["curves"][0]["x"]) == len(drift["curves"][0]["y"]) == 100


def large(page):
    """The large numbers of a page's cards with their units, and what is said below each."""
    found = re.findall(r"<div><p><b>([^<]*)</b>([^<]*)</p><small>([^<]*)</small></div>", page)
    return [(value, unit.replace("&times;", "x").strip(), about) for value, unit, about in found]


def test_drift_held_out_drift_and_loss_are_large(tmp_path, rows, write):
    def of(content):
        return large(render(read_runs([str(write(tmp_path / "m.jsonl", content))])))

    content = rows(averages=True)
    loss = ("0.0861", "", "task loss")
    assert of(content) == [("1", "x epsilon", "drift 0.05"), ("–", "", "held-out drift: not measured"), loss]
    content[97] |= {"drift_anchors": 0.04, "drift_heldout": 0.123}
    assert of(content) == [("0.8", "x epsilon", "drift 0.04"), ("2.46", "x epsilon", "held-out drift 0.123"), loss]
    content[50]["drift_heldout"] = content[97].pop("drift_heldout")
    assert of(content)[1] == ("2.46", "x epsilon", "held-out drift 0.123 at step 50")
    steered = rows(averages=True, epsilon_heldout=0.2, heldout=0.25)
    assert of(steered) == [("1.25", "x epsilon", "held-out drift 0.25"), ("0.05", "", "drift"), loss], (
        "epsilon is for held-out ones"
    )
    plain = rows(epsilon=None, drift_anchors=2.0)
    assert of(plain) == [("2", "", "drift"), ("–", "", "held-out drift: not measured"), loss]


def test_drift_and_loss_are_open_and_all_else_is_folded(runs_folder):
    text = render(read_runs([str(runs_folder)]))
    shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert re.findall(r'<figure data-panel="\d+"><header><h3>([^<]*)', shown) == ["Drift", "Task loss"]
    assert text.count("<figure data-panel") == 9
    assert "<table" not in shown


def test_epsilon_of_held_out_anchors(tmp_path, rows, write):
    content = rows(averages=True, every=4, epsilon_heldout=0.2, heldout=0.25)
    page = Page(render(read_runs([str(write(tmp_path / "m.jsonl", content))])))
    assert "0.25 (held-out)" in page.words
    assert re.search(r"steps with a pass\s+25 %", page.words)


def test_a_card_does_not_contradict_itself(tmp_path, rows, write):
    content = rows(averages=True)
    for row in content[:66]:
        row["drift"] = 0.2
    text = render(read_runs([str(write(tmp_path / "m.jsonl", content))]))
    assert '<span class="badge late">held at the end</span>' in text
    words = Page(text).words
    assert "above 1.1\u00a0x epsilon for 66\u00a0% of the steps, at most 4\u00a0x." in words
    assert re.search(r"steps above epsilon\s+66 %", words)


def test_numbers_are_written_in_one_way(tmp_path, rows, write):
    content = rows(3000, averages=True, seconds=9.7)
    text = Page(render(read_runs([str(write(tmp_path / "m.jsonl", content))]))).words
    assert re.search(r"time per step\s+9.7 s", text)
    assert "of 3,000 rows a point is the mean of about 12.5" in text
    assert not re.search(r"e[+-]0\d|\d{4,}", text)


def test_constraints_of_one_run_go_by_their_own_names(tmp_path, write):
    row = {"retention_loss/a": 0.1, "epsilon/a": 0.2, "retention_loss/b": 0.1, "epsilon/b": 0.2, "loss": 1.0}
    content = [row | {"step": s} for s in range(5)]
    page = Page(render(read_runs([str(write(tmp_path / "first.jsonl", content))])))
    assert page.data["groups"] == ["a", "b"]
    assert "first: a" in page.words


def test_names_are_text(tmp_path, rows, write):
    write(tmp_path / "m.jsonl", rows(method=EVIL, seed=0))
    text = render(read_runs([str(tmp_path / "m.jsonl")]), EVIL)
    page = Page(text)
    assert len(page.scripts) == 3
    assert not page.all("img")
    assert page.data["groups"] == [EVIL]
    assert page.words.count(EVIL) == 4, "title, heading, card, and row"


def test_it_loads_nothing_and_runs_its_own_scripts_alone(page, runs_folder):
    text = render(read_runs([str(runs_folder)]))
    assert re.findall(r"https?://[^\s)\"']*", text) == ["https://github.com/leeoniya/uPlot"], "a comment"
    assert not {"link", "iframe", "img", "object"} & {tag for tag, _ in page.elements}
    assert all(not name.startswith("on") and name != "src" for _, attrs in page.elements for name in attrs)
    (policy,) = [x["content"] for x in page.all("meta") if x.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    run = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in run]
    assert policy.partition("script-src ")[2].split() == hashes


def test_a_long_run_makes_no_long_page(tmp_path, rows, write):
    lengths = []
    for steps in (500, 5000):
        run = read_runs([str(write(tmp_path / f"{steps}.jsonl", rows(steps)))])
        text = render(run)
        lengths.append(len(text))
        page = Page(text)
        assert max(len(curve["x"]) for panel in page.data["panels"] for curve in panel["curves"]) <= POINTS
        assert f"of {steps:,} rows a point is the mean of about {steps / POINTS:.3g}" in page.words
    assert lengths[1] < 1.1 * lengths[0] < 300_000


def test_what_reading_left_out_is_said(tmp_path, rows, write):
    run = read_runs([str(write(tmp_path / "m.jsonl", rows(5), '\n{"st'))])
    assert "m: The last line is not complete" in Page(render(run)).words


def test_numbers_that_json_does_not_have(tmp_path, write):
    content = [{"step": s, "loss": None, "lambda": 0.0, "epsilon": 0.0, "retention_loss": -1e-9} for s in range(5)]
    page = Page(render(read_runs([str(write(tmp_path / "m.jsonl", content))])))
    curves = [curve for panel in page.data["panels"] if panel["log"] for curve in panel["curves"]]
    assert curves
    assert all(value is None for curve in curves for value in curve["y"])
