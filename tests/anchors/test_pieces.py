"""Distances in pieces beside the formulas of `losses` in float64: values, and gradients of all that trains."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from craft_optim.anchors import losses
from craft_optim.anchors.pieces import (
    Distance,
    HeadRows,
    bernoulli_of,
    distance_in_pieces,
    kl_of,
    likelihood_of,
    none_of,
    pieces_of,
    rows_at,
    split_rows,
)

P, D, V = 23, 12, 40
KINDS = ["full", "top 1", "top 5", "top V", "top 5 without its rest", "tokens", "labels"]
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def teacher(kind: str) -> dict[str, Tensor]:
    logprobs = torch.randn(P, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    if kind == "full":
        return {"logprobs": logprobs}
    if kind == "labels":
        return {"logits": logprobs + 3.0}
    if kind == "tokens":
        return {"tokens": logprobs.argmin(-1)}
    k = V if "V" in kind else int(kind.split()[1])
    top = logprobs.topk(k)
    found = {"topk_logprobs": top.values, "topk_indices": top.indices.int()}
    if k < V and "without" not in kind:
        found["rest_logprob"] = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return found


def distance(known: dict[str, Tensor]) -> Distance:
    if "logits" in known:
        return bernoulli_of(known["logits"])
    return likelihood_of(known["tokens"]) if "tokens" in known else kl_of(known)


def by_formula(logits: Tensor, known: dict[str, Tensor]) -> Tensor:
    z = logits.double()
    if "logits" in known:
        return losses.bernoulli_kl(z, known["logits"].double())
    if "tokens" in known:
        return F.cross_entropy(z, known["tokens"])
    if "logprobs" in known:
        return losses.kl_divergence(z, known["logprobs"].double())
    return losses.topk_kl_divergence(
        z, known["topk_logprobs"].double(), known["topk_indices"], teacher_rest_logprob=known.get("rest_logprob")
    )


def head(dtype: torch.dtype, bias: bool = True, scale: float = 1.0, cap: float | None = None) -> HeadRows:
    generator = torch.Generator().manual_seed(2)
    hidden, weight, shift = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((P, D), (V, D), (V,))
    )
    return HeadRows(hidden, weight, shift if bias else None, dtype, scale, cap)


def leaves(rows: HeadRows) -> list[Tensor]:
    return [x for x in (rows.hidden, rows.weight, rows.bias) if x is not None]


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], rounding: float) -> None:
    for mine, its in zip(found, wanted, strict=True):
        assert mine.dtype == its.dtype
        apart = (mine.double() - its.double()).norm() / its.double().norm()
        assert apart <= rounding, apart.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("positions", [1, 5, P, 100], ids="pieces of {}".format)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (2.0, 3.0)])
def test_a_head_in_pieces(kind: str, dtype: torch.dtype, positions: int, scale: float, cap: float | None) -> None:
    rows, known = head(dtype, True, scale, cap), teacher(kind)
    expected = by_formula(rows.logits(), known)
    wanted = torch.autograd.grad(3.0 * expected, leaves(rows))
    found = distance_in_pieces(rows, distance(known), 4 * V * positions)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_close(torch.autograd.grad(3.0 * found, leaves(rows)), wanted, ROUNDING[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("positions", [1, 5, P, 100], ids="pieces of {}".format)
def test_logits_in_pieces(kind: str, dtype: torch.dtype, positions: int) -> None:
    logits, known = head(dtype).logits().detach().requires_grad_(), teacher(kind)
    before = logits.detach().clone()
    expected = by_formula(logits, known)
    wanted = torch.autograd.grad(3.0 * expected, [logits])
    found = distance_in_pieces(logits, distance(known), 4 * V * positions)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_close(torch.autograd.grad(3.0 * found, [logits]), wanted, ROUNDING[dtype])
    assert torch.equal(logits, before), "what the model gave is its own"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("moved_by", "rounding"), [(1e-2, 2e-4), (8e-2, 1e-5)], ids=["KL 7e-4", "KL 5e-2"])
def test_small_drifts_of_many_classes(kind: str, moved_by: float, rounding: float) -> None:
    """Beside float64: they are differences of numbers that are nearly equal."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((16, 32), (5000, 32)))
    at_first = F.linear(hidden, weight).double().log_softmax(-1)
    moved = hidden + moved_by * torch.randn(16, 32, generator=generator)
    top = at_first.topk(64)
    known = {
        "full": {"logprobs": at_first},
        "tokens": {"tokens": at_first.argmax(-1)},
        "top V": {"topk_logprobs": at_first.topk(5000).values, "topk_indices": at_first.topk(5000).indices},
    }.get(kind) or {
        "topk_logprobs": top.values,
        "topk_indices": top.indices,
        "rest_logprob": at_first.scatter(-1, top.indices, -torch.inf).logsumexp(-1),
    }
    rows = HeadRows(moved.requires_grad_(), weight, None, torch.float32)
    double = replace(rows, hidden=moved.detach().double().requires_grad_(), weight=weight.double(), dtype=torch.float64)
    expected = by_formula(double.logits(), known)
    (wanted,) = torch.autograd.grad(expected, [double.hidden])
    found = distance_in_pieces(rows, distance(known), 4 * 5000 * 7)
    (mine,) = torch.autograd.grad(found, [rows.hidden])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=rounding, abs=1e-8)
    assert float((mine.double() - wanted).norm()) <= rounding * float(wanted.norm()) + 1e-8


def test_nothing_is_computed_that_does_not_train() -> None:
    rows, known = head(torch.float32), teacher("full")
    rows.weight.requires_grad_(False)
    found = distance_in_pieces(rows, distance(known))
    found.backward()
    assert rows.weight.grad is None
    assert rows.hidden.grad is not None


def test_without_gradients_none_is_computed() -> None:
    asked, known = list[bool](), distance(teacher("full"))

    def spied(z: Tensor, at: slice, gradient: bool) -> Tensor:
        asked.append(gradient)
        return known(z, at, gradient)

    rows = head(torch.float32)
    for given in (rows, rows.logits()):
        found = distance_in_pieces(given, spied)
        with torch.no_grad():
            assert torch.equal(distance_in_pieces(given, spied), found.detach())
    assert asked == [True, False, True, False]


def test_float16_keeps_the_gradients_of_unlikely_classes() -> None:
    """Each of 2^15 classes gets about 1e-7 of the gradient: no loss scale has been put on it yet."""
    classes = 2**15
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(*shape, generator=generator).half() for shape in ((4, 8), (classes, 8)))
    weight *= 0.1
    known = {"logprobs": torch.randn(4, classes, generator=generator).mul(1e-2).log_softmax(-1)}
    rows = HeadRows(hidden.requires_grad_(), weight, None, torch.float16)
    expected = by_formula(F.linear(hidden.double(), weight.double()), known)
    (wanted,) = torch.autograd.grad(expected, [hidden])
    for given in (rows, rows.logits()):
        (mine,) = torch.autograd.grad(1024.0 * distance_in_pieces(given, distance(known)), [hidden])
        apart = mine.double() / 1024.0 - wanted.double()
        assert float(apart.norm()) <= 5e-3 * float(wanted.double().norm())


def test_the_same_logits_have_no_distance_to_the_bit() -> None:
    logits = head(torch.float32).logits()
    assert float(distance_in_pieces(logits, kl_of({"logprobs": logits.detach()}), 4 * V * 5).detach()) == 0.0


def test_under_autocast_all_but_the_product_is_as_without() -> None:
    rows, known = replace(head(torch.float32), dtype=torch.bfloat16), teacher("top 5")
    expected = by_formula(rows.logits(), known)
    wanted = torch.autograd.grad(expected, leaves(rows))
    with torch.autocast("cpu", torch.bfloat16):
        found = distance_in_pieces(rows, distance(known), 4 * V * 5)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_close(torch.autograd.grad(found, leaves(rows)), wanted, ROUNDING[torch.bfloat16])


def test_a_second_backward_is_refused() -> None:
    found = distance_in_pieces(head(torch.float32), distance(teacher("full")))
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already: call the closure again"):
        found.backward()


def test_parts_of_rows() -> None:
    rows = head(torch.float32)
    places = torch.tensor([3, 0, 22])
    assert rows.shape == (P, V)
    assert len(rows) == P
    logits = rows.logits().detach()
    for given in (rows, logits):
        chosen = rows_at(given, places)
        torch.testing.assert_close(torch.cat([z for _, z in pieces_of(chosen, 4 * V)]), logits[places])
        parts = split_rows(given, [20, 3])
        assert [len(part) for part in parts] == [20, 3]
        torch.testing.assert_close(torch.cat([z for _, z in pieces_of(parts[1])]), logits[20:])
        assert float(none_of(split_rows(given, [0, P])[0]).detach()) == 0.0
    assert [at for at, _ in pieces_of(rows, 4 * V * 10)] == [slice(0, 10), slice(10, 20), slice(20, P)]
