"""What is said of a run."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from craft_optim.report.runs import read_file
from craft_optim.report.summary import judge, judge_all, summarise

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_of(tmp_path, rows, write):
    def made(**settings):
        return read_file(write(tmp_path / "m.jsonl", rows(**settings)))[0]

    return made


def changed(run, **columns):
    """The run with other columns; a number stands for all rows."""
    full = {name: np.broadcast_to(np.asarray(x, float), run.steps.shape) for name, x in columns.items()}
    return dataclasses.replace(run, columns={**run.columns, **full})


def test_numbers(run_of):
    run = changed(run_of(steps=200, every=2), capped=[i % 4 == 0 for i in range(200)], skipped=np.arange(200) // 50)
    found = summarise(run)
    assert (found.steps, found.retention_steps, found.skipped) == (199, 100, 3)
    assert found.drift == pytest.approx(0.05, rel=0.02)
    assert found.ratio == pytest.approx(1.0, rel=0.02)
    assert found.source == "batches"
    assert found.passes is None, "these rows do not say"
    assert (found.violated, found.peak) == (0.0, pytest.approx(np.nanmax(run["retention_loss"]) / 0.05))
    beyond = changed(run, epsilon=0.03, capped=1.0)
    above = np.nan_to_num(run["retention_loss"]) > 1.1 * 0.03
    found_beyond = summarise(beyond)
    assert found_beyond.violated == pytest.approx(above.sum() / 100)
    assert (found_beyond.late, found_beyond.stuck) == (25, above[-50:].sum()) == (25, 25)
    assert found.capped == 0.25
    assert found.ms_per_step == pytest.approx(250.0)
    assert found.loss == pytest.approx(run["loss"][-20:].mean())
    assert found.cosine == pytest.approx(-0.2)


def test_drift_over_many_anchors_goes_first(run_of):
    run = run_of()
    measured = np.full(100, np.nan)
    measured[[0, 50, 90]] = 0.0, 0.2, 0.07
    found = summarise(changed(run, drift_anchors=measured, drift_heldout=3 * measured))
    assert (found.drift, found.heldout, found.source) == (0.07, pytest.approx(0.21), "anchors")


def test_the_average_is_what_epsilon_is_held_against(run_of):
    run = run_of()
    batches = np.where(np.arange(100) % 10 == 0, 0.52, 0.02)  # their median is in the budget, their mean is not
    noisy = changed(run, retention_loss=batches, drift=0.07, capped=np.arange(100) % 2)
    found = summarise(noisy)
    assert (found.source, found.drift, found.violated) == ("average", pytest.approx(0.07), 1.0)
    assert (found.late, found.stuck) == (25, 13), "of the last quarter, which says why"
    assert judge(found).kind == "not held"
    found = summarise(changed(noisy, drift=0.05))
    assert (found.violated, found.stuck, judge(found).kind) == (0.0, 0, "held")
    found = summarise(changed(noisy, capped=0.0, drift=np.linspace(1.0, 0.2, 100)))
    assert "still coming down" in judge(found).words
    found = summarise(changed(noisy, drift_anchors=0.06))
    assert (found.source, found.drift) == ("anchors", 0.06)


def test_passes_as_a_share_of_the_steps(tmp_path, run_of, rows, write):
    assert summarise(run_of(steps=200, every=4, averages=True)).passes == 0.25
    intervals = [1] * 40 + [1, 2, 2, 3, 5, 10, 10]
    steps = np.concatenate([[0], np.cumsum(intervals)])[:-1]
    passes = [
        {"retention_step": float(s), "retention_loss": 0.1, "interval": k}
        for s, k in zip(steps, intervals, strict=True)
    ]
    assert summarise(read_file(write(tmp_path / "passes.jsonl", passes))[0]).passes == 47 / 73
    del passes[44]
    assert summarise(read_file(write(tmp_path / "skipped.jsonl", passes))[0]).passes == 46 / 73
    every_tenth = rows(averages=True)[::10]  # as a Trainer logs
    assert summarise(read_file(write(tmp_path / "tenth.jsonl", every_tenth))[0]).passes is None


def test_epsilon_of_held_out_anchors(run_of):
    told = np.where(np.arange(100) < 5, np.nan, 0.1)  # it is measured after some passes
    run = changed(run_of(averages=True), drift=0.025, epsilon=0.025, epsilon_heldout=0.1, heldout=told)
    found = summarise(run)
    assert (found.source, found.drift, found.heldout, found.epsilon) == (
        "heldout",
        pytest.approx(0.1),
        found.drift,
        0.1,
    )
    assert (found.violated, found.out_of_reach) == (0.0, False)
    assert judge(found).words == (
        "Drift on held-out anchors ended at 0.1, 1 x epsilon (0.1): held. On the way it was above 1.1 x epsilon on no "
        "step."
    )
    measured = np.where(np.arange(100) == 99, 0.16, np.nan)
    found = judge(summarise(changed(run, drift_heldout=measured, drift_anchors=0.025)))
    assert found.kind == "not held"
    assert found.words.startswith("Drift on held-out anchors ended at 0.16, 1.6 x epsilon (0.1): not held.")
    far = summarise(changed(run, heldout=0.2, epsilon=0.1 / 30))
    assert (far.violated, far.out_of_reach) == (1.0, True)
    assert "more than 30 times the drift on the anchors" in judge(far).words
    capped = judge(summarise(changed(run, heldout=0.2, drift=0.04, capped=1.0))).words
    assert "Lambda was at its cap, and drift on the anchors above its own epsilon, in all of the last 25" in capped
    assert "lower the learning rate; use more anchors, and more varied ones; raise epsilon to 0.2, where" in capped
    unknown = summarise(changed(run, heldout=np.nan))
    assert (unknown.source, unknown.ratio) == ("average", pytest.approx(1.0))


@pytest.mark.parametrize(
    ("final", "kind", "said"),
    [
        (1.0, "held", r"^Drift ended at 0\.0499, 0\.999 x epsilon \(0\.05\): held\. On the way .* on no step\.$"),
        (0.5, "inactive", r"0\.499 x epsilon \(0\.05\): held, with room: 50 % of epsilon was left\."),
        (1.2, "not held", r"1\.2 x epsilon \(0\.05\): not held\."),
        (2.0, "not held", r"2 x epsilon \(0\.05\): not held\."),
    ],
)
def test_verdicts(run_of, final, kind, said):
    found = judge(summarise(run_of(final=final)))
    assert found.kind == kind
    assert re.search(said, found.words), found.words


def test_the_verdict_is_about_the_whole_run(run_of):
    run = run_of(averages=True)
    late = changed(run, drift=np.where(np.arange(100) < 66, 0.2, 0.05))
    found = summarise(late)
    assert (found.violated, found.peak) == (0.66, pytest.approx(4.0))
    verdict = judge(found)
    assert verdict.kind == "late"
    assert verdict.words == (
        "Drift ended at 0.05, 1 x epsilon (0.05): held at the end. On the way it was above 1.1 x epsilon for 66 % of "
        "the steps, at most 4 x. If the final model alone counts, that is no trouble; if not, lower the learning rate."
    )
    room = judge(summarise(changed(run, drift=np.where(np.arange(100) < 66, 0.2, 0.02))))
    assert room.kind == "late"
    assert "held at the end; 60 % of epsilon was left. On the way" in room.words
    early = judge(summarise(changed(run, drift=np.where(np.arange(100) < 10, 0.2, 0.05))))
    assert early.kind == "held"
    assert early.words.endswith("held. On the way it was above 1.1 x epsilon for 10 % of the steps, at most 4 x.")


def test_rows_stand_for_the_steps_until_the_next(tmp_path, write):
    """Passes are dense where drift is above epsilon: as a share of the passes it would be 10 of 19."""
    steps = [*range(10), *range(10, 100, 10)]
    content = [
        {"retention_step": s, "retention_loss": 0.1, "drift": 0.5 if s < 10 else 0.1, "epsilon": 0.1} for s in steps
    ]
    assert summarise(read_file(write(tmp_path / "m.jsonl", content))[0]).violated == pytest.approx(0.1)


def test_drift_of_long_ago_is_not_that_of_the_end(run_of):
    run = run_of(averages=True)
    measured = np.where(np.arange(100) == 60, 0.03, np.nan)
    found = summarise(changed(run, drift_anchors=measured, drift_heldout=2 * measured, drift=0.05))
    assert (found.source, found.drift) == ("average", pytest.approx(0.05))
    assert (found.heldout, found.heldout_step) == (0.06, 60)
    plain = changed(run_of(epsilon=None), drift_anchors=measured)
    assert (summarise(plain).source, summarise(plain).drift) == ("anchors", 0.03), "there is no other"


def test_why_it_was_not_held(run_of):
    run = run_of(final=2.0)
    stuck = judge(summarise(changed(run, capped=1.0))).words
    assert "Lambda was at its cap, and drift above 1.1 x epsilon, in all of the last 25 passes." in stuck
    assert stuck.endswith(
        "Try in this order: lower the learning rate; raise epsilon to 0.0999, where drift is; raise rho, at the "
        "expense of the new task."
    )
    free = judge(summarise(run)).words
    assert free.endswith(
        "Lambda had not come to rest after 100 passes. Try in this order: lower the learning rate; raise epsilon to "
        "0.0999, where drift is."
    ), "rho is in no one's way"
    assert "12 passes were not finite" in judge(summarise(changed(run, skipped=12.0))).words
    falling = changed(run, retention_loss=np.linspace(1.0, 0.2, 100))
    assert "still coming down: train for longer, or let the learning rate decay." in judge(summarise(falling)).words
    assert judge(summarise(changed(falling, lr=np.linspace(1.0, 0.0, 100)))).words.endswith("train for longer.")


def test_advice_is_of_the_run_and_in_the_order_that_helps(run_of):
    """As docs/troubleshooting.md has it, less what the run has done already."""
    stuck = changed(run_of(final=2.0), capped=1.0, interval=5.0, lr=1e-4)
    words = judge(summarise(stuck)).words
    advice = ["let the learning rate decay", "retention_every", "lower the learning rate", "raise epsilon", "raise rho"]
    places = [words.index(part) for part in advice]
    assert places == sorted(places)
    docs = (ROOT / "docs" / "troubleshooting.md").read_text()
    section = docs.partition("## Drift stays above epsilon, lambda at its cap")[2].partition("\n## ")[0].lower()
    section = section[section.index("\n1. ") :]
    written = ["the learning rate to decay", "`retention_every`", "lower the learning rate", "raise epsilon"]
    places = [section.index(part) for part in [*written, "raise `rho`"]]
    assert places == sorted(places)
    decayed = judge(summarise(changed(stuck, lr=np.linspace(1.0, 0.1, 100), interval=1.0))).words
    assert "decay" not in decayed
    assert "retention_every" not in decayed


def test_remarks_on_runs_that_held(run_of):
    run = changed(run_of(), drift_anchors=0.05)
    assert judge(summarise(changed(run, drift_heldout=0.1))).kind == "held"
    far = judge(summarise(changed(run, drift_heldout=0.8, skipped=2.0)))
    assert far.kind == "narrow", "on the anchors, and on no others"
    assert "Drift is 0.8 on held-out anchors, 0.05 on those that are trained on" in far.words
    assert "not finite: 2." in far.words


def test_without_a_constraint(run_of):
    plain = run_of(epsilon=None)
    assert judge(summarise(plain)).words == "Nothing was constrained, and no drift was measured."
    found = judge(summarise(changed(plain, drift_anchors=2.5)))
    assert (found.kind, found.words) == ("free", "Nothing was constrained: drift ended at 2.5.")
    assert judge(summarise(changed(run_of(), epsilon=0.0))).kind == "free", "no ratio to a drift of 0"


def test_several_seeds(run_of):
    found = [summarise(run_of(final=x)) for x in (1.0, 2.0, 0.5)]
    both = judge_all(found)
    assert both.kind == "not held"
    assert both.words.startswith(
        "Held at the end in 2 of 3 runs, drift from 0.499 to 2 x epsilon, median 0.999. The worst: drift ended at "
        "0.0999, 2 x epsilon (0.05): not held."
    )
    late = dataclasses.replace(found[2], violated=0.5)
    assert judge_all([found[0], late]).kind == "late", "though the other one ended higher"
    assert judge_all(found[:1]) == judge(found[0])
    plain = summarise(changed(run_of(epsilon=None), drift_anchors=2.5))
    assert judge_all([plain, plain]).words == "Nothing was constrained: drift ended from 2.5 to 2.5 in 2 runs."


def test_one_row(run_of):
    found = summarise(run_of(steps=1))
    assert (found.steps, found.retention_steps, found.ms_per_step) == (0, 1, None)
    assert judge(found).kind == "inactive"


@pytest.mark.parametrize("count", [12, 18, 100])
def test_the_end_of_a_short_log_is_its_end(run_of, count):
    """A Trainer writes few rows: what was long ago is no part of the end."""
    run = run_of(steps=count)
    rising = np.where(np.arange(count) < 0.9 * count - 1, 0.001, 0.9)
    found = summarise(changed(run, drift=rising, retention_loss=rising, loss=rising, epsilon=0.05))
    assert (found.drift, found.loss) == (pytest.approx(0.9), pytest.approx(0.9))
    assert judge(found).kind == "not held"


def test_steps_that_were_cut_are_told_of(run_of):
    run = changed(run_of(), drift=0.05)
    assert "trust region" not in judge(summarise(changed(run, step_kept=0.8))).words
    words = judge(summarise(changed(run, step_kept=[0.25, 0.75] * 50))).words
    assert "the trust region left 50 % of the steps" in words
