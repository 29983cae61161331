"""The page in a real browser, without a window."""

import json
import math
import re
import shutil
import subprocess
from itertools import pairwise

import pytest

from craft_optim.report import read_runs, render

Image = pytest.importorskip("PIL.Image", reason="pip install 'craft-optim[report]'")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome: apt-get install chromium")
# What the log calls requests of a page; the browser has some of its own, whatever the page
OF_A_PAGE = re.compile(r'"traffic_annotation":101845102,"url":"([^"]*)"')


def browse(page, folder, *what):
    """Opens a page; its DOM or nothing, the lines of its console, and the addresses that were asked for."""
    log = folder / "net.json"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
    ]
    done = subprocess.run([BROWSER, *options, *what, page.as_uri()], capture_output=True, text=True, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, console, {*OF_A_PAGE.findall(log.read_text())}


@pytest.fixture(scope="module")
def page(tmp_path_factory, rows, write):

    folder = tmp_path_factory.mktemp("page")
    for seed in (0, 1):
        write(folder / "runs" / f"c{seed}.jsonl", rows(300, method="craft", seed=seed, final=1.0 + seed / 10))
    plain = rows(300, method="adamw", seed=0, epsilon=None)
    for row in plain:
        row["drift_anchors"] = 2.0
    write(folder / "runs" / "a.jsonl", plain)
    file = folder / "report.html"
    file.write_text(render(read_runs([str(folder / "runs")])))
    return file


@pytest.fixture(scope="module")
def opened(page):
    """With all that is folded."""
    file = page.with_name("opened.html")
    file.write_text(page.read_text().replace("<details>", "<details open>"))
    return file


@pytest.mark.parametrize(("which", "number"), [("page", 2), ("opened", 7)])
def test_charts_are_drawn_and_nothing_is_loaded(which, number, tmp_path, request):
    dom, console, asked = browse(request.getfixturevalue(which), tmp_path, "--dump-dom", "--window-size=1280,900")
    assert console == []
    assert asked == set()
    drawn = [int(n) for n in re.findall(r'<figure data-panel="\d+" data-points="(\d+)"', dom)]
    assert len(drawn) == dom.count("<canvas") == number
    assert min(drawn) > 100
    assert f'data-charts="{number}"' in dom


UNFOLD = """
const first = document.querySelectorAll("figure[data-points]").length;
document.querySelectorAll("details").forEach(fold => { fold.open = true; });
setTimeout(() => {
  const widths = [...document.querySelectorAll("figure canvas")].map(x => x.clientWidth);
  document.body.innerHTML = `<pre>${JSON.stringify([first, widths])}</pre>`;
}, 300);
"""


def used(page, script, folder, *options):
    """What a script that acts on the page leaves in its <pre>."""
    file = folder / "used.html"
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    file.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    dom, console, _ = browse(file, folder, "--dump-dom", "--virtual-time-budget=3000", *options)
    assert console == []
    return json.loads(re.search(r"<pre>(.*)</pre>", dom)[1])


def test_what_is_folded_is_drawn_when_it_opens(page, tmp_path):
    first, widths = used(page, UNFOLD, tmp_path, "--window-size=1280,900")
    assert first == 2
    assert len(widths) == 7
    assert min(widths[:2]) > 1.8 * max(widths[2:]) > 600, "drift and loss are twice as wide"


# What is written on the canvases: text, colour, place, alignment
LABELS = """
const said = [], fill = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const at = this.getTransform();
  const own = {text, ink: this.fillStyle, x: x + at.e, y: y + at.f, width: this.measureText(text).width};
  said.push({...own, right: this.canvas.width, height: this.canvas.height, align: this.textAlign});
  return fill.apply(this, arguments);
};
"""
TELL = "document.body.innerHTML = `<pre>${JSON.stringify(said).replaceAll('<', '&lt;')}</pre>`;"


def labels(page, folder, width=1280):
    """All texts on the canvases of the page."""
    file = folder / "labels.html"
    file.write_text(page.read_text().replace("<main>", f"<script>{LABELS}</script><main>"))
    return used(file, f"setTimeout(() => {{ {TELL} }}, 300);", folder, f"--window-size={width},900")


@pytest.mark.parametrize("width", [500, 1280])
def test_lines_have_their_names_at_their_ends(page, tmp_path, width):
    said = labels(page, tmp_path, width)
    names = [(one["text"], one["ink"]) for one in said if one["align"] == "left"]
    assert {name for name, _ in names} == {"craft", "adamw", "epsilon 0.05"}
    assert {ink for name, ink in names if name == "craft"} == {"#1b6ca8"}
    assert {ink for name, ink in names if name == "adamw"} == {"#d95f02"}
    # uPlot draws each chart once more when fonts are there: the last ones count
    ends = [one for one in said if one["align"] == "left"][-5:]
    assert all(one["x"] + one["width"] <= one["right"] for one in ends), "none is cut off"
    for chart in (ends[:3], ends[3:]):
        places = sorted(one["y"] for one in chart)
        assert all(after - before >= 14 for before, after in pairwise(places)), "none on another"
        assert all(6 <= y <= chart[0]["height"] - 30 for y in places)


def test_axes_are_labelled_and_numbers_are_those_of_the_page(page, tmp_path):
    texts = {one["text"] for one in labels(page, tmp_path)}
    assert {"step", "drift", "task loss"} <= texts
    numbers = texts - {"step", "drift", "task loss", "craft", "adamw", "epsilon 0.05"}
    assert {"0.01", "0.1", "1", "0", "50", "100"} <= numbers
    assert all(re.fullmatch(r"-?(\d{1,3}(,\d{3})*(\.\d+)?)", text) for text in numbers if text), numbers


def test_this_would_be_noticed(page, tmp_path):
    """An error and a request, where the page's own policy does not forbid them."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("</main>", '</main><img src="http://elsewhere.invalid/a.png"><script>no()</script>'))
    _, console, asked = browse(broken, tmp_path, "--dump-dom")
    assert any("no is not defined" in line for line in console)
    assert asked == {"http://elsewhere.invalid/a.png"}


USE = """
const over = document.querySelectorAll(".u-over")[0], box = over.getBoundingClientRect();
over.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2, clientY: box.top + 50}));
setTimeout(() => {
  const texts = [...document.querySelectorAll("output")].map(x => x.textContent);
  document.querySelectorAll(".legend input")[1].click();
  over.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 4, clientY: box.top + 50}));
  setTimeout(() => {
    const later = document.querySelector("output").textContent;
    document.body.innerHTML = `<pre>${JSON.stringify([texts, later])}</pre>`;
  }, 200);
}, 200);
"""


def test_it_tells_values_and_hides_methods(page, tmp_path):
    texts, later = used(page, USE, tmp_path, "--window-size=1280,900")
    step, craft, adamw = re.match(r"step (\d+) · craft ([\d.]+) · adamw ([\d.]+)$", texts[1]).groups()
    assert int(step) == pytest.approx(150, abs=5)
    expected = 2.0 * math.exp(-int(step) / 30)
    assert float(craft) == pytest.approx(expected, rel=0.1)
    assert float(adamw) == pytest.approx(expected, rel=0.1)
    assert texts[0].startswith(f"step {step} · craft "), "all charts follow"
    assert texts[0].endswith(" · adamw 2 · epsilon 0.05")
    assert re.match(r"step 7\d · craft [\d.]+ · epsilon 0.05$", later)


@pytest.mark.parametrize("dark", [False, True])
def test_lines_have_the_colours_of_their_methods(opened, tmp_path, dark):
    size = ["--window-size=500,4200", f"--screenshot={tmp_path / 'page.png'}"]
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _, console, _ = browse(opened, tmp_path, *size, *scheme)
    assert console == []
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    found = {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}
    inks = ("#5fb0f0", "#ff9a4d") if dark else ("#1b6ca8", "#d95f02")
    for ink in inks:
        # Beyond swatches of 12 x 12 pixels in card and legend: lines
        assert found.get(tuple(bytes.fromhex(ink[1:])), 0) > 1000, ink
    background = max(found, key=found.get)
    assert (sum(background) < 200) == dark
