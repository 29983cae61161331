"""Categories of anchors: what a cache keeps of them, through interruptions and of damaged files."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCache, AnchorCacheError, Reading, build
from craft_optim.anchors.categories import by_category, categories_in, recorded
from craft_optim.anchors.manifest import manifest_text

NAMES = ["lift", "push", "lift", "", "open the drawer"] * 4


def asked(points: Tensor, size: int, names: list[str] = NAMES) -> list[dict[str, Any]]:
    starts = range(0, len(names), size)
    return [{"input": points[: len(names)][i : i + size], "category": names[i : i + size]} for i in starts]


@pytest.mark.parametrize("size", [20, 7, 3])
def test_each_anchor_keeps_its_own(classifier: nn.Module, points: Tensor, tmp_path: Any, size: int) -> None:
    cache = build(classifier, asked(points, size), tmp_path, shard_size=6, class_dim=-1)
    assert cache.categories == NAMES
    assert torch.equal(cache.read(range(20)).inputs["input"], points[:20])


def test_a_build_that_goes_on_has_those_of_the_first_part_too(
    classifier: nn.Module, points: Tensor, tmp_path: Any
) -> None:
    def broken() -> Any:
        yield from asked(points, 4)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(classifier, broken(), tmp_path / "a", shard_size=5, class_dim=-1)
    cache = build(classifier, asked(points, 4), tmp_path / "a", shard_size=5, class_dim=-1)
    whole = build(classifier, asked(points, 20), tmp_path / "b", shard_size=5, class_dim=-1)
    assert cache.categories == whole.categories == NAMES
    assert (cache.path / "cache.json").read_bytes() == (whole.path / "cache.json").read_bytes()


def test_anchors_that_are_generated_keep_theirs(llama: nn.Module, tmp_path: Any) -> None:
    from craft_optim.anchors.generation import greedy

    batches = [{"input_ids": torch.randint(1, 60, (2, width)), "category": [f"{width}", "b"]} for width in (4, 6)]
    cache = build(llama, batches, tmp_path, Reading(tokens=greedy(3), output="classes", class_dim=-1))
    assert cache.categories == ["4", "b", "6", "b"]


@pytest.mark.parametrize("category", [None, "lift", ["lift"], [1.5, 2.5], 3 * ["a"]])
def test_what_is_not_a_text_for_each_anchor_is_left_out_as_before(
    classifier: nn.Module, points: Tensor, tmp_path: Any, category: Any
) -> None:
    batch = {"input": points[:2], "category": category}
    if category == [1.5, 2.5]:
        with pytest.raises(TypeError, match="numbers in 'category'"):
            build(classifier, [batch], tmp_path, class_dim=-1)
        return
    assert build(classifier, [batch], tmp_path, class_dim=-1).categories == ["", ""]


def test_without_any_nothing_is_recorded(classifier: nn.Module, points: Tensor, tmp_path: Any) -> None:
    cache = build(classifier, [points], tmp_path, class_dim=-1)
    assert cache.categories == [""] * 50
    assert "categories" not in (tmp_path / "cache.json").read_text()


@pytest.mark.parametrize("names", [[], [""], ["a"], ["b", "a", "b", ""]])
def test_what_is_recorded_is_read(names: list[str]) -> None:
    assert categories_in(json.loads(json.dumps(recorded(names))), len(names)) == names


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {"names": ["a"]},
        {"names": ["a"], "of": [0]},
        {"names": ["a"], "of": [0, 1]},
        {"names": ["a"], "of": [0, -1]},
        {"names": ["a"], "of": [0, True]},
        {"names": ["a", 3], "of": [0, 0]},
    ],
)
def test_damaged_categories_are_refused(classifier: nn.Module, points: Tensor, tmp_path: Any, found: Any) -> None:
    build(classifier, asked(points, 2, ["a", "b"]), tmp_path, class_dim=-1)
    manifest = tmp_path / "cache.json"
    data = json.loads(manifest.read_text())
    data["shards"][0]["categories"] = found
    for key in ("format", "schema_version", "sha256"):
        del data[key]
    manifest.write_text(manifest_text(data))
    with pytest.raises(AnchorCacheError, match="'categories' must be names, and one of them for each of 2 anchors"):
        AnchorCache.open(tmp_path)


def test_anchors_by_category() -> None:
    assert dict(by_category(["b", "a", "b"])) == {"a": [1], "b": [0, 2]}
