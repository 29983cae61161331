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
    assert "Held in 2 of 2 runs" in page.words
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
    assert any(re.search(r"Drift against epsilon: craft average from .* to 0\.05", text) for text in described)
    assert page.data["groups"] == ["craft", "adamw"]
    drift = page.data["panels"][1]
    assert drift["limits"] == [{"group": None, "x": [0.0, 99.0], "y": [0.05, 0.05], "band": [0.9, 1.1]}]
    assert len(drift["curves"][0]["x"]) == len(drift["curves"][0]["y"]) == 100


def test_epsilon_of_held_out_anchors(tmp_path, rows, write):
    content = rows(averages=True, every=4, epsilon_heldout=0.2, heldout=0.25)
    page = Page(render(read_runs([str(write(tmp_path / "m.jsonl", content))])))
    assert "held-out drift 0.25 at the end, epsilon 0.2" in page.words
    assert "0.25 (held out)" in page.words
    assert re.search(r"steps with a pass\s+25%", page.words)


def test_names_are_text(tmp_path, rows, write):
    write(tmp_path / "m.jsonl", rows(method=EVIL, seed=0))
    text = render(read_runs([str(tmp_path / "m.jsonl")]), EVIL)
    page = Page(text)
    assert len(page.scripts) == 3
    assert not page.all("img")
    assert page.data["groups"] == [EVIL]
    assert page.words.count(EVIL) >= 5


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
