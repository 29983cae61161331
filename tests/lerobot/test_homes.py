"""`~` is a home in everything that is named by a path: policies, datasets, files of frames, settings."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import small
import torch
from metaworld_pi0_fast import ASSETS, OLD_TASK
from PIL import Image

from craft_optim.adapter_checkpoints import base_of_adapters
from craft_optim.lerobot import (
    adapter_for,
    load_config,
    load_policy,
    load_preprocessor,
    open_dataset,
    open_frames,
    prompts,
)
from craft_optim.lerobot.frames_file import FramesFile
from craft_optim.lerobot.opening import dataset_folders
from craft_optim.lerobot.settings import AnchorSettings, SettingsError, read_settings

DATA = ASSETS / "demonstrations" / OLD_TASK


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home; the working directory is another, in which no folder `~` may be made."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "home" / "data").symlink_to(DATA)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


def test_checkpoints(home):
    policy = small.build("act", home, **small.features(small.TOP)).eval()
    policy.save_pretrained(home / "policy")
    assert load_config("~/policy").type == "act"
    loaded = load_policy("~/policy", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match=str(home / "nothing")):
        load_preprocessor(policy, "~/nothing", "cpu")
    plain = {"reading": None, "output": "classes", "layers": (), "progress": False}
    cache = adapter_for(policy).build(torch.nn.Linear(3, 2), [torch.ones(2, 3)], "~/anchors", **plain)
    assert cache.path == home / "anchors"


def test_the_base_of_adapters(home):
    pytest.importorskip("peft")
    about = {"peft_type": "LORA", "base_model_name_or_path": "~/base", "r": 2}
    (home / "adapters").mkdir()
    (home / "adapters" / "adapter_config.json").write_text(json.dumps(about))
    assert base_of_adapters(str(home / "adapters")) == (str(home / "base"), None)


def test_datasets_and_files_of_frames(home):
    config = small.build("act", home, **small.features(small.TOP)).config
    assert len(open_dataset(config, root="~/data", episodes="1")) > 0
    assert dataset_folders("~/data") == [home / "data"]
    (home / "instructions.txt").write_text("open\n")
    assert prompts("~/instructions.txt") == ["open"]
    Image.new("RGB", (small.IMAGE, small.IMAGE)).save(home / "a.png")
    row = {"task": "open", "image_path": "~/a.png", "state": [0.0] * 4}
    (home / "frames").mkdir()
    (home / "frames" / "f.jsonl").write_text(json.dumps(row))
    assert len(FramesFile("~/frames/f.jsonl", config)) == 1
    assert FramesFile("~/frames/f.jsonl", config)[0][small.TOP].shape == (3, small.IMAGE, small.IMAGE)


def test_frames(home, monkeypatch):
    from craft_optim.lerobot import frames as module

    opened = []
    monkeypatch.setattr(module, "FramesFile", lambda path, *_: opened.append(path))
    monkeypatch.setattr(module, "open_dataset", lambda config, **named: opened.append(named["root"]))
    monkeypatch.setattr(module, "_check_observations", lambda *_, **__: None)
    monkeypatch.setattr(module, "read_prompts", lambda source: opened.append(source) or ["x"])
    config = small.build("act", home, **small.features(small.TOP)).config
    open_frames(config, SimpleNamespace(steps=()), prompts="~/f.jsonl")
    vla = SimpleNamespace(type="pi0_fast")
    open_frames(vla, SimpleNamespace(steps=()), root="~/data", prompts="~/i.txt")
    assert {"~/f.jsonl", "~/data", "~/i.txt"} == set(opened), "handed to functions that know homes"


PATHS = [name for name, of in get_type_hints(AnchorSettings).items() if Path in {of, *get_args(of)}]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("by", ["a flag", "a file", "a checkpoint"])
def test_every_path_among_the_settings(by, name, home):
    flags, saved = [f"--anchors.{name}=~/x.jsonl"], None
    if by == "a file":
        (home / "craft.yaml").write_text(f"anchors: {{{name}: ~/x.jsonl}}")
        flags = ["--config=~/craft.yaml"]
    if by == "a checkpoint":
        flags, saved = [], {"anchors": {name: "~/x.jsonl"}}
    assert getattr(read_settings(flags, saved).anchors, name) == home / "x.jsonl"
    assert {"path", "root", "prompts"} <= set(PATHS) < {field.name for field in fields(AnchorSettings)}


def test_settings_of_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(SettingsError, match="this user has none"):
        read_settings(["--anchors.path=~/x"])
    monkeypatch.setenv("HOME", "/nowhere")  # for lerobot's own
