"""Batches as named tensors and back."""

from collections import UserDict
from typing import Any

import numpy as np
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
        ("text", TypeError, r"Found str: tokenize texts first, such as tokenizer\("),
        (["a", "b"], TypeError, r"str at place 0: tokenize texts first"),
        ([["a", "b"], ["c"]], TypeError, r"list at place 0: tokenize texts first"),
        ({"text": ["a", "b"]}, TypeError, r"\['text'\]: tokenize texts first"),
        ([{"input_ids": [1, 2]}, {"input_ids": [3]}], TypeError, r"dict at place 0: these look like single examples"),
        ([{"input_ids": X}, {"input_ids": X}], TypeError, r"dict at place 0: these look like single examples"),
        ([[1, 2], [3]], TypeError, r"list at place 0: these look like single examples.*DataLoader"),
        ({"input_ids": [[1, 2], [3]]}, TypeError, r"list of numbers in 'input_ids'.*return_tensors='pt'"),
        ({"input_ids": X, "attention_mask": [[1, 1]] * 3}, TypeError, r"list of numbers in 'attention_mask'"),
        ({"input_ids": X, "mask": np.ones((3, 2))}, TypeError, r"ndarray of numbers in 'mask'"),
        ({"input_ids": X, "rows": [Y, Y]}, TypeError, r"list of numbers in 'rows'"),
        ((X, "text"), TypeError, "str at place 1"),
        ({0: X}, TypeError, "keys"),
        ({"a": "b"}, TypeError, "at least one tensor"),
        ({"x": X, "y": torch.zeros(2)}, ValueError, r"first dimension.*pass Reading\(lengths="),
        ({"x": torch.tensor(1.0)}, ValueError, "'x'"),
        (torch.zeros(0, 3), ValueError, "at least one"),
        (X.to_sparse(), ValueError, "dense"),
    ],
)
def test_what_cannot_be_stored_is_refused(batch: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flatten(batch)
