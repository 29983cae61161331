"""What lerobot-eval records of a policy in simulation becomes anchors."""

import json
import sys

import gymnasium as gym
import pytest
import small
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_main
from table import STEPS, Table

from craft_optim.anchors import AnchorCache
from craft_optim.cli import main
from craft_optim.lerobot import load_config, open_dataset, prompts

FRONT = "observation.images.front"
RENAME = json.dumps({"observation.image": FRONT})


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A policy's folder, and that of lerobot-eval's outputs."""
    settings = small.features(FRONT)
    settings["input_features"]["observation.state"] = PolicyFeature(FeatureType.STATE, (2,))
    settings["output_features"]["action"] = PolicyFeature(FeatureType.ACTION, (2,))
    policy = small.build("act", tmp_path, **settings)
    policy.save_pretrained(tmp_path / "act")
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(tmp_path / "act")
    monkeypatch.setitem(gym.registry, "gym_pusht/PushT-v0", gym.envs.registration.EnvSpec("gym_pusht/PushT-v0", Table))
    flags = ["policy.path=" + str(tmp_path / "act"), "env.type=pusht", "eval.n_episodes=2", "eval.batch_size=2"]
    flags += ["eval.use_async_envs=false", "eval.recording=true", "policy.device=cpu", f"rename_map={RENAME}"]
    flags += [f"env.observation_{side}={small.IMAGE}" for side in ("height", "width")]
    flags += [f"output_dir={tmp_path / 'eval'}"]
    # torch's own tables of optimizers, which other tests import, make flags read-only that lerobot-eval sets
    flags_of_torch = torch.backends.ContextProp.__set__.__globals__
    monkeypatch.setitem(flags_of_torch, "__allow_nonbracketed_mutation_flag", True)
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *(f"--{flag}" for flag in flags)])
    eval_main()
    return tmp_path / "act", tmp_path / "eval" / "recordings"


def observed():
    """What both environments show before each action; lerobot-eval seeds them with 1000 and 1001."""
    for seed in (1000, 1001):
        table = Table()
        yield table.reset(seed=seed)[0]
        for _ in range(STEPS - 1):
            yield table.step(None)[0]


def test_anchors_are_what_the_policy_saw(recorded, tmp_path, capsys):
    policy, recordings = recorded
    out = tmp_path / "anchors"
    build = ["build-anchors", str(out), f"--policy.path={policy}", f"--dataset.root={recordings}"]
    assert main(build) == 1
    assert "act looks at the cameras ['observation.images.front']" in capsys.readouterr().err
    assert main([*build, f"--rename_map={RENAME}"]) == 0
    inputs = AnchorCache.open(out).read(range(2 * STEPS)).inputs
    for row, seen in enumerate(observed()):
        assert torch.equal(inputs["observation.state"][row], torch.tensor(seen["agent_pos"], dtype=torch.float32))
        assert torch.allclose(inputs[FRONT][row], torch.tensor(seen["pixels"][0, 0, 0] / 255.0).float(), atol=0.03)
    assert main(["inspect", str(out), f"--policy.path={policy}"]) == 0
    assert "The cache fits this model" in capsys.readouterr().out


def test_some_of_the_recorded_episodes(recorded):
    policy, recordings = recorded
    dataset = open_dataset(load_config(str(policy)), root=recordings, episodes="-1:")
    assert len(dataset) == STEPS
    assert dataset[0]["action"].shape == (small.CHUNK, 2)
    expected = list(observed())[STEPS]["agent_pos"]
    assert torch.equal(dataset[0]["observation.state"], torch.tensor(expected, dtype=torch.float32))
    assert prompts(dataset) == [Table.task_description]
