"""craft-optim report, and its pictures."""

import json
import sys
from pathlib import Path

import pytest

from craft_optim.cli import main
from craft_optim.report import read_runs
from craft_optim.report.pictures import draw

Image = pytest.importorskip("PIL.Image", reason="pip install 'craft-optim[report]'")


def test_a_page_and_what_is_said(runs_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<title>runs</title>" in page
    said = capsys.readouterr().out
    assert "craft seed 1: Drift ended at" in said
    grid = [line.split() for line in said.splitlines() if line.startswith("  craft seed") and ":" not in line]
    assert [line[-3:] for line in grid] == [["100", "%", "held"]] * 2
    assert f"Page: report.html ({len(page.encode()) / 1e3:.3g} kB)" in said


def test_all_options(runs_folder, tmp_path, capsys):
    made = tmp_path / "page.html"
    one = runs_folder / "craft-seed0" / "metrics.jsonl"
    options = [f"--out={made}", f"--png={tmp_path / 'png' / 's'}", "--title=A title"]
    assert main(["report", f"mine={one}", *options]) == 0
    assert "A title" in made.read_text()
    assert "mine" in made.read_text()
    names = {file.stem for file in (tmp_path / "png" / "s").iterdir()}
    charts = {"loss", "drift", "lambda", "cosine", "shares", "norms", "cost", "interval", "kept"}
    assert names == charts | {"overview"}
    assert "Pictures: 10" in capsys.readouterr().out


def test_json_in_the_place_of_the_tables(runs_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["page"], found["pictures"]) == ("report.html", [])
    assert Path("report.html").is_file()
    by_name = {run["name"]: run for run in found["runs"]}
    assert set(by_name) == {"craft seed 0", "craft seed 1", "adamw seed 0", "adamw seed 1"}
    held, plain = by_name["craft seed 0"], by_name["adamw seed 1"]
    rows = [json.loads(line) for line in (runs_folder / "craft-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert held["drift"] == pytest.approx(sum(row["drift"] for row in rows[-10:]) / 10), "its last tenth"
    assert held["ratio"] == pytest.approx(held["drift"] / 0.05)
    assert (held["verdict"], held["epsilon"], held["source"], held["violated"]) == ("held", 0.05, "average", 0.0)
    assert (held["method"], held["seed"], held["passes"], held["ms_per_step"]) == ("craft", 0, 1.0, 100.0)
    assert (plain["verdict"], plain["drift"], plain["epsilon"], plain["ratio"]) == ("free", 2.1, None, None)
    assert plain["words"] == "Nothing was constrained: drift ended at 2.1."


def test_json_to_a_file_and_the_tables(runs_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs", "--json=all.json"]) == 0
    assert len(json.loads(Path("all.json").read_text())["runs"]) == 4
    assert "Page: report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name at least one RUN"),
        (["runs", "--out=no/where.html"], "there is no folder no"),
        (["runs", "--json=no/where.json"], "--json=no/where.json cannot be written"),
    ],
)
def test_wrong_arguments(runs_folder, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["report", *options])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "gone"]) == 1
    assert "There is no run 'gone'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_installed(runs_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "runs", "--png=png"]) == 1
    assert "pip install 'craft-optim[report]'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert main(["report", "runs"]) == 0, "the page needs none"


def test_pictures_show_what_is_there(runs_folder, tmp_path):
    files = draw(read_runs([str(runs_folder)]), tmp_path / "png")
    for file in files:
        picture = Image.open(file).convert("RGB")
        inks = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
        assert (0x1B, 0x6C, 0xA8) in inks, file
        plain = (0xD9, 0x5F, 0x02) in inks
        assert plain == (file.stem in ("loss", "drift", "cost", "overview")), file
