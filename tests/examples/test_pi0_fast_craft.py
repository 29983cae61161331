"""The main example, shortened: the real policy, the shipped demonstrations, a few steps."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")

import pi0_fast_craft as example
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
from metaworld_pi0_fast.pictures import draw_success
from metaworld_pi0_fast.policy import load_policy
from metaworld_pi0_fast.summary import Outcome, print_table, summarise
from rich.console import Console

SHORT = ["--dataset.episodes=2", "--batch-size=4", "--anchor-batch-size=4", "--save-every=3", "--steps=6"]
FIELDS = ("old_success", "new_success", "old_ce", "new_ce", "drift_anchor", "drift_heldout", "epsilon", "ms_per_step")


@pytest.fixture(autouse=True)
def _few_frames(monkeypatch):
    """One episode to train on, and one held out instead of four: evaluations take longest."""

    class FewFrames(example.PreparedFrames):
        def __init__(self, frames, preprocessor):
            super().__init__(frames, preprocessor, heldout_episodes=1)

    monkeypatch.setattr(example, "PreparedFrames", FewFrames)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "training.pt", weights_only=True)["policy"]


@pytest.mark.parametrize("retention", ["logits", "hidden"])
def test_it_runs_and_leaves_what_it_promises(tmp_path, retention):
    summary = example.main([*SHORT, "--rollouts=0", f"--retention={retention}", f"--out={tmp_path}"])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["seeds"] == [0]
    for method in ("pretrained", "adamw", "craft"):
        assert set(FIELDS) <= set(summary[method])
        assert summary[method]["old_success"] is None, "rollouts were switched off"
    assert abs(summary["pretrained"]["drift_anchor"]) < 1e-5
    assert abs(summary["pretrained"]["drift_heldout"]) < 1e-5
    assert summary["craft"]["drift_anchor"] > 3e-5
    assert summary["craft"]["epsilon"] == example.EPSILON[retention]
    assert summary["craft"]["ms_per_step"] > 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["method"], r["step"]) for r in rows] == [(m, s) for m in ("adamw", "craft") for s in range(6)]
    assert all(r["lambda"] > 0 for r in rows if r["method"] == "craft")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "Did it hold?" in (tmp_path / "report.html").read_text()
    saved = load_policy(tmp_path / "runs" / "craft-seed0" / "policy")
    for name, tensor in weights(tmp_path / "runs" / "craft-seed0").items():
        assert torch.equal(saved.state_dict()[name], tensor)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    arguments = [*SHORT, "--rollouts=0", "--methods", "craft"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    example.main([*arguments, f"--out={straight}"])

    class KilledError(Exception):
        pass

    real = example.rows_of_step

    def killed_at_five(rows, batch_size, seed, step):
        if step == 5:
            raise KilledError
        return real(rows, batch_size, seed, step)

    monkeypatch.setattr(example, "rows_of_step", killed_at_five)
    with pytest.raises(KilledError):
        example.main([*arguments, f"--out={resumed}"])
    monkeypatch.setattr(example, "rows_of_step", real)
    example.main([*arguments, "--resume", f"--out={resumed}"])

    a, b = (weights(folder / "runs" / "craft-seed0") for folder in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    varies = ("fresh", "seconds")
    rows = [
        [{k: v for k, v in json.loads(line).items() if k not in varies} for line in (f / "metrics.jsonl").open()]
        for f in (straight, resumed)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[1]] == list(range(6))


def test_another_policy_and_other_datasets(tmp_path, monkeypatch):
    # A checkpoint that `from_pretrained` loads and datasets found by repo id, as those of the hub are.
    from lerobot.utils import constants
    from metaworld_pi0_fast import policy as policies

    for name, task in (("you/keep", OLD_TASK), ("you/learn", NEW_TASK)):
        shutil.copytree(ASSETS / "demonstrations" / task, tmp_path / "home" / name)
    monkeypatch.setattr(constants, "HF_LEROBOT_HOME", tmp_path / "home")
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("lerobot.") and hasattr(module, "HF_LEROBOT_HOME"):
            monkeypatch.setattr(module, "HF_LEROBOT_HOME", tmp_path / "home")

    small = policies.load_policy(ASSETS / "pretrained")
    policies.save_policy(small, tmp_path / "policy", policies.make_processors(small, path=ASSETS / "pretrained"))
    backbone = json.loads((tmp_path / "policy" / "small_backbone.json").read_text())
    (tmp_path / "policy" / "small_backbone.json").unlink()  # now a folder like any other lerobot checkpoint
    config = tmp_path / "policy" / "config.json"
    config.write_text(config.read_text().replace('"tokenizers/', f'"{tmp_path}/policy/tokenizers/'))
    vocabulary = small.model.paligemma_with_expert.paligemma.lm_head.out_features
    with policies.small_backbone(policies.Backbone(**backbone), vocabulary):
        summary = example.main(
            [
                *SHORT,
                f"--policy.path={tmp_path / 'policy'}",
                "--dataset.repo_id=you/learn",
                "--anchors.repo_id=you/keep",
                f"--out={tmp_path / 'out'}",
            ]
        )
    assert summary["craft"]["drift_anchor"] > 1e-5
    assert summary["craft"]["old_success"] is None, "no simulator for datasets that are not the shipped ones"


def test_a_policy_needs_its_datasets(capsys):
    with pytest.raises(SystemExit):
        example.parse(["--policy.path=lerobot/pi0fast-base"])
    assert "--anchors.repo_id" in capsys.readouterr().err


def test_without_gl_the_rest_still_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "gl_backend", lambda: None)
    summary = example.main([*SHORT, "--methods", "pretrained", f"--out={tmp_path}"])
    assert summary["pretrained"]["old_success"] is None
    assert summary["pretrained"]["old_ce"] > 0
    assert "apt-get install" in capsys.readouterr().out


def test_rows_are_a_function_of_seed_and_step():
    rows = torch.arange(1000)
    first = example.rows_of_step(rows, 16, 1, 5)
    assert torch.equal(first, example.rows_of_step(rows, 16, 1, 5))
    assert not torch.equal(first, example.rows_of_step(rows, 16, 1, 6))
    assert not torch.equal(first, example.rows_of_step(rows, 16, 2, 5))


def test_summary_pools_rollouts_and_averages_the_rest():
    def outcome(seed, old, drift):
        return Outcome("craft", seed, {"drawer": old}, None, 1.0, 2.0, drift, 0.2, 100.0 + seed)

    row = summarise([outcome(0, [True] * 20, 0.1), outcome(1, [True] * 10 + [False] * 10, 0.3)], 0.2)["craft"]
    assert row["old_success"] == 0.75
    assert row["old_success_per_seed"] == [1.0, 0.5]
    # Wilson's interval for 30 of 40, from the formula.
    centre, half = (0.75 + 1.9207 / 40) / (1 + 3.8415 / 40), 0.0
    low, high = row["old_success_interval"]
    half = (high - low) / 2
    assert (low + high) / 2 == pytest.approx(centre, abs=1e-3)
    assert half == pytest.approx(0.1290, abs=2e-3)
    assert row["new_success"] is row["tasks"] is row["old_worst"] is None
    assert row["drift_anchor"] == pytest.approx(0.2)
    assert row["ms_per_step"] == 100.5
    assert row["epsilon"] == 0.2


def test_summary_has_every_task_and_the_worst_of_the_old(tmp_path):
    old = [{"drawer": [True, True], "faucet": [seed == 0, False]} for seed in (0, 1)]
    outcomes = [Outcome("craft", seed, old[seed], {"button": [True, False]}, 1, 2, 0.1, 0.2, 100) for seed in (0, 1)]
    summary = summarise(outcomes, 0.05)
    row = summary["craft"]
    assert row["tasks"] == {"drawer": 1.0, "faucet": 0.25, "button": 0.5}
    assert (row["old_mean"], row["old_worst"], row["old_success"]) == (0.625, 0.25, 0.625)
    assert row["old_success_per_seed"] == [0.75, 0.5]
    assert row["task_intervals"]["faucet"][0] < 0.25 < row["task_intervals"]["faucet"][1]
    draw_success(summary, "2 tasks", tmp_path / "success.png")
    assert (tmp_path / "success.png").stat().st_size > 10_000
    with Console(width=100, record=True) as console:
        print_table(summary | {"seeds": [0, 1]}, "2 tasks", "button", console)
    printed = console.export_text()
    assert "keep 2 tasks, learn button" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["faucet", "0.25"] in lines
    assert ["old", "tasks:", "worst", "0.25"] in lines
