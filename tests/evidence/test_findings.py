"""The tables of docs/findings.md and docs/tables.md are what the commands' results say."""

import pytest
from pareto.beyond import VARIANTS
from pareto.methods import METHODS
from pareto.summary import fronts, outcomes
from steering.cases import Case
from steering.plan import BATCH, BUILDS, cases

from findings import PAGES, TABLES, marks, read_results, updated


@pytest.fixture(scope="module")
def results():
    return read_results()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_have_the_numbers_of_the_runs(results, page):
    text = page.read_text(encoding="utf-8")
    assert updated(text, PAGES[page], results) == text, "run python benchmarks/evidence/findings.py"


def test_every_table_has_its_page():
    assert sorted(name for names in PAGES.values() for name in names) == sorted(TABLES)


@pytest.mark.parametrize("name", ["retention_pareto", "beyond_the_front"])
def test_kept_results_are_those_of_their_runs(results, name):
    """What is summarised can be computed again from the runs beside it, to their five digits."""
    kept = results[name]
    rated = outcomes(kept["runs"])
    for setting, of in kept["fronts"].items():
        again = fronts(rated, setting)
        assert list(again) == list(of)
        for method, front in again.items():
            assert front.area == pytest.approx(of[method]["area"], abs=1e-3)
            assert front.at_learned == pytest.approx(of[method]["at_learned"], abs=1e-3)


@pytest.mark.evidence
def test_all_methods_and_variants_are_there(results):
    assert set(results["retention_pareto"]["fronts"]["language"]) == set(METHODS)
    assert set(results["beyond_the_front"]["fronts"]["language"]) == {"plain", "craft", "fixed", *VARIANTS}
    assert results["retention_pareto"]["command"].startswith("python benchmarks/evidence/retention_pareto.py --full")


def test_bold_is_for_more_than_two_standard_errors(results):
    differences = results["beyond_the_front"]["differences"]
    table = TABLES["variants-against-craft"](results)
    cell = differences["classes"]["mixed"]["craft"]
    value, error = cell["area"], cell["area_error"]
    text = f"{value:+.3f} ± {error:.3f}"
    row = next(line for line in table.splitlines() if line.startswith(f"| {VARIANTS['mixed'].title} |"))
    assert row.split(" | ")[1] == (f"**{text}**" if abs(value) > 2 * error else text)


@pytest.mark.evidence
def test_all_runs_of_the_knob_are_there(results):
    kept = results["knob"]
    for build in BUILDS:
        found = [
            Case(**{key: row[key] for key in Case.__dataclass_fields__})
            for row in kept["runs"]
            if row["build"] == build
        ]
        assert found == cases(list(BATCH), kept["seeds"], build)


@pytest.mark.evidence
def test_marks_are_on_the_page_once():
    for page, names in PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert all(text.count(mark) == 1 for name in names for mark in marks(name))
