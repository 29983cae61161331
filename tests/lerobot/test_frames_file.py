"""Anchors of a file with instructions and pictures: the same as frames of a dataset, and every line is checked."""

import json

import numpy as np
import pytest
import small
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy_config
from metaworld_pi0_fast import ASSETS, OLD_TASK
from PIL import Image

from craft_optim.lerobot import (
    adapter_for,
    anchor_batches,
    image_keys,
    open_dataset,
    open_frames,
    prompts,
    spread_frames,
)
from craft_optim.lerobot.frames import keep_without_actions
from craft_optim.lerobot.frames_file import FramesFile, mean_state

DATA = ASSETS / "demonstrations" / OLD_TASK


@pytest.fixture(scope="module")
def stats():
    return LeRobotDatasetMetadata(f"local/{OLD_TASK}", root=DATA).stats


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    return small.build("act", tmp_path_factory.mktemp("act"), **small.features(small.TOP))


@pytest.fixture(scope="module")
def two():
    return make_policy_config("act", **small.features(small.TOP, small.WRIST))


def save(picture, path):
    """A picture in [0, 1], `[3, height, width]`, whose values are those of bytes."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def write(folder, *lines):
    file = folder / "questions.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


@pytest.fixture
def pictures(tmp_path):
    torch.manual_seed(0)
    for name in "ab":
        save(torch.rand(3, small.IMAGE, small.IMAGE), tmp_path / "img" / f"{name}.png")
    save(torch.rand(3, 32, 48), tmp_path / "img" / "wide.png")
    return tmp_path


def policy_and_preprocessor(name, folder, stats, shipped):
    if name == "pi0_fast":
        return shipped[0], shipped[1][0]
    settings = small.features(small.TOP)
    if name == "smolvla":
        settings |= {"train_expert_only": False, "freeze_vision_encoder": False}
    policy = small.build(name, folder, **settings)
    return policy, small.preprocessor(policy, stats)


@pytest.mark.parametrize("name", ["act", "pi0", "pi05", "smolvla", "pi0_fast"])
def test_a_frame_is_the_same_anchor_from_a_file_as_from_a_dataset(name, tmp_path, stats, shipped):
    policy, preprocessor = policy_and_preprocessor(name, tmp_path / "vlm", stats, shipped)
    adapter = adapter_for(policy, keep_without_actions(name))
    dataset = open_dataset(policy.config, root=DATA, episodes="1")
    rows = [0, 11, 20]
    lines = []
    for row in rows:
        sample = dataset[row]
        picture, state = sample[small.TOP], sample["observation.state"]
        save(picture.reshape(-1, *picture.shape[-3:])[-1], tmp_path / f"{row}.png")
        lines.append({"task": sample["task"], "image_path": f"{row}.png", "state": state.reshape(-1, 4)[-1].tolist()})
    frames = FramesFile(write(tmp_path, *lines), policy.config)
    (expected,) = anchor_batches(dataset, preprocessor, adapter, indices=rows)
    (found,) = anchor_batches(frames, preprocessor, adapter)
    assert expected["frame_index"].tolist() == rows
    source = {"episode_index", "frame_index"}
    wanted = expected.keys() - source - {"action_is_pad", "action", "action.tokens", "action.token_mask"}
    assert found.keys() == wanted >= {small.TOP}
    assert found.pop("category") == expected["category"] == [line["task"] for line in lines]
    for key in found:
        assert torch.equal(found[key], expected[key]), key


def test_a_file_is_read_as_a_dataset_is(pictures, act):
    tasks = ["open"] * 4 + ["close"] * 2
    lines = [{"task": task, "image_path": f"img/{'ab'[i % 2]}.png", "state": [i] * 4} for i, task in enumerate(tasks)]
    frames = FramesFile(write(pictures, *lines, "", "  "), act.config)
    assert len(frames) == 6
    assert image_keys(frames) == [small.TOP]
    assert prompts(frames) == ["open", "close"]
    assert spread_frames(frames, 4) == [1, 3, 4, 5]
    assert frames.hf_dataset["episode_index"][:] == list(range(6))
    assert [frames[i]["observation.state"].tolist() for i in (0, 5)] == [[0.0] * 4, [5.0] * 4]
    assert torch.equal(frames[3][small.TOP], frames[1][small.TOP])
    assert not torch.equal(frames[2][small.TOP], frames[1][small.TOP])


def test_pictures_are_read_when_they_are_asked_for(pictures, act, monkeypatch):
    frames = FramesFile(
        write(pictures, *({"task": "x", "image_path": f"img/{name}.png", "state": [0] * 4} for name in "ab")),
        act.config,
    )
    loaded = []
    real = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: loaded.append(image.filename) or real(image, mode))
    batches = anchor_batches(frames, dict, type("Adapter", (), {"inputs": staticmethod(dict)}), batch_size=1)
    assert loaded == []
    next(batches)
    assert [name.endswith("a.png") for name in loaded] == [True]
    next(batches)
    assert len(loaded) == 2


def test_cameras_by_name_and_any_kind_of_picture(pictures, two):
    Image.open(pictures / "img" / "a.png").convert("P").save(pictures / "img" / "palette.png")
    Image.open(pictures / "img" / "a.png").convert("L").save(pictures / "img" / "grey.jpg")
    images = {small.TOP: "img/palette.png", small.WRIST: str(pictures / "img" / "grey.jpg")}
    sample = FramesFile(write(pictures, {"task": "x", "images": images, "state": [1, 2, 3, 4.5]}), two)[0]
    assert sample[small.TOP].shape == sample[small.WRIST].shape == (3, small.IMAGE, small.IMAGE)
    grey = np.asarray(Image.open(pictures / "img" / "grey.jpg")) / 255
    assert torch.allclose(sample[small.WRIST][0], torch.tensor(grey, dtype=torch.float32))


def test_no_state_is_the_mean_of_the_checkpoints_statistics(pictures, act, stats):
    file = write(
        pictures, {"task": "x", "image_path": "img/a.png"}, {"task": "x", "image_path": "img/a.png", "action": []}
    )
    preprocessor = small.preprocessor(act, stats)
    frames = open_frames(act.config, preprocessor, prompts=file)
    mean = torch.tensor(stats["observation.state"]["mean"], dtype=torch.float32)
    assert torch.equal(frames.dataset[1]["observation.state"], mean)
    (batch,) = anchor_batches(frames.dataset, preprocessor, adapter_for(act, frames.keep))
    assert batch["observation.state"].abs().max() < 1e-6, "the middle after normalisation"
    assert mean_state(small.preprocessor(act, None)) is None
    with pytest.raises(
        ValueError, match=r"questions.jsonl, line 1 has no state, and the checkpoint no statistics.*4 numb"
    ):
        open_frames(act.config, small.preprocessor(act, None), prompts=file)


GOOD = {"task": "open", "image_path": "img/a.png", "state": [0, 0, 0, 0]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": ', r"is no JSON object \(.*write one object per line"),
        ("[1]", r"must be a JSON object such as .* Found \[1\]"),
        ({**GOOD, "prompt": "x"}, r"keys must be among \['action', .*Found 'prompt'"),
        ({**GOOD, "task": " "}, r"task must be an instruction.*Found ' '"),
        ({**GOOD, "task": None}, r"task must be .*Found None"),
        ({"task": "x", "state": [0] * 4}, r"pass images or image_path, one of them. Found \['state', 'task'\]"),
        ({**GOOD, "images": {small.TOP: "img/a.png"}}, r"pass images or image_path, one of them"),
        ({**GOOD, "image_path": ""}, r"images must have a path for each camera of \['observation.image'\]"),
        ({"task": "x", "images": ["img/a.png"]}, r"images must have a path .*Found \['img/a.png'\]"),
        ({"task": "x", "images": {"top": "img/a.png"}}, r"has the cameras \['observation.image'\]. Found 'top'"),
        ({**GOOD, "state": [0] * 3}, r"state must be a list of 4 finite numbers. Found \[0, 0, 0\]"),
        ({**GOOD, "state": [0, 0, 0, "1"]}, r"state must be a list of 4 finite numbers"),
        ({**GOOD, "state": [0, 0, 0, float("nan")]}, r"state must be a list of 4 finite numbers"),
        ({**GOOD, "state": [0, 0, 0, 10**400]}, r"state must be a list of 4 finite numbers"),
        ({**GOOD, "state": 3}, r"state must be a list of 4 finite numbers. Found 3"),
        (
            {**GOOD, "image_path": "img/none.png"},
            r"observation.image: there is no file .*img/none.png. Paths are relative",
        ),
        ({**GOOD, "image_path": "questions.jsonl"}, r"observation.image: .*questions.jsonl is no picture"),
        ({**GOOD, "image_path": "img"}, r"observation.image: .*img is no picture"),
        ({**GOOD, "image_path": "img/wide.png"}, r"the first one's size, 64 x 64. Found 48 x 32 in .*wide.png"),
        ({**GOOD, "image_path": "img/deep.png"}, r"8 bits per colour. Found mode 'I;16' in .*deep.png"),
        ({**GOOD, "image_path": "img/turned.jpg"}, r"turned.jpg is stored turned.*save it upright"),
    ],
)
def test_lines_that_are_no_frame(pictures, act, line, message):
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(pictures / "img" / "deep.png")
    turned = Image.new("RGB", (64, 64))
    turned.getexif()[0x0112] = 6
    turned.save(pictures / "img" / "turned.jpg", exif=turned.getexif())
    file = write(pictures, GOOD, "", line)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"questions.jsonl, line 3.*{message}"):
        FramesFile(file, act.config)


def test_policies_with_several_cameras(pictures, two):
    with pytest.raises(
        ValueError, match=r"line 1: image_path is for policies with one camera, this one has \[.*wrist'\]"
    ):
        FramesFile(write(pictures, GOOD), two)
    one = {"task": "x", "images": {small.TOP: "img/a.png"}, "state": [0] * 4}
    with pytest.raises(
        ValueError, match=r"line 1: act needs a picture of every camera.*none of 'observation.images.wrist'"
    ):
        FramesFile(write(pictures, one), two)
    seen = small.features(small.TOP, small.WRIST)
    vla = make_policy_config("pi0", **seen, empty_cameras=1)  # goes on without one
    both = {**one, "images": {small.TOP: "img/a.png", small.WRIST: "img/b.png"}}
    assert small.WRIST not in FramesFile(write(pictures, one), vla)[0]
    with pytest.raises(
        ValueError, match=r"line 2: every line must have the same cameras, \['observation.image'\] as the"
    ):
        FramesFile(write(pictures, one, both), vla)
    with pytest.raises(ValueError, match=r"Found 'observation.images.empty_camera_0'"):
        FramesFile(write(pictures, {**one, "images": {"observation.images.empty_camera_0": "img/a.png"}}), vla)
    alone = make_policy_config("pi0", **small.features(small.TOP), empty_cameras=1)
    assert FramesFile(write(pictures, GOOD), alone)[0].keys() == {small.TOP, "observation.state", "task"}


def test_policies_without_a_state(pictures):
    settings = small.features(small.TOP)
    del settings["input_features"]["observation.state"]
    config = make_policy_config("act", **settings)
    frames = FramesFile(write(pictures, {"task": "x", "image_path": "img/a.png"}), config)
    assert frames[0].keys() == {small.TOP, "task"}
    with pytest.raises(ValueError, match=r"line 1: act reads no state: leave it out. Found \[0, 0, 0, 0\]"):
        FramesFile(write(pictures, GOOD), config)


def test_policies_that_see_more_than_a_file_can_hold(pictures):
    settings = small.features(small.TOP)
    settings["input_features"]["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (2,))
    config = make_policy_config("act", **settings)
    with pytest.raises(
        ValueError, match=r"act reads the state of its environment, which .*questions.jsonl cannot hold"
    ):
        FramesFile(write(pictures, GOOD), config)


def test_files_that_hold_nothing(tmp_path, act):
    with pytest.raises(ValueError, match=r"questions.jsonl is empty"):
        FramesFile(write(tmp_path, "", " "), act.config)
    (tmp_path / "latin.jsonl").write_bytes('{"task": "öffne"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl is no text in UTF-8.*save it as such"):
        FramesFile(tmp_path / "latin.jsonl", act.config)
    with pytest.raises(FileNotFoundError, match=r"none.jsonl"):
        FramesFile(tmp_path / "none.jsonl", act.config)


def test_a_picture_that_breaks_off_says_where(pictures, act):
    frames = FramesFile(write(pictures, GOOD), act.config)
    file = pictures / "img" / "a.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"questions.jsonl, line 1: observation.image: .*a.png cannot be read.*copy it anew"
    ):
        frames[0]


def test_lines_end_at_line_ends_alone(pictures, act):
    file = write(pictures, json.dumps({**GOOD, "task": "open\u2028the door"}, ensure_ascii=False))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))  # as a Windows editor saves it
    assert FramesFile(file, act.config)[0]["task"] == "open\u2028the door"


def test_what_is_kept_without_actions():
    assert [keep_without_actions(name) for name in ("pi0_fast", "act", "pi0", "smolvla")] == [
        "tokens",
        "actions",
        "prefix",
        "prefix",
    ]
    assert keep_without_actions("pi0_fast", "prefix") == "prefix"
    with pytest.raises(ValueError, match=r"one of \('tokens', 'prefix'\) for pi0_fast. Found 'logits'.*lerobot-eval"):
        keep_without_actions("pi0_fast", "logits")
    for keep in (None, "actions"):
        with pytest.raises(ValueError, match="of diffusion without demonstrated actions: pass a dataset"):
            keep_without_actions("diffusion", keep)


@pytest.mark.parametrize("name", ["repo_id", "root", "episodes", "rename_map"])
def test_a_file_takes_the_place_of_a_dataset(pictures, act, name):
    file = write(pictures, GOOD)
    assert len(open_frames(act.config, small.preprocessor(act, None), prompts=file, rename_map={}).dataset) == 1
    with pytest.raises(ValueError, match=rf"`prompts`=.*questions.jsonl has its own pictures: leave out `{name}`"):
        open_frames(act.config, None, prompts=file, **{name: {"a": "b"} if name == "rename_map" else "x"})
