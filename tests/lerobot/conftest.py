import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lerobot", reason="pip install 'craft-optim[lerobot]', Python >= 3.12")

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
# For `small` and `training`, which the tests here share, and `warm`, which others do
sys.path[:0] = [str(EXAMPLES), str(TESTS / "lerobot"), str(TESTS / "common")]


@pytest.fixture(scope="session")
def shipped():
    """The shipped policy and 64 preprocessed frames of each task."""
    from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
    from metaworld_pi0_fast.batches import PreparedFrames
    from metaworld_pi0_fast.demonstrations import load_frames
    from metaworld_pi0_fast.policy import load_policy, make_processors

    policy = load_policy(ASSETS / "pretrained")
    processors = make_processors(policy, path=ASSETS / "pretrained")
    frames = {}
    for name in (OLD_TASK, NEW_TASK):
        loaded = load_frames(ASSETS / "demonstrations" / name, policy.config.chunk_size, episodes=[0, 1])
        frames[name] = PreparedFrames(loaded, processors[0], heldout_episodes=1)
    return policy, processors, frames[OLD_TASK], frames[NEW_TASK]


@pytest.fixture
def policy(shipped):
    """The shipped policy, put back to its weights and mode after the test."""
    policy = shipped[0]
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    yield policy.eval()
    policy.load_state_dict(weights)
    policy.zero_grad()
    policy.eval()


@pytest.fixture
def pi0_fast(tmp_path):
    """The shipped policy so that lerobot itself can load it: tokenizers by their paths, lerobot's sizes small."""
    from metaworld_pi0_fast.policy import Backbone, small_backbone
    from metaworld_pi0_fast.unpacked import unpack

    folder = unpack(tmp_path / "pi0_fast")
    with small_backbone(Backbone(**json.loads((folder / "small_backbone.json").read_text())), 764):
        yield folder


@pytest.fixture
def act(tmp_path):
    """A checkpoint of a small ACT, with the statistics of the old task."""
    from training import pretrained

    return pretrained("act", tmp_path / "act")
