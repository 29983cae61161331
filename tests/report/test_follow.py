"""Runs in the terminal while they train."""

import io
import json
import threading

import pytest

Console = pytest.importorskip("rich.console", reason="pip install 'craft-optim[report]'").Console

from craft_optim.report.follow import Followed, follow, spark  # noqa: E402


def shown(specs, until, *, terminal=False, width=160):
    out = io.StringIO()
    follow(specs, every=0.01, console=Console(file=out, force_terminal=terminal, width=width), until=until)
    return out.getvalue()


def test_sparks():
    assert spark([]) == ""
    assert spark([3.0, 3.0]) == "▁▁"
    assert spark([0, 7, 0, 7]) == "▁█▁█"
    assert spark([*range(100)], width=5) == "▁▃▅▆█"
    assert len(spark([*range(100)])) == 24


def test_what_has_been_added(tmp_path, rows, write):
    path = write(tmp_path / "run" / "metrics.jsonl", rows(10, every=4))
    run = Followed.read(path)
    assert (run.name, run.past("step")[-1], run.past("loss")[-1]) == ("run", 9, rows(10)[9]["loss"])
    assert run.past("retention_loss") == [row["retention_loss"] for row in rows(10, every=4)][::4]
    assert run.ms_per_step == pytest.approx(250.0)
    with path.open("a") as file:
        file.write(json.dumps({"step": 10, "lambda": 9.0}) + '\n{"step"')
    run = Followed.read(path)
    assert (run.past("step")[-1], run.past("lambda")[-1]) == (10, 9.0)
    assert run.past("loss")[-1] == rows(10)[9]["loss"], "the last there was"


@pytest.mark.parametrize("appended", [True, False])
def test_a_run_that_began_anew(tmp_path, rows, write, appended):
    anew = rows(3, final=7.0)
    path = write(tmp_path / "metrics.jsonl", [*rows(50), *anew] if appended else anew)
    assert Followed.read(path).past("loss") == [row["loss"] for row in anew]


def test_of_a_long_run_the_end_is_read(tmp_path, rows, write, monkeypatch):
    path = write(tmp_path / "metrics.jsonl", rows(2000))
    long = Followed.read(path)
    assert [row["step"] for row in long.rows] == [*range(1600, 2000)]
    whole = path.read_text()
    path.write_text("not json" + whole[8:])
    monkeypatch.setattr("craft_optim.report.follow._BYTES", len(whole) // 4)
    assert Followed.read(path).rows == long.rows


def test_a_growing_file_is_shown_as_it_grows(tmp_path, rows, write):
    folder = tmp_path / "out"

    def train():
        write(folder / "a" / "metrics.jsonl", rows(5))
        seen.wait(10)
        write(folder / "a" / "metrics.jsonl", rows(40, final=2.0))
        write(folder / "b" / "metrics.jsonl", rows(7, epsilon=None))

    seen, looks = threading.Event(), []
    thread = threading.Thread(target=train)

    def until():
        if not looks:
            thread.start()
        looks.append(1)
        if len(looks) == 30:
            seen.set()
        return len(looks) > 60 and not thread.is_alive()

    text = shown([str(folder)], until)
    thread.join()
    tables = text.strip().split("run ")
    assert "waiting" not in text
    assert len(tables) >= 3, "a table per change"
    first, last = tables[1].splitlines(), tables[-1].splitlines()
    assert first[1].split()[:2] == ["a", "4"]
    names = {line.split()[0]: line for line in last[1:] if line.strip()}
    assert {*names} == {"a", "b"}
    assert names["a"].split()[1] == "39"
    assert float(names["a"].split()[4]) == pytest.approx(2.0, abs=0.1)
    assert "█" in names["a"]


def test_on_a_terminal(tmp_path, rows, write):
    write(tmp_path / "run.jsonl", rows(30))
    looks = []
    text = shown([f"mine={tmp_path / 'run.jsonl'}"], lambda: looks.append(1) or len(looks) > 2, terminal=True)
    assert "mine" in text
    assert "\x1b[" in text
    narrow = shown([str(tmp_path)], lambda: True, width=80)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80


def test_waiting(tmp_path):
    looks = []
    text = shown([str(tmp_path / "not yet")], lambda: looks.append(1) or len(looks) > 2, terminal=True)
    assert "waiting for rows in" in text
