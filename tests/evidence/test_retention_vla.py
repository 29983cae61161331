"""The benchmark of a robot policy: a step of each method, what runs are summed up to, the command at a tiny size."""

import csv
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")

from _paths import RESULTS
from vla import command, figure, methods, runs, summary
from vla.methods import METHODS, Method

from craft_optim import Retention
from craft_optim.anchors.sampling import AnchorSampler
from craft_optim.evaluation.statistics import wilson


class Point(nn.Module):
    """A policy whose loss is `slope @ x`."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        return batch["slope"] @ self.x, {}


@pytest.mark.evidence
@pytest.mark.parametrize(("every", "gradients"), [(1, [0.25, 0.25, 0.25]), (2, [0.4, 0.1, 0.4])])
def test_the_added_term_counts_k_fold_on_every_kth_step(every, gradients):
    policy, batch = Point(), {"slope": torch.tensor([0.1, 0.0])}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    step = methods.penalised_step(policy, lambda: 0.3 * policy.x[0], 0.5, every, optimizer, scheduler)
    found = []
    for number in range(3):
        before = policy.x.detach().clone()
        assert step(number, batch) == pytest.approx(float(batch["slope"] @ before)), "the loss on the new task alone"
        found.append(float((before - policy.x.detach())[0]))
    assert found == pytest.approx(gradients)
    assert scheduler.last_epoch == 3


@pytest.mark.evidence
def test_the_sum_is_clipped_as_the_example_clips():
    policy = Point()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    step = methods.penalised_step(policy, lambda: 4.0 * policy.x[1], 1.0, 1, optimizer, scheduler)
    step(0, {"slope": torch.tensor([3.0, 0.0])})
    assert (-policy.x).tolist() == pytest.approx([0.6, 0.8], rel=1e-4)


@pytest.mark.evidence
def test_weight_and_k_are_those_of_the_method(monkeypatch):
    monkeypatch.setattr(methods, "penalised_step", lambda *given: given)
    method, term = Method("kl", 5, 10.0), object()
    policy = Point()
    assert methods.make_step(method, policy, term, methods.arguments(method, steps=7))[:4] == (policy, term, 10.0, 5)


@pytest.mark.evidence
def test_replay_takes_the_next_anchors_and_their_labels():
    frames = SimpleNamespace(train_batch=lambda rows: {"slope": torch.tensor([float(rows.sum()), 0.0])})
    policy, rows = Point(), torch.tensor([10, 20, 30, 40])
    policy.x.data[0] = 1.0
    sampler = AnchorSampler(4, 3, seed=5)
    loss = runs.replay(policy, frames, rows, sampler)
    assert [float(loss()) for _ in range(3)] == [float(rows[sampler.indices(n)].sum()) for n in range(3)]


@pytest.mark.evidence
def test_every_kind_with_anchors_runs_at_both_k():
    assert len({method.name for method in METHODS}) == len(METHODS)
    for kind, strengths in (("replay", {1.0}), ("kl", {0.1, 1.0, 10.0}), ("logits", {0.03}), ("hidden", {0.005})):
        found = {(method.strength, method.every) for method in METHODS if method.kind == kind and not method.heldout}
        swept = {(0.05, 1), (0.1, 1), (0.03, "auto"), (0.05, "auto")} if kind == "logits" else set()
        assert found == {(strength, every) for strength in strengths for every in (1, 5)} | swept


@pytest.mark.evidence
def test_names_of_files_say_the_strength_that_is_not_usual():
    names = {(m.kind, m.strength, m.every): m.name for m in METHODS}
    assert names["kl", 1.0, 5] == "kl-1-every-5"
    assert (names["logits", 0.03, 1], names["logits", 0.05, 1]) == ("logits-every-1", "logits-0.05-every-1")
    assert (names["plain", 0.0, 0], names["replay", 1.0, 5]) == ("plain", "replay-every-5")
    assert (names["logits", 0.03, "auto"], names["logits", 0.2, "auto"]) == (
        "logits-every-auto",
        "logits-0.2-every-auto-heldout",
    )


@pytest.mark.evidence
def test_epsilon_may_be_that_of_held_out_frames():
    """The one change: what is held out is the constraint's, and the rest is as in other runs."""

    class Drift(Retention):
        def loss(self, number):
            return policy.x.square().sum()

        def drift(self, anchors=None, count=None):
            asked.append((anchors, count))
            return 0.02

    policy, asked, aside = Point(), [], object()
    policy.x.data[0] = 0.1
    method = Method("logits", "auto", 0.2, heldout=True)
    args, of_optimizers = methods.arguments(method, steps=3), []

    def take(policy, batch, optimizer, scheduler):
        of_optimizers.append((optimizer, scheduler))
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.craft, "train_step", take)
        for which in (method, replace(method, heldout=False)):
            methods.make_step(which, policy, Drift(), args, aside)(0, {})
    (ours, schedule), (theirs, their_schedule) = of_optimizers
    assert schedule.get_last_lr() == their_schedule.get_last_lr() == [args.lr / 50]
    assert ours.rules == theirs.rules
    assert [one.constraints[None].epsilon(0) for one in (ours, theirs)] == [0.2, 0.2]
    step = methods.make_step(method, policy, Drift(), args, aside)
    for number in range(3):
        step(number, {"slope": torch.tensor([-0.1, 0.0])})
    assert {anchors for anchors, _ in asked} == {aside}


def test_what_is_judged_is_not_what_epsilon_is_steered_by():
    method = Method("logits", "auto", 0.2, heldout=True)
    row = summary.summarise(method, [run_of(method, seed, drift_logits_judged=0.1 * (seed + 1)) for seed in (0, 1)])
    assert row["over_epsilon_per_seed"] == pytest.approx([0.5, 1.0])


@pytest.mark.evidence
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_runs_differ_in_their_method_alone(method):
    args, plain = (vars(methods.arguments(which, steps=7)) for which in (method, Method("plain")))
    changed = {key: value for key, value in args.items() if value != plain[key]}
    expected = {}
    if method.is_craft:
        own = {"retention": method.kind, "epsilon": method.strength, "retention_every": method.every}
        expected = {key: value for key, value in own.items() if value != plain[key]}
    assert changed == expected
    assert args["steps"] == 7


def run_of(method, seed, drift=0.1, **more):
    drifts = {name: drift * factor for name, factor in zip(summary.DRIFTS, (1, 2, 3, 4), strict=True)}
    run = {"method": method.name, "seed": seed, "old_ce": 1.0 + seed, "new_ce": 2.0 + seed}
    run["drift_logits_judged"] = drift
    return run | {"old_success": [True, True], "new_success": [False, True]} | drifts | more


def test_a_row_is_a_mean_over_seeds():
    method = Method("hidden", 5, 0.1)
    first = run_of(method, 0, 0.1, costs=[1.0, 2.0, 9.0], old_success=[True, False, False])
    second = run_of(method, 2, 0.2, costs=[3.0, 4.0], old_success=[True, True, True])
    row = summary.summarise(method, [first, second])
    assert (row["name"], row["every"], row["strength"], row["seeds"]) == ("hidden-0.1-every-5", 5, 0.1, [0, 2])
    assert row["old_success"] == pytest.approx(4 / 6)
    assert row["old_success_interval"] == wilson(4, 6)
    assert row["old_success_per_seed"] == pytest.approx([1 / 3, 1.0])
    assert row["new_success"] == 0.5
    assert (row["old_ce"], row["new_ce"]) == (2.0, 3.0)
    assert row["drift_logits_anchors"] == pytest.approx(0.15)
    assert row["drift_logits_heldout_per_seed"] == pytest.approx([0.2, 0.4])
    assert row["over_epsilon_per_seed"] == pytest.approx([3.0, 6.0]), "of hidden states, for anchors of hidden states"
    assert row["cost"] == 3.0
    assert row["cost_spread"] == pytest.approx((6.5 - 1.5) / 2)


def test_what_was_not_measured_is_not_there():
    before = {key: value for key, value in run_of(Method("pretrained"), 0).items() if "success" not in key}
    row = summary.summarise(Method("pretrained"), [before])
    assert [row[key] for key in ("old_success", "new_success_interval", "over_epsilon_per_seed", "cost")] == [None] * 4
    assert summary.cells(row)[3:5] == ["skipped"] * 2
    assert summary.cells(row)[-1] == "-"


@pytest.fixture
def result():
    found = [run_of(m, seed, 0.1 * (place + 1), costs=[1.5]) for place, m in enumerate(METHODS) for seed in (0, 1)]
    found = [run for run in found[::-1] if run["method"] != "kl-1-every-5"]
    tasks = {"old": "drawer", "new": "button"}
    return {"tasks": tasks, "epsilon": 0.03, "rows": summary.rows_of(found), "runs": found}


def test_rows_of_what_there_is(result, tmp_path):
    assert [row["name"] for row in result["rows"]] == [m.name for m in METHODS if m.name != "kl-1-every-5"]
    lines = summary.markdown(result).splitlines()
    assert len(lines) == 2 + len(result["rows"])
    assert {line.count("|") for line in lines} == {len(summary.COLUMNS) + 1}
    assert lines[3].startswith(
        "| AdamW | - | 2 | 1.00 [0.51, 1.00] | 0.50 [0.15, 0.85] | 0.2000 | 0.4000 | - | 1.500 |"
    )
    (craft,) = [line for line in lines if line.startswith("| CRaFT, logits, epsilon 0.03 | 5 |")]
    assert "| 40.00 to 40.00 |" in craft
    summary.write_csv(result["rows"], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["name"] for row in found] == [row["name"] for row in result["rows"]]
    assert float(found[0]["old_success_low"]) == wilson(4, 4)[0]
    assert (found[0]["seeds"], float(found[1]["drift_hidden_heldout"])) == ("2", pytest.approx(0.8))


@pytest.mark.evidence
def test_the_picture_has_every_method_in_its_place(result, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **given: drawn.append((self, path)))
    figure.draw(result, tmp_path / "x.png")
    ((made, path),) = drawn
    over, success, drift = made.axes
    assert path == tmp_path / "x.png"
    assert [bars.get_label() for bars in over.containers[:3]] == ["before", "AdamW", "replay with labels, K = 1"]
    assert over.containers[0].lines[0].get_xydata().tolist() == [[0.5, 1.0]]
    names = [text.get_text() for text in success.get_yticklabels()]
    assert names == [bars.get_label() for bars in over.containers[1:]], "what was not trained has no drift"
    assert [bars.lines[0].get_xydata().tolist() for bars in success.containers[:2]] == [[[1.0, -0.15]], [[0.5, 0.15]]]
    assert drift.lines[0].get_xydata() == pytest.approx(torch.tensor([[0.2, 0.0], [0.4, 0.0]]).numpy())


@pytest.mark.evidence
def test_bad_input_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--rollouts=51"])
    assert "--rollouts must be in 0 to 50" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"`--work` has no finished run\. Found .*nothing"):
        command.main(["--only-report", f"--work={tmp_path / 'nothing'}", f"--results={tmp_path}"])


def test_a_tiny_one(tmp_path, monkeypatch, capsys):
    load_task = methods.craft.load_task

    def few_frames(*given):
        task = load_task(*given)
        task.frames.train_indices, task.frames.heldout_indices = torch.arange(48), torch.arange(200, 232)
        return task

    monkeypatch.setattr(methods.craft, "load_task", few_frames)
    monkeypatch.setattr("retention_budget.ROUND", 2)
    work, results = tmp_path / "work", tmp_path / "results"
    tiny = [
        "--seeds=1",
        "--steps=2",
        "--rounds=1",
        "--rollouts=0",
        "--episodes=5",
        f"--work={work}",
        f"--results={results}",
    ]
    frames, anchors = [], []
    rows_of_step, indices = methods.craft.rows_of_step, AnchorSampler.indices
    monkeypatch.setattr(methods.craft, "rows_of_step", lambda *given: frames.append(given[1:]) or rows_of_step(*given))
    monkeypatch.setattr(AnchorSampler, "indices", lambda self, at: anchors.append((self.seed, at)) or indices(self, at))

    command.main([*tiny, "--methods", "replay-every-1"])
    of_replay = {"frames": set(frames), "anchors": set(anchors)}
    monkeypatch.setattr(command, "METHODS", METHODS[::-1])
    result = command.main([*tiny, "--methods", "replay-every-1", "hidden-every-1", "pretrained"])
    assert {"frames": set(frames), "anchors": {(seed, at) for seed, at in anchors if at < 4}} == of_replay
    assert "replay-every-1-seed0: done before" in capsys.readouterr().out

    before, replay, hidden = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["pretrained", "replay-every-1", "hidden-every-1"]
    assert all(before[name] < 1e-6 < min(replay[name], hidden[name]) for name in summary.DRIFTS), "each starts anew"
    assert replay["drift_logits_anchors"] != hidden["drift_logits_anchors"] != hidden["drift_logits_heldout"]
    assert hidden["over_epsilon_per_seed"] == [hidden["drift_hidden_anchors"] / 0.005]
    assert replay["cost"] > 1.3, "twice the frames"
    assert (work / "policies" / "hidden-every-1-seed0" / "model.safetensors").is_file()
    assert json.loads((results / "retention_vla.json").read_text()) == json.loads(json.dumps(result))
    assert (results / "retention_vla.png").stat().st_size > 10_000
    assert (results / "retention_vla.csv").is_file()

    monkeypatch.setattr(command, "Bench", None)  # nothing is loaded where nothing has to run
    assert command.main(["--only-report", f"--work={work}", f"--results={results}"]) == result


def test_the_page_has_the_table_of_the_kept_results():
    kept = json.loads((RESULTS / "retention_vla.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(summary.rows_of(kept["runs"]))) == kept["rows"]
    text = command.PAGE.read_text(encoding="utf-8")
    expected = command.with_table(text, summary.markdown(kept), command.BEGIN, command.END)
    assert expected == text, f"run python benchmarks/evidence/{command.NAME}.py --only-report"


def test_numbers_of_the_text_are_those_of_the_table():
    text = command.PAGE.read_text(encoding="utf-8")
    table = text.split(command.BEGIN)[1].split(command.END)[0]
    said = set(re.findall(r"\d+\.\d+", text.split("### What one task shows")[1])) - {"0.03"}
    assert len(said) > 10
    assert said <= set(re.findall(r"\d+\.\d+", table))
