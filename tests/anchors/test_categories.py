"""Categories of anchors: what a cache keeps of them, through interruptions and of damaged files."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from craft_optim import plan
from craft_optim.anchors import AnchorCache, AnchorCacheError, Reading, build
from craft_optim.anchors.categories import by_category, categories_in, in_line, recorded
from craft_optim.anchors.manifest import manifest_text
from craft_optim.anchors.structure import model_inputs

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


@pytest.mark.parametrize("category", [None, [None, None], ("", ""), [None, "lift"], np.array(["lift", "push"])])
def test_an_anchor_may_have_none(classifier: nn.Module, points: Tensor, tmp_path: Any, category: Any) -> None:
    cache = build(classifier, [{"input": points[:2], "category": category}], tmp_path, class_dim=-1)
    assert cache.categories == ["" if x is None else x for x in (["", ""] if category is None else list(category))]
    assert cache.structure.skipped == ()


@pytest.mark.parametrize("category", ["lift", ["lift"], [1, 2], [1.5, None], 3 * ["a"], np.arange(2), [["a"], ["b"]]])
def test_what_is_not_a_text_for_each_anchor_is_refused(
    classifier: nn.Module, points: Tensor, tmp_path: Any, category: Any
) -> None:
    with pytest.raises(ValueError, match='"category" of a batch must have a text for each of its 2 anchors'):
        build(classifier, [{"input": points[:2], "category": category}], tmp_path, class_dim=-1)


def test_some_batches_may_have_none(classifier: nn.Module, points: Tensor, tmp_path: Any) -> None:
    batches = [{"input": points[:2]}, {"input": points[2:4], "category": ["a", "b"]}, {"input": points[4:5]}]
    assert build(classifier, batches, tmp_path, class_dim=-1).categories == ["", "", "a", "b", ""]


def test_a_tensor_of_that_name_is_an_input(points: Tensor, tmp_path: Any) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, input: Tensor, category: Tensor) -> Tensor:
            return self.head(input) + category[:, None]

    cache = build(Named(), [{"input": points, "category": torch.arange(50)}], tmp_path, class_dim=-1)
    assert cache.structure.names == ("input", "category")
    assert cache.categories == [""] * 50


OTHER = [[""] * 20, ["other"] * 20, NAMES[::-1]]


@pytest.mark.parametrize("names", OTHER)
def test_other_categories_do_not_continue_a_build(
    classifier: nn.Module, points: Tensor, tmp_path: Any, names: list[str]
) -> None:
    def broken(names: list[str]) -> Any:
        yield from asked(points, 4, names)[:3]
        raise KeyboardInterrupt

    for first, second in ((NAMES, names), (names, NAMES)):
        folder = tmp_path / str(first is NAMES)
        with pytest.raises(KeyboardInterrupt):
            build(classifier, broken(first), folder, shard_size=5, class_dim=-1)
        with pytest.raises(AnchorCacheError, match="half built from other anchors: number 0 differs"):
            build(classifier, asked(points, 4, second), folder, shard_size=5, class_dim=-1)


@pytest.mark.parametrize("names", OTHER)
def test_other_categories_for_a_finished_cache_are_pointed_out(
    classifier: nn.Module, points: Tensor, tmp_path: Any, caplog: pytest.LogCaptureFixture, names: list[str]
) -> None:
    build(classifier, asked(points, 4), tmp_path, class_dim=-1)
    assert build(classifier, asked(points, 4), tmp_path, class_dim=-1).categories == NAMES
    assert "first anchors" not in caplog.text
    assert build(classifier, asked(points, 4, names), tmp_path, class_dim=-1).categories == NAMES
    assert "its first anchors are not the first batch" in caplog.text


def test_a_batch_with_categories_is_passed_on_without_them(points: Tensor) -> None:
    for category in (["a", "b"], [None, "a"], [], np.array(["a", "b"])):
        assert model_inputs({"input": points, "category": category}).keys() == {"input"}
    assert model_inputs({"input": points, "category": points}).keys() == {"input", "category"}
    found = plan(nn.Linear(6, 3), {"input": points}, {"input": points, "category": ["a"] * 50}, class_dim=-1, loss=None)
    assert found.anchor_batch_size == 50


@pytest.mark.parametrize(
    ("category", "shown"),
    [
        ("", "(none)"),
        (" \n", "(none)"),
        ("none", "none"),
        ("open\n the\tdrawer", "open the drawer"),
        ("a" * 40, "a" * 40),
        ("a" * 30 + "b" * 30, "a" * 19 + " ... " + "b" * 16),
        ("\ud800x", "?x"),
    ],
)
def test_a_category_takes_a_cell_of_a_table(category: str, shown: str) -> None:
    assert in_line(category) == shown
    assert len(shown) <= 40


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
