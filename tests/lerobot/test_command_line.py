"""The command line on checkpoints of lerobot's real policies at toy size, and the shipped dataset."""

import json
import re
import shutil
from pathlib import Path

import pandas
import pytest
import small
import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies import get_policy_class
from metaworld_pi0_fast import ASSETS, OLD_TASK
from metaworld_pi0_fast.policy import load_policy, make_processors
from PIL import Image
from safetensors.torch import load_file, save_file
from training import late_dataset

from craft_optim.anchors import AnchorCache
from craft_optim.cli import main
from craft_optim.lerobot import adapter_for, anchor_batches, spread_frames
from craft_optim.lerobot.act import run_actions

DATA = ASSETS / "demonstrations" / OLD_TASK
FRAMES = [f"--dataset.root={DATA}", "--dataset.episodes=2", "--count=6", "--batch-size=4"]


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
    said = capsys.readouterr().out
    following = said.split("Next:")[1].split()
    assert following[:2] == ["craft-optim", "train"]
    assert {f"--craft.anchors.path={out}", f"--policy.path={pi0_fast}"} < set(following)
    assert f"adapter_for(policy, {keep!r}).retention(policy" in said

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
    assert AnchorCache.open(tmp_path / "a").categories == expected.pop("category") == 6 * [dataset[0]["task"]]
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


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_a_checkpoint_with_adapters_is_the_policy_that_they_are_merged_into(act, tmp_path):
    base = get_policy_class("act").from_pretrained(act)
    base.config.pretrained_path = act
    adapted = base.wrap_with_peft(peft_cli_overrides={"target_modules": ["linear1"], "r": 2, "init_type": "gaussian"})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    folder = shutil.copytree(act, tmp_path / "adapters", ignore=shutil.ignore_patterns("model.safetensors"))
    adapted.save_pretrained(folder)
    adapted.config.save_pretrained(folder)
    merged = adapted.merge_and_unload()
    merged.config.use_peft = False
    merged.save_pretrained(shutil.copytree(act, tmp_path / "whole"))
    found = {}
    for name in ("adapters", "whole", "act"):
        out = tmp_path / f"anchors of {name}"
        assert main(["build-anchors", str(out), f"--policy.path={tmp_path / name}", *FRAMES]) == 0
        found[name] = AnchorCache.open(out).read(range(6)).features
    same(found["adapters"], found["whole"])
    assert any((found["adapters"][name] - x).abs().max() > 0.01 for name, x in found["act"].items())


def test_which_episodes(act, tmp_path):
    states = {}
    for name, episodes in {"list": "[1, 2]", "part": "1:3", "last": "-1:", "first": "1"}.items():
        build = ["build-anchors", str(tmp_path / name), f"--policy.path={act}", f"--dataset.root={DATA}", "--count=4"]
        assert main([*build, f"--dataset.episodes={episodes}"]) == 0
        states[name] = AnchorCache.open(tmp_path / name).read(range(4)).inputs["observation.state"]
    assert torch.equal(states["list"], states["part"])
    assert len({tuple(x.flatten().tolist()) for x in states.values()}) == 3


def test_a_finished_cache_of_another_number_of_anchors(act, tmp_path, capsys):
    build = ["build-anchors", str(tmp_path / "a"), f"--policy.path={act}", *FRAMES]
    assert main(build) == 0
    (act / "model.safetensors").rename(tmp_path / "aside")  # it is told before the policy is loaded
    for count in ("--count=5", "--count=7"):
        assert main([*build, count]) == 1
        assert f"holds a finished cache of 6 anchors, and {count[-1]} were asked for" in capsys.readouterr().err
    (tmp_path / "aside").rename(act / "model.safetensors")
    assert main([*build, "--count=5", "--overwrite"]) == 0
    assert len(AnchorCache.open(tmp_path / "a")) == 5
    measured = [f"--teacher.path={act}", f"--policy.path={act}", *FRAMES, f"--cache={tmp_path / 'a'}", "--no-actions"]
    assert main(["drift", *measured]) == 1
    assert "holds a finished cache of 5 anchors, and 6 were asked for" in capsys.readouterr().err


def test_time_stamps_beside_the_videos(act, tmp_path, capsys):
    build = [f"--policy.path={act}", f"--dataset.root={late_dataset(tmp_path / 'late')}", "--count=6"]
    for workers in ([], ["--workers=1"]):
        assert main(["build-anchors", str(tmp_path / "a"), *build, *workers]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "cannot be read (FrameTimestampError: " in said
        assert "pass a larger `tolerance_s`" in said
    assert (
        main(["build-anchors", str(tmp_path / "a"), *build, "--tolerance_s=0.01", "--dataset.video_backend=pyav"]) == 0
    )
    assert len(AnchorCache.open(tmp_path / "a")) == 6
    drift = [f"--teacher.path={act}", f"--policy.path={act}", *build[1:], "--tolerance-s=0.01", "--no-actions"]
    assert main(["drift", *drift]) == 0


def test_a_dataset_whose_parts_contradict_each_other(act, tmp_path, capsys):
    broken = shutil.copytree(DATA, tmp_path / "broken")
    (file,) = (broken / "meta" / "episodes").rglob("*.parquet")
    table = pandas.read_parquet(file)
    table.drop(columns=[name for name in table if "chunk_index" in name and name.startswith("videos")]).to_parquet(file)
    build = ["build-anchors", str(tmp_path / "a"), f"--policy.path={act}", f"--dataset.root={broken}", "--count=6"]
    for workers in ([], ["--workers=1"]):
        assert main([*build, *workers]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{broken} cannot be read (KeyError: " in said
        assert "may not belong together" in said
    with pytest.raises(ValueError, match="KeyError"):
        main([*build, "--debug"])
    (broken / "meta" / "info.json").write_text("{")
    assert main(build) == 1
    assert f"{broken} cannot be read (JSONDecodeError: " in capsys.readouterr().err


def test_a_dataset_without_cameras(pi0_fast, tmp_path, capsys):
    features = {key: {"dtype": "float32", "shape": (4,), "names": None} for key in ("observation.state", "action")}
    made = LeRobotDataset.create("local/blind", fps=10, features=features, root=tmp_path / "blind", use_videos=False)
    made.add_frame({key: torch.zeros(4).numpy() for key in features} | {"task": "open"})
    made.save_episode()
    made.finalize()
    build = ["build-anchors", str(tmp_path / "a"), f"--policy.path={pi0_fast}", f"--dataset.root={tmp_path / 'blind'}"]
    assert main(build) == 1
    said = capsys.readouterr().err
    assert f"pi0_fast looks at the cameras ['{small.TOP}'], {tmp_path / 'blind'} has none" in said


def test_the_page_shows_words_where_the_teachers_tokenizer_is_here(pi0_fast, tmp_path, monkeypatch):
    out, page = tmp_path / "anchors", tmp_path / "page.html"
    assert main(["build-anchors", str(out), f"--policy.path={pi0_fast}", *FRAMES]) == 0
    look = ["inspect", str(out), f"--html={page}", "--count=2"]
    instruction = LeRobotDatasetMetadata(f"local/{OLD_TASK}", root=DATA).tasks.index[0]
    for gone in (False, True):
        if gone:
            shutil.move(pi0_fast, tmp_path / "elsewhere")
        assert main(look) == 0
        words = re.sub(r" +", " ", page.read_text())
        assert f": {instruction}</h3>" in words.replace("\n", "")
        assert words.lower().count(instruction.lower()) == (3 if gone else 5)  # categories, two titles, two prompts


def test_what_is_wrong_with_the_frames_is_told_before_the_weights_are_read(act, tmp_path, capsys):
    (act / "model.safetensors").write_bytes(b"")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"task": "open", "image_path": "none.png"}')
    build = ["build-anchors", str(tmp_path / "a"), f"--policy.path={act}"]
    for options, message in (
        ([f"--dataset.root={DATA}", "--dataset.episodes=[99]"], "99 among them"),
        ([f"--dataset.root={DATA}", "--count=99999"], "Found count=99999"),
        ([f"--dataset.root={DATA}", '--rename-map={"a": "b"}'], "Found 'a'"),
        ([f"--prompts={questions}"], "questions.jsonl, line 1: observation.image: there is no file"),
        ([f"--prompts={questions}", "--keep=logits"], "Without demonstrated actions"),
    ):
        assert main([*build, *options]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.fixture
def questions(tmp_path):
    """The frames that FRAMES names, as a file."""
    dataset = LeRobotDataset(f"local/{OLD_TASK}", root=DATA, episodes=[0, 1])
    lines = []
    for number, row in enumerate(spread_frames(dataset, 6)):
        sample = dataset[row]
        picture = (sample[small.TOP] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        line = {"task": sample["task"], "image_path": f"{number}.png", "state": sample["observation.state"].tolist()}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    return tmp_path / "questions.jsonl"


def test_a_file_with_pictures_in_the_place_of_a_dataset(pi0_fast, questions, tmp_path, capsys):
    file = ["build-anchors", str(tmp_path / "file"), f"--policy.path={pi0_fast}", f"--prompts={questions}"]
    assert main([*file, "--batch-size=4", "--shard-size=2"]) == 0
    assert "adapter_for(policy, 'tokens')" in capsys.readouterr().out
    data = ["build-anchors", str(tmp_path / "data"), f"--policy.path={pi0_fast}", *FRAMES, "--keep=tokens"]
    assert main([*data, "--shard-size=2"]) == 0
    found, expected = (AnchorCache.open(tmp_path / name).read(range(6)) for name in ("file", "data"))
    source = {name: expected.inputs.pop(name).tolist() for name in ("episode_index", "frame_index")}
    assert source["episode_index"] == sorted(source["episode_index"])
    same(found.inputs, expected.inputs)
    same(found.features, expected.features)
    assert main(["inspect", str(tmp_path / "file"), f"--policy.path={pi0_fast}"]) == 0
    assert "The cache fits this model" in capsys.readouterr().out


def test_a_build_of_a_file_goes_on_where_it_stopped(act, questions, tmp_path, monkeypatch):
    build = [f"--policy.path={act}", f"--prompts={questions}", "--batch-size=2", "--shard-size=2"]
    assert main(["build-anchors", str(tmp_path / "once"), *build]) == 0
    forward, runs = run_actions.__globals__["policy_of"], []

    def interrupted(model):
        runs.append(model)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return forward(model)

    with monkeypatch.context() as patch:
        patch.setitem(run_actions.__globals__, "policy_of", interrupted)
        assert main(["build-anchors", str(tmp_path / "twice"), *build]) == 130
    assert main(["build-anchors", str(tmp_path / "twice"), *build]) == 0
    once, twice = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("once", "twice"))
    assert once == twice
    assert main(["build-anchors", str(tmp_path / "ahead"), *build, "--workers=1"]) == 0
    same(
        AnchorCache.open(tmp_path / "ahead").read(range(6)).features,
        AnchorCache.open(tmp_path / "once").read(range(6)).features,
    )
