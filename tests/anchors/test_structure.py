"""Batches as named tensors and back."""

from collections import UserDict
from typing import Any

import pytest
import torch

from craft_optim.anchors.structure import flatten, map_tensors

X, Y = torch.zeros(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("batch", "kind", "names", "skipped"),
    [
        (X, "tensor", ["0"], []),
        ((X, None, Y), "tuple", ["0", "2"], ["1"]),
        ([X, Y], "tuple", ["0", "1"], []),
        (
            {"observation.image": X, "task": ["a", "b", "c"], "none": None},
            "mapping",
            ["observation.image"],
            ["task", "none"],
        ),
        (UserDict({"x": X}), "mapping", ["x"], []),
    ],
)
def test_round_trip(batch: Any, kind: str, names: list[str], skipped: list[str]) -> None:
    flat = flatten(batch)
    structure, named = flat.structure, flat.tensors
    assert (structure.kind, list(structure.names), list(structure.skipped), flat.count) == (kind, names, skipped, 3)
    rebuilt = structure.rebuild(named)
    assert flatten(rebuilt).tensors.keys() == named.keys()
    assert isinstance(rebuilt, {"tensor": torch.Tensor, "tuple": tuple, "mapping": dict}[kind])
    if kind == "tuple":
        assert len(rebuilt) == len(batch)
    moved = map_tensors(lambda x: x + 1, rebuilt)
    for name, x in flatten(moved).tensors.items():
        assert torch.equal(x, named[name] + 1)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ("text", TypeError, "Found str"),
        ((X, "text"), TypeError, "str at place 1"),
        ({0: X}, TypeError, "keys"),
        ({"a": "b"}, TypeError, "at least one tensor"),
        ({"x": X, "y": torch.zeros(2)}, ValueError, "first dimension"),
        ({"x": torch.tensor(1.0)}, ValueError, "'x'"),
        (torch.zeros(0, 3), ValueError, "at least one"),
        (X.to_sparse(), ValueError, "dense"),
    ],
)
def test_what_cannot_be_stored_is_refused(batch: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flatten(batch)
