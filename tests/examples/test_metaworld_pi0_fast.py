"""What ships with the main example: data, tokenizers, policy, simulator."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")

from metaworld_pi0_fast import ASSETS, NEW_TASK, NEW_TASKS, OLD_TASK, OLD_TASKS, SKILLS, environment, make_assets
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import Pushes, load_frames, open_dataset, record
from metaworld_pi0_fast.fast_tokenizer import LocalFastTokenizer
from metaworld_pi0_fast.pictures import draw_films
from metaworld_pi0_fast.policy import load_policy, make_processors, parameter_count, save_policy
from metaworld_pi0_fast.rollouts import RolloutPool, run_episodes

PRETRAINED = ASSETS / "pretrained"
needs_gl = pytest.mark.skipif(environment.gl_backend() is None, reason=environment.GL_HELP)


@pytest.fixture(scope="module")
def policy():
    return load_policy(PRETRAINED)


@pytest.fixture(scope="module")
def processors(policy):
    return make_processors(policy, path=PRETRAINED)


@pytest.fixture(scope="module")
def frames(policy):
    return load_frames(ASSETS / "demonstrations" / OLD_TASK, policy.config.chunk_size, episodes=[0, 1, 2])


def test_the_shipped_files_are_small_and_name_no_folder_of_ours():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    for path in files:
        if path.suffix == ".json":
            assert not re.search(r'"/\w+/', path.read_text()), f"{path.name} holds an absolute path"


def test_the_policy_is_lerobots_own_and_of_the_promised_size(policy):
    from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy

    assert type(policy) is PI0FastPolicy
    assert 500_000 < parameter_count(policy) < 1_000_000


def test_loaded_frames_are_what_lerobot_gives(frames, policy):
    dataset = open_dataset(ASSETS / "demonstrations" / OLD_TASK, episodes=[0, 1, 2])
    for row in (0, 50, int((frames.episode == 0).sum())):  # the last one begins the second episode
        item = dataset[row]
        assert torch.equal(frames.images["observation.image"][row], (item["observation.image"] * 255).round().byte())
        assert torch.equal(frames.state[row], item["observation.state"])
        assert torch.equal(frames.actions[row, 0], item["action"])
        assert frames.tasks[row] == item["task"]
    ends = torch.nonzero(frames.episode.diff()).flatten()
    assert frames.action_is_pad[ends].sum(1).tolist() == [policy.config.chunk_size - 1] * 2


def test_prepared_frames_hold_out_whole_episodes(frames, processors, policy):
    prepared = PreparedFrames(frames, processors[0], heldout_episodes=1)
    train, heldout = (set(frames.episode[rows].tolist()) for rows in (prepared.train_indices, prepared.heldout_indices))
    assert (train, heldout) == ({0, 1}, {2})
    batch = prepared.train_batch([3, 1])
    assert torch.equal(batch["observation.image"][0], frames.images["observation.image"][3] / 255.0)
    with torch.no_grad():
        every, _ = policy.forward(prepared.train_batch(prepared.heldout_indices))
    assert prepared.heldout_loss(policy, batch_size=7) == pytest.approx(every.item(), rel=1e-5)
    with pytest.raises(ValueError, match="heldout_episodes"):
        PreparedFrames(frames, processors[0], heldout_episodes=3)


def test_action_tokens_decode_to_the_actions():
    rng = np.random.default_rng(0)
    time = np.linspace(0, 1, 10)[None, :, None]
    chunks = np.sin(6 * time + rng.uniform(0, 6, (200, 1, 4))) * rng.uniform(0.2, 1, (200, 1, 4))
    tokenizer = LocalFastTokenizer.fit(chunks, scale=6.0, vocab_size=256)
    ids = tokenizer(chunks)
    assert max(map(max, ids)) < 256
    # Rounding to 1/6 in an orthonormal basis: at most half of that per coefficient, so per chunk in the mean square.
    error = tokenizer.decode(ids) - chunks
    assert np.sqrt((error**2).mean()) <= 0.5 / 6.0
    assert np.array_equal(tokenizer.decode([ids[0][:1]])[0].shape, (10, 4)), "a cut-off answer still has the shape"


def test_the_shipped_tokenizers_code_is_the_examples_own():
    from metaworld_pi0_fast import fast_tokenizer

    for folder in (ASSETS, SKILLS):
        shipped = folder / "pretrained" / "tokenizers" / "fast" / "fast_tokenizer.py"
        assert shipped.read_text() == Path(fast_tokenizer.__file__).read_text()


def test_a_saved_policy_can_be_moved(policy, processors, tmp_path, frames):
    save_policy(policy, tmp_path / "a", processors)
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = load_policy(tmp_path / "b")
    again = make_processors(moved, path=tmp_path / "b")
    observation = {
        "observation.image": frames.images["observation.image"][:2] / 255.0,
        "observation.state": frames.state[:2],
        "task": frames.tasks[:2],
    }
    with torch.no_grad():
        a = processors[1](policy.predict_action_chunk(processors[0](dict(observation))))
        b = again[1](moved.predict_action_chunk(again[0](dict(observation))))
    assert torch.equal(a, b)
    assert a.shape == (2, policy.config.chunk_size, 4)


def test_a_folder_that_is_no_policy_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no lerobot checkpoint"):
        load_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match="no LeRobotDataset"):
        open_dataset(tmp_path)


def test_pushes_leave_most_steps_alone():
    push, action = Pushes(np.random.default_rng(0)), np.zeros(4, dtype=np.float32)
    moved = [bool(push(action).any()) for _ in range(2000)]
    assert 0.05 < np.mean(moved) < 0.4


@pytest.mark.parametrize("backend", ["no-such-backend"])
def test_no_gl_is_found_out_without_a_crash(monkeypatch, backend):
    monkeypatch.setenv("MUJOCO_GL", backend)
    assert environment.gl_backend.__wrapped__() is None
    monkeypatch.setattr(environment, "gl_backend", lambda: None)
    with pytest.raises(RuntimeError, match="apt-get install"):
        environment.use_gl()


@needs_gl
def test_the_pretrained_policy_knows_the_old_task_and_not_the_new(policy, processors):
    old = run_episodes(policy, *processors, OLD_TASK, goals=[0, 1, 2])
    new = run_episodes(policy, *processors, NEW_TASK, goals=[0, 1])
    assert old.successes == [True] * 3
    assert max(old.steps) < 200
    assert new.successes == [False] * 2
    assert new.steps == [200, 200]


@needs_gl
def test_several_processes_find_what_one_finds(policy, processors, tmp_path):
    alone = run_episodes(policy, *processors, OLD_TASK, goals=[0, 1, 2], film_stride=8)
    with RolloutPool(workers=2) as pool:
        shared = pool.run(policy, processors, OLD_TASK, episodes=3, film_stride=8)
    assert (shared.successes, shared.steps) == (alone.successes, alone.steps)
    assert np.array_equal(shared.film, alone.film)
    films = {"adamw": alone.film[:3], "craft": alone.film}
    from PIL import Image

    picture = Image.open(draw_films(films, tmp_path / "x.gif"))
    assert picture.n_frames == len(alone.film)
    assert picture.size == (2 * alone.film.shape[2], alone.film.shape[1] + 16)


@needs_gl
def test_goals_of_the_demonstrations_cannot_be_evaluated_on(policy, processors):
    with pytest.raises(ValueError, match="demonstrations"):
        run_episodes(policy, *processors, OLD_TASK, goals=[0], seed=-1000)


def test_several_datasets_are_joined_and_keep_what_they_hold_out(processors, policy):
    parts = [
        PreparedFrames(load_frames(ASSETS / "demonstrations" / task, 10, episodes=[0, 1]), processors[0], 1)
        for task in (OLD_TASK, NEW_TASK)
    ]
    joined = PreparedFrames.joined(parts)
    assert len(joined) == sum(map(len, parts))
    for rows in ("train_indices", "heldout_indices"):
        (first, second), found = [getattr(part, rows) for part in parts], getattr(joined, rows)
        for part, these, at in ((parts[0], first, 0), (parts[1], second, len(first))):
            wanted, got = part.train_batch(these[:3]), joined.train_batch(found[at : at + 3])
            assert all(torch.equal(wanted[key], got[key]) for key in wanted)
            assert [part.tasks[row] for row in these[:3]] == [joined.tasks[row] for row in found[at : at + 3]]
        assert len(found) == len(first) + len(second)


@needs_gl
def test_the_last_episodes_are_recorded_as_they_would_have_been(tmp_path):
    all_of_them = record(OLD_TASK, tmp_path / "all", episodes=3)
    last = record(OLD_TASK, tmp_path / "last", episodes=2, skip=1)
    rows, wanted = (dataset.hf_dataset.with_format(None) for dataset in (last, all_of_them))
    assert last.meta.total_episodes == 2
    for key in ("action", "observation.state"):
        assert np.array_equal(np.asarray(rows[key]), np.asarray(wanted[key])[-len(rows) :])


@needs_gl
def test_another_instruction_can_be_given_in_a_scene_and_what_is_done_watched(policy, processors):
    seen = []
    settings = {"goals": [0, 1], "max_steps": 20, "watch": lambda *found: seen.append([part.shape for part in found])}
    run_episodes(policy, *processors, OLD_TASK, **settings)
    assert seen == [[(2, 64, 64, 3), (2, 4), (2, 10, 4)]] * 2
    told = []

    def preprocessor(observation):
        told.extend(observation["task"])
        return processors[0](observation)

    run_episodes(policy, preprocessor, processors[1], OLD_TASK, goals=[0], max_steps=10, asked=NEW_TASK)
    assert told == [environment.instruction(NEW_TASK)]


def test_many_tasks_have_defaults_of_their_own():
    one, many = make_assets.parse(["all"]), make_assets.parse(["all", "--many", "--steps=5"])
    assert (one.assets, one.old, one.new, one.backbone) == (ASSETS, [OLD_TASK], [NEW_TASK], {})
    assert (many.assets, many.new, many.steps) == (SKILLS, NEW_TASKS, 5)
    assert set(many.old) == {*OLD_TASKS, make_assets.TRAINED_ONLY}
    assert load_policy(SKILLS / "pretrained").config.max_action_tokens == many.max_action_tokens


def test_assets_say_how_they_were_made():
    record = json.loads((SKILLS / "assets.json").read_text())
    success = record["pretrain"]["success_on_50_heldout_goals"]
    assert all(success[task] >= 0.8 for task in OLD_TASKS)
    assert all(success[task] < 0.3 for task in NEW_TASKS)
    assert sorted(record["ship"]["tasks"]) == sorted(path.name for path in (SKILLS / "demonstrations").iterdir())
    record = json.loads((ASSETS / "assets.json").read_text())
    assert record["pretrain"]["success_on_50_heldout_goals"] == {OLD_TASK: 1.0, NEW_TASK: 0.0}
    assert {"lerobot", "torch", "metaworld"} <= set(record["versions"])
