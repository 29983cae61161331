"""The command line on checkpoints of lerobot's real policies at toy size, and the shipped dataset."""

import json
import re
import shutil
from pathlib import Path

import pytest
import small
import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from metaworld_pi0_fast import ASSETS, OLD_TASK
from metaworld_pi0_fast.policy import Backbone, load_policy, make_processors, small_backbone
from safetensors.torch import load_file, save_file

from craft_optim.anchors import AnchorCache
from craft_optim.cli import main
from craft_optim.lerobot import adapter_for, anchor_batches

DATA = ASSETS / "demonstrations" / OLD_TASK
FRAMES = [f"--dataset.root={DATA}", "--dataset.episodes=2", "--count=6", "--batch-size=4"]


@pytest.fixture
def pi0_fast(tmp_path):
    """The shipped policy so that lerobot itself can load it: tokenizers by their paths, lerobot's sizes small."""
    folder = tmp_path / "pi0_fast"
    shutil.copytree(ASSETS / "pretrained", folder)
    for file in folder.glob("*.json"):
        file.write_text(file.read_text().replace('"tokenizers/', f'"{folder}/tokenizers/'))
    with small_backbone(Backbone(**json.loads((folder / "small_backbone.json").read_text())), 764):
        yield folder


@pytest.fixture
def act(tmp_path):
    policy = small.build("act", tmp_path, **small.features(small.TOP))
    stats = LeRobotDatasetMetadata(f"local/{OLD_TASK}", root=DATA).stats
    policy.save_pretrained(tmp_path / "act")
    small.preprocessor(policy, stats).save_pretrained(tmp_path / "act")
    small.make_pre_post_processors(policy.config, dataset_stats=stats)[1].save_pretrained(tmp_path / "act")
    return tmp_path / "act"


def change(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: x * 1.1 if x.is_floating_point() else x for name, x in weights.items()}, folder / "other")
    shutil.move(folder / "other", folder / "model.safetensors")


@pytest.mark.parametrize("keep", ["logits", "prefix"])
def test_pi0_fast(pi0_fast, tmp_path, capsys, keep):
    out = tmp_path / "anchors"
    (tmp_path / "prompts.txt").write_text("Press a button\n")
    build = ["build-anchors", str(out), f"--policy.path={pi0_fast}", f"--keep={keep}", *FRAMES]
    assert main([*build, f"--prompts={tmp_path / 'prompts.txt'}"]) == 0
    cache = AnchorCache.open(out)
    assert len(cache) == 6
    assert cache.model_id == str(pi0_fast)
    assert f"adapter_for(policy, {keep!r}).retention(policy" in capsys.readouterr().out

    page = tmp_path / "page.html"
    check = ["inspect", str(out), f"--policy.path={pi0_fast}", f"--html={page}", "--count=2"]
    assert main(check) == 0
    assert "The cache fits this model" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<img ") == 2
    assert "Press a button" in re.sub(r" +", " ", text), "by the policy's own tokenizer"
    change(pi0_fast)
    assert main(check) == 0
    assert "The model has drifted from the cache" in capsys.readouterr().out


def test_the_frames_are_the_datasets_after_the_policys_own_processors(pi0_fast, tmp_path):
    assert main(["build-anchors", str(tmp_path / "a"), f"--policy.path={pi0_fast}", *FRAMES]) == 0
    policy = load_policy(ASSETS / "pretrained")
    deltas = resolve_delta_timestamps(policy.config, LeRobotDatasetMetadata(f"local/{OLD_TASK}", root=DATA))
    dataset = LeRobotDataset(f"local/{OLD_TASK}", root=DATA, episodes=[0, 1], delta_timestamps=deltas)
    prepare = make_processors(policy, path=ASSETS / "pretrained")[0]
    (expected,) = anchor_batches(dataset, prepare, adapter_for(policy), count=6)
    found = AnchorCache.open(tmp_path / "a").read(range(6)).inputs
    assert set(found) == set(expected)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def test_act_with_workers(act, tmp_path, capsys):
    build = [f"--policy.path={act}", *FRAMES]
    assert main(["build-anchors", str(tmp_path / "a"), *build]) == 0
    assert main(["build-anchors", str(tmp_path / "b"), *build, "--workers=2"]) == 0
    a, b = (AnchorCache.open(tmp_path / name).read(range(6)) for name in "ab")
    for name, x in a.inputs.items():
        assert torch.equal(x, b.inputs[name]), name
    assert main(["inspect", str(tmp_path / "a"), f"--policy.path={act}"]) == 0
    assert "The cache fits this model" in capsys.readouterr().out


def test_a_policy_whose_weights_lerobot_cannot_load(pi0_fast, tmp_path, capsys):
    (pi0_fast / "model.safetensors").write_bytes(b"")
    assert main(["build-anchors", str(tmp_path / "a"), f"--policy.path={pi0_fast}", *FRAMES]) == 1
    assert "cannot be read" in capsys.readouterr().err
    weights = load_file(ASSETS / "pretrained" / "model.safetensors")
    save_file({name: x[..., :1].contiguous() for name, x in weights.items()}, pi0_fast / "model.safetensors")
    assert main(["build-anchors", str(tmp_path / "a"), f"--policy.path={pi0_fast}", *FRAMES]) == 1
    assert "does not have the weights in" in capsys.readouterr().err
    assert not Path(tmp_path / "a").exists()


def test_a_cache_of_another_policy(act, pi0_fast, tmp_path, capsys):
    assert main(["build-anchors", str(tmp_path / "a"), f"--policy.path={act}", *FRAMES]) == 0
    assert main(["inspect", str(tmp_path / "a"), f"--policy.path={pi0_fast}"]) == 1
    assert "forward=run_actions" in capsys.readouterr().err


def test_checkpoints_that_are_no_whole_policy(act, tmp_path, capsys):
    config = json.loads((act / "config.json").read_text())
    (act / "config.json").write_text(json.dumps({**config, "use_peft": True}))
    with pytest.raises(SystemExit) as stopped:
        main(["build-anchors", str(tmp_path / "a"), f"--policy.path={act}", *FRAMES])
    assert stopped.value.code == 2
    assert "adapters only" in capsys.readouterr().err
