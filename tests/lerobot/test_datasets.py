"""Which frames, pictures and instructions of a dataset become anchors."""

from collections import Counter
from types import SimpleNamespace

import pytest
import small
import torch
from datasets import Dataset
from metaworld_pi0_fast import ASSETS, OLD_TASK
from metaworld_pi0_fast.demonstrations import open_dataset

from craft_optim.lerobot import adapter_for, anchor_batches, image_keys, prompts, spread_frames


class Rows:
    """Samples without a LeRobotDataset around them."""

    def __init__(self, *samples, **about):
        self.samples = samples
        vars(self).update(about)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Labelled(Rows):
    """So many frames of each (task, episode), in this order."""

    def __init__(self, *parts):
        rows = [(task, episode) for task, episode, frames in parts for _ in range(frames)]
        super().__init__(*rows)
        self.hf_dataset = Dataset.from_dict({"task_index": [t for t, _ in rows], "episode_index": [e for _, e in rows]})


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(ASSETS / "demonstrations" / OLD_TASK, [0, 1])


def test_cameras_of_a_lerobot_dataset(dataset):
    assert image_keys(dataset) == ["observation.image"]


@pytest.mark.parametrize(
    "about",
    [
        {"meta": SimpleNamespace(camera_keys=["observation.images.top", "pixels.wrist"])},
        {
            "features": {
                "observation.images.top": {"dtype": "video"},
                "observation.state": {"dtype": "float32"},
                "pixels.wrist": {"dtype": "image"},
            }
        },
        {},
    ],
)
def test_every_camera_is_found_by_what_the_dataset_says_or_holds(about):
    sample = {
        "observation.images.top": torch.zeros(3, 8, 8, dtype=torch.uint8),
        "observation.state": torch.zeros(3),
        "action": torch.zeros(8, 8),
        "mask": torch.zeros(3, 8, 8, dtype=torch.bool),
        "history": torch.zeros(5, 8, 8),
        "task": "push",
        "pixels.wrist": torch.zeros(8, 8, 1),
    }
    assert image_keys(Rows(sample, **about)) == ["observation.images.top", "pixels.wrist"]


def test_a_dataset_without_pictures_says_what_it_has():
    with pytest.raises(ValueError, match=r"no pictures.*\['action'\]"):
        image_keys(Rows({"action": torch.zeros(4)}))


def test_prompts_of_datasets_and_files(dataset, tmp_path):
    assert prompts(dataset) == ["Open a drawer"]
    assert prompts(Rows({"task": "b"}, {"task": "a"}, {"task": "b"})) == ["b", "a"]
    file = tmp_path / "prompts.txt"
    file.write_text("# comment\n\n  öffne die Lade \nclose it  # twice\n", encoding="utf-8")
    assert prompts(file) == prompts(str(file)) == ["öffne die Lade", "close it  # twice"]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"no instructions.*prompts\.txt"):
        prompts(file)


def test_frames_are_spread_over_tasks_and_episodes():
    dataset = Labelled((0, 0, 40), (1, 1, 3), (0, 2, 40), (2, 3, 100))
    frames = spread_frames(dataset, 23)
    assert frames == sorted(set(frames)) == spread_frames(dataset, 23)
    taken = Counter(dataset[frame] for frame in frames)
    # The short task gives all that it has, the others the rest in halves, evenly over their episodes.
    assert taken == {(0, 0): 5, (0, 2): 5, (1, 1): 3, (2, 3): 10}
    gaps = torch.tensor([frame for frame in frames if dataset[frame][1] == 3]).diff()
    assert gaps.unique().tolist() == [10]
    assert spread_frames(dataset, 183) == list(range(183))
    assert spread_frames(Rows(*range(10)), 2) == [2, 7]
    for count in (0, 184):
        with pytest.raises(ValueError, match=rf"\[1, 183\].*count={count}"):
            spread_frames(dataset, count)


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla", "act"])
def test_batches_hold_what_the_policy_reads_of_every_camera(name, tmp_path):
    policy = small.build(name, tmp_path / "vlm")
    dataset = small.TwoCameras(policy.config)
    preprocessor = small.preprocessor(policy, dataset.stats)
    adapter = adapter_for(policy)
    batches = list(anchor_batches(dataset, preprocessor, adapter, batch_size=4, count=10))
    assert [len(batch[small.TOP]) for batch in batches] == [4, 4, 2]
    assert {small.TOP, small.WRIST} < batches[0].keys()
    assert "task" not in batches[0]
    cache = adapter.build(policy, batches, tmp_path / "anchors")
    # The same frames in other batches are the same anchors.
    again = anchor_batches(dataset, preprocessor, adapter, batch_size=10, indices=spread_frames(dataset, 10))
    stored = cache.read(range(10)).inputs
    for key, value in next(again).items():
        if key != "category":
            assert torch.equal(stored[key], value), key
    assert adapter.retention(policy, cache, batch_size=4).drift() < 1e-4


def test_given_prompts_take_the_frames_own_place_in_turn():
    dataset = Rows(*({"task": "own", "x": torch.tensor(i)} for i in range(5)), features={"x": {"dtype": "image"}})
    adapter = SimpleNamespace(inputs=lambda batch: batch)
    batches = list(anchor_batches(dataset, dict, adapter, batch_size=2, prompts=["a", "b", "c"]))
    assert [batch["task"] for batch in batches] == [["a", "b"], ["c", "a"], ["b"]]
    assert [batch["category"] for batch in batches] == [["a", "b"], ["c", "a"], ["b"]]
    assert [batch["task"] for batch in anchor_batches(dataset, dict, adapter, indices=[1, 4])] == [["own", "own"]]
    numbered = Rows(*({"task": i, "x": torch.tensor(i)} for i in range(3)), features={"x": {"dtype": "image"}})
    (batch,) = anchor_batches(numbered, dict, adapter)
    assert "category" not in batch


def test_byte_images_reach_the_preprocessor_as_lerobot_train_gives_them():
    image = torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8)
    adapter = SimpleNamespace(inputs=lambda batch: batch)
    (batch,) = anchor_batches(Rows({"pixels.top": image, "steps": torch.tensor([7], dtype=torch.uint8)}), dict, adapter)
    assert torch.equal(batch["pixels.top"][0], image.float() / 255)
    assert batch["steps"].dtype == torch.uint8


def test_frames_without_pictures_and_how_many_batches_there_are():
    adapter = SimpleNamespace(inputs=lambda batch: batch)
    rows = Rows(*({"x": torch.tensor([float(i)])} for i in range(5)))
    batches = anchor_batches(rows, dict, adapter, batch_size=2)
    assert len(batches) == 3
    assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"no pictures. Found keys \['x'\]"):
        image_keys(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"count": 1, "indices": [0]}, "exclude each other"),
        ({"prompts": "one"}, "list of at least one"),
        ({"prompts": []}, "list of at least one"),
        ({"count": 3}, r"\[1, 2\]"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        anchor_batches(Rows({}, {}), None, None, **settings)
