"""The page in a real browser, without a window."""

import json
import math
import re
import shutil
import subprocess

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


def test_charts_are_drawn_and_nothing_is_loaded(page, tmp_path):
    dom, console, asked = browse(page, tmp_path, "--dump-dom", "--window-size=1280,900")
    assert console == []
    assert asked == set()
    drawn = [int(n) for n in re.findall(r'<figure data-panel="\d+" data-points="(\d+)"', dom)]
    assert len(drawn) == dom.count("<canvas") == 7
    assert min(drawn) > 100
    assert 'data-charts="7"' in dom


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
    used = tmp_path / "used.html"
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    used.write_text(text.replace("</body>", f"<script>{USE}</script></body>"))
    dom, console, _ = browse(used, tmp_path, "--dump-dom", "--window-size=1280,900", "--virtual-time-budget=3000")
    assert console == []
    texts, later = json.loads(re.search(r"<pre>(.*)</pre>", dom)[1])
    step, craft, adamw = re.match(r"step (\d+) · craft ([\d.]+) · adamw ([\d.]+)$", texts[0]).groups()
    assert int(step) == pytest.approx(150, abs=5)
    expected = 2.0 * math.exp(-int(step) / 30)
    assert float(craft) == pytest.approx(expected, rel=0.1)
    assert float(adamw) == pytest.approx(expected, rel=0.1)
    assert all(text.startswith(f"step {step} · craft ") for text in texts), "all charts follow"
    assert "epsilon 0.05" in texts[1]
    assert re.match(r"step 7\d · craft [\d.]+$", later)


@pytest.mark.parametrize("dark", [False, True])
def test_lines_have_the_colours_of_their_methods(page, tmp_path, dark):
    size = ["--window-size=500,4200", f"--screenshot={tmp_path / 'page.png'}"]
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _, console, _ = browse(page, tmp_path, *size, *scheme)
    assert console == []
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    found = {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}
    inks = ("#5fb0f0", "#ff9a4d") if dark else ("#1b6ca8", "#d95f02")
    for ink in inks:
        # Beyond swatches of 12 x 12 pixels in card and legend: lines
        assert found.get(tuple(bytes.fromhex(ink[1:])), 0) > 1000, ink
    background = max(found, key=found.get)
    assert (sum(background) < 200) == dark
