"""Losses against slow references in float64, one position and one class at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from craft_optim.anchors import losses

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def reference_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def reference_kl(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for q_row, p_row in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p, top_q = reference_softmax(p_row), max(q_row)
        log_z = top_q + math.log(sum(math.exp(x - top_q) for x in q_row))
        total += sum(pi * (math.log(pi) - (x - log_z)) for pi, x in zip(p, q_row, strict=True) if pi > 0)
    return total / len(student)


def reference_topk_kl(student: Tensor, teacher: Tensor, k: int) -> float:
    """KL after merging all classes but the teacher's top k."""
    total = 0.0
    for q_row, p_row in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p, q = reference_softmax(p_row), reference_softmax(q_row)
        order = sorted(range(len(p)), key=lambda i: -p[i])
        pairs = [(p[i], q[i]) for i in order[:k]] + [(sum(p[i] for i in order[k:]), sum(q[i] for i in order[k:]))]
        total += sum(a * math.log(a / b) for a, b in pairs if a > 0)
    return total / len(student)


def topk_of(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    logprobs = teacher.log_softmax(-1)
    top = logprobs.topk(k)
    rest = None
    if k < teacher.shape[-1]:
        rest = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return top.values, top.indices, rest


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_kl_matches_the_reference(dtype: torch.dtype, scale: float) -> None:
    student, teacher = (torch.randn(2, 7, 11) * scale).to(dtype), (torch.randn(2, 7, 11) * scale).to(dtype)
    value = losses.kl_divergence(student, teacher)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(value) == pytest.approx(reference_kl(student.flatten(0, 1), teacher.flatten(0, 1)), rel=1e-4, abs=1e-7)


def test_kl_is_teacher_to_student() -> None:
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert float(losses.kl_divergence(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.kl_divergence(teacher, student)) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_logprobs_are_normalised(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 500) * 3
    rounded = logits.log_softmax(-1).to(dtype)
    naive = (rounded.float().exp() * (rounded.float() - logits.log_softmax(-1))).sum(-1)
    value = float(losses.kl_divergence(logits, rounded))
    assert 0.0 <= value < 1e-4
    assert value < float(naive.abs().mean()) / 5  # what it would be with probabilities that do not add up


def test_the_mask_selects_and_the_mean_is_over_valid_positions() -> None:
    student, teacher = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.rand(3, 5) < 0.5
    student[~mask] = torch.nan  # what does not count may be anything
    expected = reference_kl(student[mask], teacher[mask])
    assert float(losses.kl_divergence(student, teacher, mask)) == pytest.approx(expected, rel=1e-4)
    assert float(losses.kl_divergence(student, teacher, mask.long())) == pytest.approx(expected, rel=1e-4)
    student = student.nan_to_num(0.0).requires_grad_()
    losses.kl_divergence(student, teacher, mask).backward()
    assert student.grad is not None
    assert bool((student.grad[~mask] == 0).all())
    assert bool((student.grad[mask] != 0).any())


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    for loss in (losses.kl_divergence, losses.feature_mse, losses.feature_l1, losses.feature_cosine):
        loss(student, teacher).backward()
        assert student.grad is not None
        assert teacher.grad is None
        student.grad = None
    values, indices, rest = topk_of(teacher, 2)
    losses.topk_kl_divergence(student, values, indices, teacher_rest_logprob=rest).backward()
    assert teacher.grad is None


def test_gradients_match_finite_differences() -> None:
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    values, indices, rest = topk_of(teacher, 2)
    mask = torch.tensor([True, False, True, True])
    for function in (
        lambda s: losses.kl_divergence(s, teacher, mask),
        lambda s: losses.topk_kl_divergence(s, values, indices, mask, rest),
        lambda s: losses.topk_kl_divergence(s, values, indices, mask),
        lambda s: losses.feature_mse(s, teacher, mask, 0.7),
        lambda s: losses.feature_l1(s, teacher, mask, 0.7),
        lambda s: losses.feature_cosine(s, teacher, mask),
    ):
        assert torch.autograd.gradcheck(function, (student,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 3, 10, 11])
def test_topk_matches_the_reference(dtype: torch.dtype, k: int) -> None:
    student, teacher = (torch.randn(20, 11) * 2).to(dtype), torch.randn(20, 11) * 2
    values, indices, rest = topk_of(teacher, k)
    expected = reference_topk_kl(student, teacher, k)
    for given_rest in (rest, None):
        value = losses.topk_kl_divergence(student, values, indices.int(), teacher_rest_logprob=given_rest)
        assert float(value) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), scale=st.sampled_from([0.1, 1.0, 10.0, 60.0]))
def test_topk_is_a_lower_bound_that_grows_with_k(seed: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(5, classes, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(5, classes, generator=generator, dtype=torch.float64) * scale
    full = float(losses.kl_divergence(student, teacher))
    previous = 0.0
    for k in range(1, classes + 1):
        values, indices, rest = topk_of(teacher, k)
        value = float(losses.topk_kl_divergence(student, values, indices, teacher_rest_logprob=rest))
        assert previous - 1e-9 <= value <= full + 1e-9
        previous = value
    assert previous == pytest.approx(full, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("student_gap", [0.0, 50.0, 300.0])
@pytest.mark.parametrize("teacher_gap", [0.0, 50.0, 300.0])
def test_topk_is_finite_when_nothing_remains(student_gap: float, teacher_gap: float) -> None:
    """A gap of 50 leaves less mass than float32 can see beside one, 300 less than it can hold."""
    teacher, student = torch.zeros(1, 6), torch.zeros(1, 6)
    teacher[:, :2] = teacher_gap + 0.01  # no ties
    student[:, :2] = student_gap
    student.requires_grad_()
    values, indices, rest = topk_of(teacher, 2)
    for given_rest in (rest, None):
        value = losses.topk_kl_divergence(student, values, indices, teacher_rest_logprob=given_rest)
        (gradient,) = torch.autograd.grad(value, student)
        assert bool(value.isfinite())
        assert bool(gradient.isfinite().all())
        if student_gap == teacher_gap:
            assert abs(value.item()) < 2e-5  # 0.01 above
    if teacher_gap == 0.0 and student_gap > 0.0:
        p = 2 * math.exp(0.01) / (2 * math.exp(0.01) + 4)
        # the student has mass 4 exp(-gap) / 2 left for the other four
        expected = p * math.log(p) + (1 - p) * (math.log((1 - p) / 2) + student_gap)
        value = losses.topk_kl_divergence(student, values, indices, teacher_rest_logprob=rest)
        assert value.item() == pytest.approx(expected, rel=1e-4)
        assert float(torch.autograd.grad(value, student)[0].abs().max()) > 0.1


def test_the_stored_remaining_mass_beats_the_subtracted_one() -> None:
    """bfloat16 rounding of the top classes is larger than what remains."""
    logits = torch.randn(200, 50) * 2
    logits[:, :3] += 12
    values, indices, rest = topk_of(logits, 3)
    assert rest is not None
    coarse = values.bfloat16(), indices
    stored = losses.topk_kl_divergence(logits, *coarse, teacher_rest_logprob=rest.bfloat16())
    subtracted = losses.topk_kl_divergence(logits, *coarse)
    assert abs(float(stored)) < 5e-5
    assert float(subtracted) > 10 * float(stored)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_features_match_the_references_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    student = (torch.randn(6, 9, dtype=torch.float64) * scale).to(dtype)
    teacher = (torch.randn(6, 9, dtype=torch.float64) * scale).to(dtype)
    s, t = student.double(), teacher.double()
    variance = float(t.var(0, unbiased=False).mean())
    squares = sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
    absolutes = sum(abs(a - b) for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(s, t, strict=True)]
    assert float(losses.feature_mse(student, teacher, variance=variance)) == pytest.approx(
        squares / 54 / variance, rel=1e-4
    )
    assert float(losses.feature_l1(student, teacher, variance=variance)) == pytest.approx(
        absolutes / 54 / variance**0.5, rel=1e-4
    )
    assert float(losses.feature_cosine(student, teacher)) == pytest.approx(1 - sum(cosines) / 6, rel=1e-3, abs=1e-6)


def test_replacing_features_by_their_mean_costs_all_of_their_variance() -> None:
    teacher = torch.randn(100, 8) * torch.arange(1, 9) + 5
    mean = teacher.mean(0, keepdim=True).expand_as(teacher)
    variance = float(teacher.var(0, unbiased=False).mean())
    assert float(losses.feature_mse(mean, teacher, variance=variance)) == pytest.approx(1.0, rel=1e-5)


def test_a_zero_vector_has_a_finite_cosine_gradient() -> None:
    student = torch.zeros(2, 4, requires_grad=True)
    value = losses.feature_cosine(student, torch.randn(2, 4))
    assert value.item() == pytest.approx(1.0)
    assert bool(torch.autograd.grad(value, student)[0].isfinite().all())


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf])
def test_a_useless_variance_is_refused(variance: float) -> None:
    for loss in (losses.feature_mse, losses.feature_l1):
        with pytest.raises(ValueError, match="variance"):
            loss(torch.ones(2, 3), torch.zeros(2, 3), variance=variance)


def test_shapes_and_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        losses.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="mask"):
        losses.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    for loss in (losses.kl_divergence, losses.feature_mse):
        with pytest.raises(ValueError, match="no position"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="k=4"):
        losses.topk_kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="all dimensions but the last"):
        losses.topk_kl_divergence(torch.zeros(3, 3), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32))


# Independent labels, and similarities


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0, 300.0])
def test_bernoulli_kl_is_that_of_each_label(dtype: torch.dtype, scale: float) -> None:
    student, teacher = (torch.randn(6, 3) * scale).to(dtype), (torch.randn(6, 3) * scale).to(dtype)
    total = 0.0
    for z, z0 in zip(student.double().flatten().tolist(), teacher.double().flatten().tolist(), strict=True):
        for sign in (1.0, -1.0):  # log sigmoid(x) = -log(1 + exp(-x)), without overflow
            logs = [min(sign * x, 0.0) - math.log1p(math.exp(-abs(x))) for x in (z, z0)]
            total += math.exp(logs[1]) * (logs[1] - logs[0])
    assert float(losses.bernoulli_kl(student, teacher)) == pytest.approx(total / 18, rel=1e-4, abs=1e-6)
    assert float(losses.bernoulli_kl(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)


def test_bernoulli_kl_is_the_kl_of_two_classes() -> None:
    student, teacher = torch.randn(7, 1), torch.randn(7, 1)
    both = (torch.cat([torch.zeros_like(x), x], 1) for x in (student, teacher))
    assert float(losses.bernoulli_kl(student, teacher)) == pytest.approx(float(losses.kl_divergence(*both)), rel=1e-5)


def test_the_gradient_of_bernoulli_kl_is_that_of_its_logits() -> None:
    student, teacher = torch.tensor([[-1e4, 0.3, 1e4]], requires_grad=True), torch.tensor([[1e4, -0.4, -1e4]])
    (found,) = torch.autograd.grad(losses.bernoulli_kl(student, teacher), student)
    torch.testing.assert_close(found, (student.sigmoid() - teacher.sigmoid()).detach() / 3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_similarities_are_compared_pair_by_pair(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(5, 4).to(dtype), torch.randn(5, 4).to(dtype)
    s, t = ((x.double() / x.double().norm(dim=1, keepdim=True)) for x in (student, teacher))
    expected = [float((s[i] @ s[j] - t[i] @ t[j]) ** 2) for i in range(5) for j in range(5) if i != j]
    assert float(losses.similarity_mse(student, teacher)) == pytest.approx(sum(expected) / 20, rel=1e-4)
    with pytest.raises(ValueError, match="two vectors"):
        losses.similarity_mse(student[:1], teacher[:1])
