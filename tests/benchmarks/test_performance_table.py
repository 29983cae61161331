"""The page of measured performance is what the generator makes of the run that is kept."""

import pytest
from performance_table import (
    BEGIN,
    DEVICES,
    END,
    LEGEND,
    LINES,
    NOT_MEASURED,
    PAGE,
    Line,
    promise_of,
    read_results,
    render,
    results_of,
    updated,
    with_table,
)


def test_the_page_has_the_numbers_of_the_run():
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, render(read_results())) == text, "run python benchmarks/performance_table.py"


def test_every_line_finds_its_number():
    """A benchmark that got another name would be "not measured" for ever."""
    results = read_results()
    assert "cpu" in results
    for device, kept in results.items():
        measured = {row["name"] for row in kept["rows"]}
        assert {line.name for line in LINES if device in line.devices} <= measured


def test_lines_are_about_different_things():
    names = [line.name for line in LINES]
    assert len(set(names)) == len(names)
    assert all(set(line.devices) <= set(DEVICES) for line in LINES)


def run_of(*rows, **machine):
    """pytest-benchmark's JSON of a run, what of it is read and some of what is not."""
    of_run = {
        "device": "cpu", "device_name": "Fast CPU", "torch": "2.11", "threads": 1, "python_version": "3.12",
        "compiler": "c++ 14", "system": "Linux", "node": "my-computer", "cpu": {"brand_raw": "Fast CPU"},
    }  # fmt: skip
    benchmarks = [
        {"group": "surgery", "name": "test_it", "stats": {"data": [1.0]}, "extra_info": {"rows": [row]}} for row in rows
    ]
    benchmarks.append({"group": "other", "extra_info": {}})
    return {"machine_info": of_run | machine, "commit_info": {}, "benchmarks": benchmarks}


def row(name, value, cpu=None):
    return {"name": name, "value": value, "cpu": cpu, "unit": "x"}


def test_what_is_kept_of_a_run():
    kept = results_of(run_of(row("a", 1.5), row("b", 2.5)))
    assert [(x["group"], x["name"], x["value"]) for x in kept["rows"]] == [("surgery", "a", 1.5), ("surgery", "b", 2.5)]
    assert kept["machine"]["device_name"] == "Fast CPU"
    assert kept["machine"]["torch"] == "2.11"
    assert "my-computer" not in repr(kept)


def test_two_rows_of_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"Found twice: a\. Rename"):
        results_of(run_of(row("a", 1.5), row("b", 2.5), row("a", 2.5)))


def of_groups(torch_version, **rows):
    """Results with a row of each group."""
    machine = results_of(run_of(torch=torch_version))["machine"]
    return {"machine": machine, "rows": [{"group": group, **row(group, value)} for group, value in rows.items()]}


def test_a_run_of_some_groups_replaces_these():
    old = of_groups("2.11", surgery=1.0, memory=2.0)
    assert updated(old, of_groups("2.11", memory=3.0)) == of_groups("2.11", surgery=1.0, memory=3.0)
    assert updated(old, of_groups("2.12", memory=3.0, surgery=4.0)) == of_groups("2.12", memory=3.0, surgery=4.0)
    assert updated(None, old) == old


def test_numbers_of_two_installations_are_not_mixed():
    with pytest.raises(ValueError, match=r"memory only.*\(torch differ\).*make bench"):
        updated(of_groups("2.11", surgery=1.0, memory=2.0), of_groups("2.12", memory=3.0))


def test_committed_results_do_not_name_the_machine():
    for kept in read_results().values():
        assert set(kept["machine"]) == set(results_of(run_of())["machine"])


@pytest.mark.parametrize(
    ("line", "values", "expected"),
    [
        (Line("s", "kept", "a", promise=1.5), {"cpu": 1.42}, "| kept | 1.42 | not measured | <= 1.5 |"),
        (Line("s", "as shown", "a", promise=1.5), {"cpu": 1.5004}, "| as shown | 1.50 | not measured | <= 1.5 |"),
        (Line("s", "broken", "a", promise=1.5), {"cpu": 1.51}, "| broken | **1.51** | not measured | <= 1.5 |"),
        (Line("s", "elsewhere", "a", promise=1.5, promised_on="cuda"), {"cpu": 9.0, "cuda": 9.0},
         "| elsewhere | 9.00 | **9.00** | <= 1.5 (CUDA) |"),
        (Line("s", "only there", "a", ("cuda",)), {"cpu": 9.0}, "| only there | - | not measured |  |"),
        (Line("s", "in us", "a", promise=20.0, unit=" us"), {"cpu": 123.4},
         "| in us | **123 us** | not measured | <= 20 us |"),
    ],
)  # fmt: skip
def test_one_line(line, values, expected):
    results = {device: results_of(run_of(row(line.name, value), device=device)) for device, value in values.items()}
    assert expected in render(results, [line]).splitlines()


def test_processor_time_counts_on_a_cpu_and_the_clock_on_a_gpu():
    results = {device: results_of(run_of(row("a", 3.0, cpu=1.0), device=device)) for device in DEVICES}
    assert "| both | 1.00 | 3.00 |  |" in render(results, [Line("s", "both", "a")]).splitlines()


def test_sections_and_machines():
    lines = [Line("first", "x", "a"), Line("first", "y", "b"), Line("second", "z", "c")]
    text = render({"cpu": results_of(run_of(row("a", 1.0), threads=2, compiler=None))}, lines)
    assert [text.count(f"| *{section}* |") for section in ("first", "second")] == [1, 1]
    assert "| | CPU: Fast CPU | CUDA | promised |" in text
    assert "CPU: Fast CPU, 2 threads, Linux, Python 3.12, torch 2.11, no compiler." in text
    assert text.count(NOT_MEASURED) == 3 + 2
    assert LEGEND in text


def test_nothing_but_the_table_is_replaced():
    text = f"before\n{BEGIN}old\n{END}\nafter\n"
    assert with_table(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert with_table(with_table(text, "newer"), "new") == with_table(text, "new")


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END])
def test_a_text_without_its_marks_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        with_table(text, "new")


def test_promises_are_those_of_the_table():
    assert promise_of("step without retention, GPT-2 124M") == "<= 1.01"
    assert promise_of("surgery, GPT-2 124M, float32") == "<= 1.5"
    assert promise_of("published loop, GPT-2 124M, float32") == ""
