"""How a model is read: refused where it cannot be, carried by the cache, and the same in every pass."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors import (
    AnchorCache,
    AnchorMismatchError,
    HiddenRetention,
    LogitRetention,
    OnlineRetention,
    Reading,
    TokenRetention,
    build,
)
from craft_optim.anchors.importers import write_cache
from craft_optim.anchors.manifest import FeatureSpec
from craft_optim.anchors.reading import reading_of


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(batch["x"].unsqueeze(1))
    return out


def first(batch: dict[str, Tensor]) -> Tensor:
    return batch["x"][:, :1] > -9


def spans(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"one": batch["x"][:, :1] > -9}


def written(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    return batch, run(model, batch).argmax(-1)


@pytest.fixture
def batches(points: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": x} for x in points.split(10)]


@pytest.fixture
def cache(classifier: nn.Module, batches: Any, tmp_path: Path) -> AnchorCache:
    return build(classifier, batches, tmp_path / "cache", Reading(run, first), progress=False, class_dim=-1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_dim": 2}, ValueError, "batch_dim=2"),
        ({"mask": "a", "tokens": 3}, ValueError, "exclude each other"),
        ({"tokens": 0}, ValueError, "tokens=0"),
        ({"pooling": {"all": "median"}}, ValueError, "'median'"),
        ({"pooling": {}}, ValueError, "`pooling` must give each span one of"),
        ({"forward": "run"}, TypeError, "`forward` must be a function. Found forward='run'"),
        ({"spans": {"a": 1}}, TypeError, "`spans` must be a function"),
        ({"frozen": "tower"}, TypeError, "one text, 'tower': put it in a list"),
        ({"autocast": "bfloat16"}, TypeError, r"torch\.dtype.*Found autocast='bfloat16'"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Reading(**settings)


def test_the_cache_carries_it_to_every_closure(classifier: nn.Module, batches: Any, tmp_path: Path) -> None:
    reading = Reading(run, spans=spans, tokens=written, pooling={"one": "last"}, autocast=torch.bfloat16)
    for _ in range(2):  # built, and found finished
        cache = build(classifier, batches, tmp_path, reading, layers=("1",), progress=False, class_dim=-1)
        assert cache.reading == replace(reading, output="classes", class_dim=2)
        for kind in (LogitRetention, HiddenRetention, TokenRetention):
            retention = kind(classifier, cache)
            assert retention.reading is cache.reading
            assert abs(retention().item()) < 1e-3
        assert AnchorCache.open(tmp_path, reading).reading == cache.reading
    online = OnlineRetention(classifier, cache, teacher=nn.Sequential(*classifier).requires_grad_(False), strict=False)
    assert online.reading is cache.reading


def test_what_the_manifest_knows_need_not_be_said(classifier: nn.Module, batches: Any, tmp_path: Path) -> None:
    classifier[0].requires_grad_(False)
    for batch in batches:
        batch["counts"] = torch.ones(len(batch["x"]), 1)
    known: dict[str, Any] = {"mask": "counts", "pooling": {"all": "last"}, "frozen": ("0",), "autocast": torch.bfloat16}
    build(classifier, batches, tmp_path, Reading(run, **known), layers=("1",), progress=False, class_dim=-1)
    known |= {"output": "classes", "class_dim": 2}
    assert AnchorCache.open(tmp_path).reading == Reading(**known)
    assert AnchorCache.open(tmp_path, Reading(run)).reading == Reading(run, **known)
    with torch.autocast("cpu", torch.bfloat16):  # what the teacher ran under counts, whoever had set it
        cache = build(classifier, batches, tmp_path / "b", Reading(run), progress=False, class_dim=-1)
    assert cache.reading == Reading(run, autocast=torch.bfloat16, output="classes", class_dim=2)


def test_a_function_that_is_missing_is_asked_for(classifier: nn.Module, cache: AnchorCache) -> None:
    opened = AnchorCache.open(cache.path)
    for make in (LogitRetention, OnlineRetention):
        with pytest.raises(
            AnchorMismatchError, match=r"forward=run, .* AnchorCache\.open\(path, Reading\(forward=run\)"
        ):
            make(classifier, opened)
    with pytest.raises(AnchorMismatchError, match="forward=run"):
        LogitRetention(classifier, cache, reading=Reading())
    with pytest.raises(AnchorMismatchError, match="mask=first"):
        OnlineRetention(classifier, AnchorCache.open(cache.path, Reading(run)))
    # the mask's positions are in the cache
    assert abs(LogitRetention(classifier, opened, reading=Reading(run))().item()) < 1e-3


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (Reading(lambda m, b: m(b)), r"forward='run'\. Found forward='<lambda>'"),
        (Reading(run, "x"), r"mask='first'\. Found mask='x'"),
        (Reading(run, spans=spans), r"spans=None\. Found spans='spans'"),
        (Reading(run, tokens=written), r"tokens=None\. Found tokens='written'"),
        (Reading(run, autocast=torch.bfloat16), r"autocast=None\. Found autocast='bfloat16'"),
        (Reading(run, batch_dim=1), r"batch_dim=0\. Found batch_dim=1"),
        (Reading(run, frozen=["0"]), r"frozen=\(\)\. Found frozen=\('0',\)"),
    ],
)
def test_another_one_is_refused(classifier: nn.Module, cache: AnchorCache, reading: Reading, words: str) -> None:
    for refuse in (lambda: AnchorCache.open(cache.path, reading), lambda: cache.retention(classifier, reading=reading)):
        with pytest.raises(AnchorMismatchError, match=f"{words}: pass the `Reading` that they were built with"):
            refuse()


def test_an_imported_cache_does_not_know_its_functions(classifier: nn.Module, batches: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        states = [(b, {"hidden.module:1.all": classifier[:2](b["x"])}) for b in batches]
    cache = write_cache(tmp_path, states, FeatureSpec(layers=("1",), pooling={"all": "mean"}, dtype="float32"))
    assert HiddenRetention(classifier, cache, reading=Reading(run))().item() < 1e-6


def test_pickles_leave_functions_behind(classifier: nn.Module, batches: Any, tmp_path: Path) -> None:
    cache = build(
        classifier,
        batches,
        tmp_path,
        Reading(lambda m, b: m(b["x"]), pooling={"all": "mean"}),
        layers=("1",),
        class_dim=-1,
    )
    again = pickle.loads(pickle.dumps(cache))
    assert (
        again.reading
        == Reading(pooling={"all": "mean"}, output="classes", class_dim=1)
        == reading_of(AnchorCache.open(tmp_path))
    )
    with pytest.raises(AnchorMismatchError, match="forward="):
        LogitRetention(classifier, again)


def test_the_closure_that_fits(classifier: nn.Module, cache: AnchorCache, batches: Any, tmp_path: Path) -> None:
    retention = cache.retention(classifier, batch_size=7, seed=3, workers=0)
    assert isinstance(retention, LogitRetention)
    assert (retention.batch_size, retention.seed, retention.workers) == (7, 3, 0)
    both = build(classifier, batches, tmp_path / "both", Reading(run), layers=("1",), progress=False, class_dim=-1)
    assert both.kinds == ("logits", "hidden")
    for kind in (None, "tokens"):
        with pytest.raises(ValueError, match=rf"one of 'logits', 'hidden', which .*both holds.*Found kind={kind!r}"):
            both.retention(classifier, kind)
    hidden = both.retention(classifier, "hidden", loss="cosine")
    assert isinstance(hidden, HiddenRetention)
    assert hidden.unit == "cosine distance"
