"""The page of planned numbers is what the generator makes of those that are kept."""

from plan_pi0_fast import BATCHES, BEGIN, END, PAGE, read_results, render, with_table


def test_the_page_has_the_numbers_that_were_planned():
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text, render(read_results()), BEGIN, END) == text, "run python benchmarks/plan_pi0_fast.py"


def test_every_dtype_and_batch_is_there():
    kept = read_results()
    assert set(kept) == {f"{dtype}, B = {size}" for dtype in ("bfloat16", "float32") for size in BATCHES}
    assert all(3.4e9 < plan["parameters"] < 3.5e9 and plan["head_left_out"] for plan in kept.values())
