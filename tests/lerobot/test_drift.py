"""craft-optim drift on checkpoints of lerobot's real policies: what they say and what they do."""

import json
import shutil
from dataclasses import replace

import pytest
import small
import torch
from metaworld_pi0_fast import ASSETS, OLD_TASK
from safetensors.torch import load_file, save_file

from craft_optim.anchors import AnchorCache
from craft_optim.cli import main
from craft_optim.cli.work.sources import load_policy
from craft_optim.evaluation.actions import action_drift, predicted_actions
from craft_optim.lerobot import adapter_for, anchor_batches
from craft_optim.lerobot.pretrained import load_preprocessor

DATA = ASSETS / "demonstrations" / OLD_TASK
FRAMES = [f"--dataset.root={DATA}", "--dataset.episodes=2", "--count=6", "--batch-size=4"]


def finetuned(folder, name, by=0.0):
    """A checkpoint whose weights have moved, and whose processors have the statistics of other data."""
    made = folder.parent / "checkpoints" / name / "pretrained_model"
    shutil.copytree(folder, made)
    generator = torch.Generator().manual_seed(1)

    def moved(x):
        return x + by * x.std(correction=0) * torch.randn(x.shape, generator=generator) if x.ndim > 1 else x

    def other(x):
        return 0.5 * x + 0.3 if x.is_floating_point() else x

    for file in made.glob("*.safetensors"):
        change = moved if file.name == "model.safetensors" else other
        values = {key: change(x).contiguous() for key, x in load_file(file).items()}
        file.unlink()  # safetensors maps the file that it reads
        save_file(values, file, metadata={"format": "pt"})
    return made


def measure(*arguments, capsys):
    capsys.readouterr()
    assert main(["drift", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_pi0_fast_on_a_dataset_and_again_on_its_cache(pi0_fast, tmp_path, capsys):
    same, little, much = (finetuned(pi0_fast, f"{by:g}", by) for by in (0.0, 0.05, 0.2))
    checkpoints = ["--policy.path", same, f"{little},{much}", "--epsilon", "0.001", "actions=0.005"]
    against = [f"--teacher.path={pi0_fast}", *checkpoints]
    found = measure(*against, *FRAMES, f"--cache={tmp_path / 'a'}", capsys=capsys)
    assert [row["name"] for row in found["checkpoints"]] == ["0", "0.05", "0.2"]
    assert found["epsilon"] == {"logits": 0.001, "actions": 0.005}
    means = [row["drift"]["logits"]["mean"] for row in found["checkpoints"]]
    assert abs(means[0]) < 1e-4, "the statistics of its processors do not matter"
    assert 1e-3 < means[1] < means[2]
    acted = [row["actions"] for row in found["checkpoints"]]
    assert acted[0]["mean_abs"] == acted[0]["share_over_epsilon"] == 0.0
    assert acted[2]["mean_abs"] > 0.005
    assert len(acted[2]["rms_per_dimension"]) == 4

    cache = AnchorCache.open(tmp_path / "a")
    assert (len(cache), cache.model_id) == (6, str(pi0_fast))
    own = load_preprocessor(load_policy(str(same), "cpu"), str(same), "cpu")
    theirs = load_preprocessor(load_policy(str(pi0_fast), "cpu"), str(pi0_fast), "cpu")
    sample = small.TwoCameras(load_policy(str(same), "cpu").config)[30]
    key = "observation.language.tokens"
    assert not torch.equal(own(dict(sample))[key], theirs(dict(sample))[key]), "or this test shows nothing"

    policy = load_policy(str(much), "cpu")
    retention = adapter_for(policy).retention(policy, cache, batch_size=4, strict=False)
    assert means[2] == pytest.approx(retention.drift(), rel=1e-5)
    chunks = [predicted_actions(load_policy(str(p), "cpu"), cache, batch_size=4) for p in (pi0_fast, much)]
    assert acted[2]["each"] == pytest.approx(action_drift(*chunks).each)
    assert acted[2]["share_over_epsilon"] == sum(x > 0.005 for x in acted[2]["each"]) / 6

    again = measure(tmp_path / "a", *against, "--batch-size=4", capsys=capsys)
    assert again["checkpoints"] == found["checkpoints"]
    alone = measure(tmp_path / "a", *checkpoints[:3], "--count=2", capsys=capsys)
    assert "actions" not in alone["checkpoints"][0]
    assert alone["places"] == [1, 4]


def test_act_moves_its_actions_as_far_as_its_hidden_states_say(act, tmp_path, capsys):
    moved = finetuned(act, "moved", 0.05)
    arguments = [f"--teacher.path={act}", f"--policy.path={moved}", "--cache", tmp_path / "a", *FRAMES]
    (row,) = measure(*arguments, capsys=capsys)["checkpoints"]
    cache = AnchorCache.open(tmp_path / "a")
    assert not cache.read(range(6)).inputs["action_is_pad"].any(), "all actions of the chunk are compared"
    # What is kept of ACT is the output of its action head: the chunk of actions itself
    (variance,) = cache.features.variances.values()
    assert row["drift"]["hidden"]["mean"] == pytest.approx(row["actions"]["rms"] ** 2 / variance, rel=1e-2)
    (part,) = row["drift"]["hidden"]["layers"]
    assert (part["layer"], part["pooling"]) == ("model.action_head", "none")
    assert part["mean"] == row["drift"]["hidden"]["mean"] > 0.0


def test_without_a_folder_for_the_cache_nothing_stays(act, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    arguments = [f"--teacher.path={act}", f"--policy.path={finetuned(act, 'moved', 0.05)}", *FRAMES]
    assert main(["drift", *arguments]) == 0
    said = capsys.readouterr().out
    assert "actions by dimension: rms" in said
    assert not list((tmp_path / "temporary").glob("craft*"))
    found = measure(*arguments, "--no-actions", capsys=capsys)
    assert found["cache"] is None
    assert "actions" not in found["checkpoints"][0]


def test_a_teacher_that_the_cache_is_not_of(act, tmp_path, capsys):
    other = finetuned(act, "moved", 0.05)
    assert main(["build-anchors", str(tmp_path / "a"), f"--policy.path={act}", *FRAMES]) == 0
    assert main(["drift", str(tmp_path / "a"), f"--teacher.path={other}", f"--policy.path={act}"]) == 1
    assert "is not the model that" in capsys.readouterr().err


def frames(policy, dataset, keep, path):
    adapter = adapter_for(policy, keep)
    prepare = small.preprocessor(policy, dataset.stats)
    batches = list(anchor_batches(dataset, prepare, adapter, batch_size=2, indices=[0, 50, 100]))
    return replace(adapter, frozen=()).build(policy, batches, path)


@pytest.mark.parametrize(("name", "steps"), [("pi0", 5), ("pi05", 5), ("smolvla", 5), ("diffusion", 4)])
def test_policies_draw_the_same_noise(name, steps, tmp_path):
    policy = small.build(name, tmp_path)
    policy.reset()
    queues = policy._queues
    cache = frames(policy, small.TwoCameras(policy.config), "actions", tmp_path / "a")
    first, same = (predicted_actions(policy, cache, batch_size=2) for _ in range(2))
    assert first.shape == (3, steps, 4)
    assert torch.equal(first, same)
    assert not torch.equal(first, predicted_actions(policy, cache, batch_size=2, seed=1))
    assert policy.training
    assert policy._queues is queues
    assert not queues["action"]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= 1.1
    assert action_drift(first, predicted_actions(policy, cache, batch_size=2)).mean_abs > 0.01


def test_what_a_policy_cannot_act_on_is_said(tmp_path):
    policy = small.build("pi0", tmp_path)
    cache = frames(policy, small.TwoCameras(policy.config), "prefix", tmp_path / "a")
    with pytest.raises(ValueError, match=r"do not hold 'observation.state'.*--keep=actions"):
        predicted_actions(policy, cache)
