"""Room on the disk: said before the first shard is written, and refused where it is too little."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCacheError, build
from craft_optim.anchors.room import bytes_on_disk

# 50 anchors of 6 floats and 4 halves
EACH, ALL = 32, 1600


def have(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9999, 1, free))


def test_what_a_cache_takes_is_said_before_it_is_written(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    have(ALL, monkeypatch)
    with caplog.at_level(logging.INFO, "craft_optim"):
        build(classifier, points.split(10), tmp_path / "a", class_dim=-1)
        build(classifier, iter(points.split(10)), tmp_path / "b", class_dim=-1)
    said = [message for message in caplog.messages if "free" in message]
    assert said == [
        f"anchors in {tmp_path / 'a'}: about 50, 32 bytes each, 1.6 kB in all; 1.6 kB are free",
        f"anchors in {tmp_path / 'b'}: 32 bytes each; 1.6 kB are free",
    ]


def test_what_does_not_fit_is_refused_and_nothing_is_left(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(ALL - 1, monkeypatch)
    with pytest.raises(
        AnchorCacheError, match=r"would take about 1\.6 kB, 50 anchors of 32 bytes, and 1\.6 kB are free"
    ):
        build(classifier, points.split(10), tmp_path / "anchors", class_dim=-1)
    assert list((tmp_path / "anchors").iterdir()) == []


def test_what_is_there_already_needs_no_room(
    classifier: nn.Module, points: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    class Batches:
        stops = True

        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[Tensor]:
            for number, batch in enumerate(points.split(10)):
                if self.stops and number == 3:
                    raise Stopped
                yield batch

    batches, settings = Batches(), {"class_dim": -1, "shard_size": 10}
    with pytest.raises(Stopped):
        build(classifier, batches, tmp_path, **settings)
    batches.stops = False
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert written >= 30 * EACH
    have(ALL - written - 1, monkeypatch)
    with pytest.raises(AnchorCacheError, match="would take"):
        build(classifier, batches, tmp_path, **settings)
    have(ALL - written, monkeypatch)
    assert len(build(classifier, batches, tmp_path, **settings)) == 50


def test_images_count_as_the_bytes_that_they_become() -> None:
    inputs = {"image": torch.zeros(2, 3, 4, 4), "state": torch.zeros(2, 5)}
    features = {"logprobs": torch.zeros(2, 7, dtype=torch.float16)}
    assert bytes_on_disk(inputs, features, "uint8") == 2 * (48 + 20 + 14)
    assert bytes_on_disk(inputs, features, "keep") == 2 * (192 + 20 + 14)
