"""Whether a policy finds in a dataset what it looks at."""

from types import SimpleNamespace

import pytest
import small
import torch
from lerobot.policies.factory import make_policy_config
from metaworld_pi0_fast import ASSETS, OLD_TASK

from craft_optim._warn import CraftWarning
from craft_optim.lerobot import frames as module
from craft_optim.lerobot import image_keys, open_frames

DATA = ASSETS / "demonstrations" / OLD_TASK
FRONT, SIDE = "observation.images.front", "observation.images.side"


def policy(*cameras, name="act", renamed=None):
    """Its config and preprocessor."""
    config = make_policy_config(name, **small.features(*cameras))
    preprocessor = small.preprocessor(SimpleNamespace(config=config), None)
    preprocessor.steps[0].rename_map = renamed or {}
    return config, preprocessor


def test_frames_of_a_dataset_with_other_instructions(tmp_path):
    (tmp_path / "prompts.txt").write_text("Press a button\n")
    config, preprocessor = policy(small.TOP, name="pi0")
    given = {"root": DATA, "episodes": "-1:", "prompts": tmp_path / "prompts.txt", "keep": "actions"}
    frames = open_frames(config, preprocessor, **given)
    assert (frames.prompts, frames.keep) == (["Press a button"], "actions")
    assert len(frames.dataset.episodes) == 1
    assert frames.dataset[0]["action"].shape == (small.CHUNK, 4)
    assert open_frames(config, preprocessor, root=DATA).prompts is None
    with pytest.raises(ValueError, match=r"`prompts` are instructions, and act reads none: leave them out. Found"):
        open_frames(*policy(small.TOP), **given)


def test_cameras_of_another_name():
    config, preprocessor = policy(FRONT)
    message = r"act looks at the cameras \['observation.images.front'\], .* has \['observation.image'\].*`rename_map`"
    with pytest.raises(ValueError, match=message):
        open_frames(config, preprocessor, root=DATA)
    frames = open_frames(config, preprocessor, root=DATA, rename_map={small.TOP: FRONT})
    assert image_keys(frames.dataset) == [FRONT]


def test_a_checkpoint_that_was_trained_under_other_names_renames_for_itself():
    config, preprocessor = policy(FRONT, renamed={small.TOP: FRONT})
    frames = open_frames(config, preprocessor, root=DATA)
    assert image_keys(frames.dataset) == [small.TOP]
    batch = preprocessor({key: value for key, value in frames.dataset[0].items() if isinstance(value, torch.Tensor)})
    assert FRONT in batch


def test_cameras_that_are_not_there():
    with pytest.raises(ValueError, match=r"act looks at the cameras .*'observation.images.front' is not among them"):
        open_frames(*policy(small.TOP, FRONT), root=DATA)  # it needs all of them
    vla = policy(small.TOP, FRONT, name="pi0")
    assert image_keys(open_frames(*vla, root=DATA).dataset) == [small.TOP]  # it does not
    # A camera of the dataset that is none of the policy's may be the one that is missing: lerobot-train asks, too
    other = policy(FRONT, SIDE, name="pi0")
    with pytest.raises(ValueError, match=r"pi0 looks at the cameras .*Say which is which"):
        open_frames(*other, root=DATA)
    renamed = open_frames(*other, root=DATA, rename_map={small.TOP: SIDE})
    assert image_keys(renamed.dataset) == [SIDE]
    with pytest.raises(ValueError, match=r"pi0 looks at .*\['observation.images.wrong'\]"):
        open_frames(*other, root=DATA, rename_map={small.TOP: "observation.images.wrong"})


def test_who_says_which_is_which_may_leave_a_camera_out(monkeypatch):
    cameras = [FRONT, "observation.images.extra"]
    features = {key: {} for key in [*cameras, "observation.state"]}
    dataset = SimpleNamespace(meta=SimpleNamespace(features=features, camera_keys=cameras))
    monkeypatch.setattr(module, "open_dataset", lambda *args, **settings: dataset)
    monkeypatch.setattr(module, "read_prompts", lambda source: ["open"])
    vla = policy(FRONT, SIDE, name="pi0")
    with pytest.raises(ValueError, match=r"'observation.images.side' is not among them"):
        open_frames(*vla, root="x")
    assert open_frames(*vla, root="x", rename_map={small.TOP: FRONT}).dataset is dataset


def test_states_that_are_not_there():
    config, preprocessor = policy(small.TOP)
    with pytest.raises(
        ValueError, match=r"act reads 'observation.state', .* has \['observation.elbow', 'observation.im"
    ):
        open_frames(config, preprocessor, root=DATA, rename_map={"observation.state": "observation.elbow"})


def test_frames_without_an_instruction(monkeypatch):
    monkeypatch.setattr(module, "read_prompts", lambda source: ["open", " "])
    act, vla = policy(small.TOP), policy(small.TOP, name="pi0")
    open_frames(*act, root=DATA)  # reads none
    with pytest.warns(CraftWarning, match=r"frames without an instruction, and pi0 reads one: give it as `prompts`"):
        open_frames(*vla, root=DATA)
    open_frames(*vla, root=DATA, prompts=__file__)
