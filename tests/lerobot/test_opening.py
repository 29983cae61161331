"""Datasets as a policy reads them: several as one, some episodes, under other names."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from metaworld_pi0_fast import ASSETS, OLD_TASK

from craft_optim._warn import CraftWarning
from craft_optim.lerobot import anchor_batches, image_keys, open_dataset, opening, prompts, spread_frames
from craft_optim.lerobot.opening import dataset_folders

SHIPPED = ASSETS / "demonstrations" / OLD_TASK
FEATURES = {
    "observation.images.top": {"dtype": "image", "shape": (8, 8, 3), "names": ["height", "width", "channel"]},
    "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}
RAW = dict(zip(["pixels", "agent_pos", "action"], FEATURES.values(), strict=True))


def write(folder, tasks, features=FEATURES, fps=10, start=0):
    """An episode of three frames of each task; the state counts them."""
    made = LeRobotDataset.create("local/made", fps=fps, features=features, root=folder, use_videos=False)
    picture, state, action = features
    for episode, task in enumerate(tasks):
        for frame in range(3):
            number = start + 3 * episode + frame
            shape = features[picture]["shape"]
            made.add_frame(
                {
                    picture: np.full(shape, number, dtype=np.uint8),
                    state: np.array([number, episode], dtype=np.float32),
                    action: np.array([number, frame], dtype=np.float32),
                    "task": task,
                }
            )
        made.save_episode()
    made.finalize()


def config(observed=None, steps=2):
    """What is read of a policy's."""
    return SimpleNamespace(
        observation_delta_indices=observed, action_delta_indices=list(range(steps)), reward_delta_indices=None
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As lerobot-eval leaves them; the second task comes first in one of them, and one has another frame rate."""
    root = tmp_path_factory.mktemp("recordings")
    write(root / "suite_2" / "env_0", ["push", "open", "push"])
    write(root / "suite_10" / "env_0", ["open"], fps=5, start=100)
    write(root / "suite_10" / "env_1", ["close", "push"], start=200)
    return root


def states(dataset):
    return [int(dataset[i]["observation.state"][0]) for i in range(len(dataset))]


def test_a_single_dataset_is_lerobots_own():
    dataset = open_dataset(config(steps=3), root=SHIPPED, episodes="1:3")
    assert isinstance(dataset, LeRobotDataset)
    assert dataset.episodes == [1, 2]
    assert dataset[0]["action"].shape == (3, 4)
    assert open_dataset(config(), repo_id="you/old", root=SHIPPED).repo_id == "you/old"


def test_a_dataset_of_the_hub_keeps_its_place_in_the_cache(monkeypatch):
    roots, real = [], opening.LeRobotDatasetMetadata

    def metadata(name, root, revision):
        roots.append(root)
        return real(name, root=SHIPPED)

    def dataset(name, root, **_):
        roots.append(root)

    monkeypatch.setattr(opening, "LeRobotDatasetMetadata", metadata)
    monkeypatch.setattr(opening, "LeRobotDataset", dataset)
    open_dataset(config(), repo_id="you/old")
    assert roots == [None, None]


def test_datasets_below_a_folder_are_one(folder):
    dataset = open_dataset(config(), root=folder)
    assert states(dataset) == [*range(9), 100, 101, 102, *range(200, 206)]  # suite_2 before suite_10
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample["task"] for sample in samples[::3]] == ["push", "open", "push", "open", "close", "push"]
    assert [int(sample["task_index"]) for sample in samples[::3]] == [0, 1, 0, 1, 2, 0]
    assert [int(sample["episode_index"]) for sample in samples] == [i // 3 for i in range(18)]
    assert [int(sample["index"]) for sample in samples] == list(range(18))
    assert prompts(dataset) == ["push", "open", "close"]
    assert image_keys(dataset) == ["observation.images.top"]
    for index in (-1, 18):
        with pytest.raises(IndexError, match=rf"\[0, 17\]. Found {index}"):
            dataset[index]


def test_actions_are_those_that_follow_at_each_datasets_own_rate(folder):
    dataset = open_dataset(config(steps=2), root=folder)
    for i, number in enumerate(states(dataset)):
        sample, last = dataset[i], i % 3 == 2
        assert sample["action"][:, 0].tolist() == [number, number + (not last)]
        assert sample["action_is_pad"].tolist() == [False, last]


def test_frames_are_spread_over_tasks_by_their_words(folder):
    dataset = open_dataset(config(), root=folder)
    taken = Counter(dataset[i]["task"] for i in spread_frames(dataset, 9))
    assert taken == {"push": 3, "open": 3, "close": 3}


@pytest.mark.parametrize(
    ("episodes", "found"),
    [("2", range(6)), ("[3, 0]", [0, 1, 2, 100, 101, 102]), ("-1:", [203, 204, 205]), ([4], [200, 201, 202])],
)
def test_episodes_count_on_from_one_dataset_to_the_next(folder, episodes, found):
    dataset = open_dataset(config(), root=folder, episodes=episodes)
    assert states(dataset) == list(found)
    assert {int(dataset[i]["episode_index"]) for i in range(len(dataset))} == set(range(len(dataset) // 3))
    assert len(dataset.hf_dataset) == len(dataset)


def test_batches_of_several_datasets(folder):
    dataset = open_dataset(config(), root=folder)
    adapter = SimpleNamespace(inputs=lambda batch: batch)
    (batch,) = anchor_batches(dataset, dict, adapter, indices=[8, 9, 17])
    assert batch["task"] == ["push", "open", "push"]
    assert batch["observation.images.top"][:, 0, 0, 0].mul(255).round().tolist() == [8, 100, 205]


def test_names_of_environments_are_those_of_lerobots_rollouts(tmp_path):
    write(tmp_path / "raw", ["push"], RAW)
    write(tmp_path / "plain", ["push"])
    raw = open_dataset(config(observed=[-1, 0]), root=tmp_path / "raw")
    plain = open_dataset(config(observed=[-1, 0]), root=tmp_path / "plain")
    assert image_keys(raw) == ["observation.image"]
    assert raw.meta.features.keys() - plain.meta.features.keys() == {"observation.image"}
    for i in range(3):
        found, expected = raw[i], plain[i]
        expected["observation.image"] = expected.pop("observation.images.top")
        expected["observation.image_is_pad"] = expected.pop("observation.images.top_is_pad")
        assert found["observation.image"].shape == (2, 3, 8, 8)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


def test_a_rename_map_goes_by_the_names_of_rollouts(tmp_path):
    write(tmp_path / "raw", ["push"], RAW)
    dataset = open_dataset(config(), root=tmp_path / "raw", rename_map={"observation.image": "observation.images.top"})
    assert image_keys(dataset) == ["observation.images.top"]
    assert {"observation.images.top", "observation.state"} < dataset[0].keys()
    assert not {"pixels", "observation.image", "agent_pos"} & dataset[0].keys()


def test_what_has_a_lerobot_name_already_keeps_it(tmp_path):
    both = {**FEATURES, "agent_pos": FEATURES["observation.state"]}
    made = LeRobotDataset.create("local/made", fps=10, features=both, root=tmp_path / "both", use_videos=False)
    frame = {"observation.images.top": np.zeros((8, 8, 3), np.uint8), "task": "push"}
    frame |= {key: np.full(2, i, np.float32) for i, key in enumerate(["observation.state", "action", "agent_pos"])}
    made.add_frame(frame)
    made.save_episode()
    made.finalize()
    assert open_dataset(config(), root=tmp_path / "both")[0]["observation.state"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rename_map", "message"),
    [
        ({"observation.front": "x"}, r"names of observations in .*: \['observation.images.top', 'observation.state'\]"),
        ({"action": "observation.a"}, "Found 'action'"),
        ({"observation.images.top": "observation.state"}, "Found 'observation.state' for two"),
    ],
)
def test_names_that_are_not_there(folder, rename_map, message):
    with pytest.raises(ValueError, match=f"`rename_map` must .*{message}"):
        open_dataset(config(), root=folder, rename_map=rename_map)


def test_datasets_that_do_not_fit_together(tmp_path):
    write(tmp_path / "a", ["push"])
    wide = {**FEATURES, "observation.state": {"dtype": "float32", "shape": (2,), "names": None}}
    wide["observation.images.top"] = {**FEATURES["observation.images.top"], "shape": (8, 16, 3)}
    write(tmp_path / "b", ["push"], wide)
    with pytest.raises(
        ValueError, match=r"/a and .*/b cannot be .*'observation.images.top' is \(8, 8, 3\) .*\(8, 16, 3\)"
    ):
        open_dataset(config(), root=tmp_path)
    assert len(open_dataset(config(), root=tmp_path, episodes="1")) == 3


def test_recordings_in_which_no_episode_ended(tmp_path):
    write(tmp_path / "env_0", [])
    with pytest.raises(ValueError, match=r"has no episodes. lerobot-eval records the ones that end"):
        open_dataset(config(), root=tmp_path)
    write(tmp_path / "env_1", ["push"])
    with pytest.warns(CraftWarning, match=r"1 of 2 datasets in .* have no episodes and are left out.*env_0"):
        dataset = open_dataset(config(), root=tmp_path)
    assert states(dataset) == [0, 1, 2]


def test_where_there_is_no_dataset(tmp_path, folder):
    with pytest.raises(ValueError, match="pass `repo_id` or `root`"):
        open_dataset(config())
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"holds no LeRobotDataset: there is no meta/info.json in it or below"):
            open_dataset(config(), root=root)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"holds 3 LeRobotDatasets below it, the first .*suite_2.*repo_id='you/one'"):
        open_dataset(config(), repo_id="you/one", root=folder)
    with pytest.raises(ValueError, match=r"recordings.* has 6 episodes, 0 to 5. Found `episodes`=\[7\]"):
        open_dataset(config(), root=folder, episodes=[7])


def test_folders_are_in_the_order_of_their_numbers(tmp_path):
    names = ["b_10", "b_9", "a/9/x", "a/10", "b_9/inner"]
    for name in names:
        (tmp_path / name / "meta").mkdir(parents=True)
        (tmp_path / name / "meta" / "info.json").touch()
    assert dataset_folders(tmp_path) == [tmp_path / name for name in ("a/9/x", "a/10", "b_9", "b_10")]
