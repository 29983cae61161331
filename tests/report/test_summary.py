"""What is said of a run."""

import dataclasses
import re

import numpy as np
import pytest

from craft_optim._warn import CraftWarning
from craft_optim.report.runs import read_file
from craft_optim.report.summary import _REMEDY, judge, judge_all, summarise


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
    above = np.nan_to_num(run["retention_loss"]) > 0.05
    assert found.violated == pytest.approx(above.sum() / 100)
    assert found.stuck == (above & (run["capped"] == 1)).sum() > 0
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
    assert (found.source, found.drift, found.violated, found.stuck) == ("average", pytest.approx(0.07), 1.0, 50)
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
    assert judge(found).words == "Drift on held-out anchors ended at 0.1, 1.00 x epsilon: held."
    measured = np.where(np.arange(100) == 99, 0.16, np.nan)
    found = judge(summarise(changed(run, drift_heldout=measured, drift_anchors=0.025)))
    assert found.kind == "not held"
    assert found.words.startswith("Drift on held-out anchors ended at 0.16, 1.60 x epsilon: not held.")
    far = summarise(changed(run, heldout=0.2, epsilon=0.1 / 30))
    assert (far.violated, far.out_of_reach) == (1.0, True)
    assert "more than 30 times the drift on the anchors" in judge(far).words
    unknown = summarise(changed(run, heldout=np.nan))
    assert (unknown.source, unknown.ratio) == ("average", pytest.approx(1.0))


@pytest.mark.parametrize(
    ("final", "kind", "said"),
    [
        (1.0, "held", r"^Drift ended at 0\.0499, 1\.00 x epsilon: held\.$"),
        (0.5, "inactive", r"0\.5\d x epsilon: held, with room\."),
        (1.2, "not held", r"1\.2\d x epsilon: not held\."),
        (2.0, "not held", r"[12]\.\d\d x epsilon: not held\."),
    ],
)
def test_verdicts(run_of, final, kind, said):
    found = judge(summarise(run_of(final=final)))
    assert found.kind == kind
    assert re.search(said, found.words), found.words


def test_why_it_was_not_held(run_of):
    run = run_of(final=2.0)
    words = judge(summarise(changed(run, capped=1.0))).words
    stuck = int((run["retention_loss"] > 0.05).sum())
    assert f"Lambda sat at its cap, and drift above epsilon, for {stuck} of 100 retention steps: raise epsilon" in words
    assert "Lambda had not come to rest after 100 retention steps" in judge(summarise(run)).words
    assert "12 retention passes were not finite" in judge(summarise(changed(run, skipped=12.0))).words
    falling = changed(run, retention_loss=np.linspace(1.0, 0.2, 100))
    assert "still coming down" in judge(summarise(falling)).words


def test_remarks_on_runs_that_held(run_of):
    run = changed(run_of(), drift_anchors=0.05)
    assert judge(summarise(changed(run, drift_heldout=0.1))).words.endswith("held.")
    far = judge(summarise(changed(run, drift_heldout=0.8, skipped=2.0)))
    assert far.kind == "held"
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
    assert both.words.startswith("Held in 2 of 3 runs, from 0.5")
    assert "The largest: drift ended at" in both.words
    assert judge_all(found[:1]) == judge(found[0])
    plain = summarise(changed(run_of(epsilon=None), drift_anchors=2.5))
    assert judge_all([plain, plain]).words == "Nothing was constrained: drift ended from 2.5 to 2.5 in 2 runs."


def test_one_row(run_of):
    found = summarise(run_of(steps=1))
    assert (found.steps, found.retention_steps, found.ms_per_step) == (0, 1, None)
    assert judge(found).kind == "inactive"


def test_the_remedy_is_the_optimizers():
    """The same advice, in the same order, as the warning while a run is at it."""
    import torch

    from craft_optim import CraftOptimizer

    weight = torch.nn.Parameter(torch.ones(1))
    stuck = CraftOptimizer(
        torch.optim.SGD([weight], lr=0.0), lambda: weight.square().sum(), epsilon=1e-3, retention_every=2
    )
    with pytest.warns(CraftWarning, match="at its cap") as caught:  # noqa: PT031 - it comes on the 50th pass
        for _ in range(120):
            weight.grad = torch.ones(1)
            stuck.step()
    said = str(caught[0].message)
    places = [said.index(part.removeprefix("or ")) for part in _REMEDY.split(", ")]
    assert places == sorted(places)
