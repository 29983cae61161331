"""Each variant's one change."""

from dataclasses import replace

import pytest
import torch
from pareto.beyond import VARIANTS, HeldOutDual, LeastShare, augmented, interpolate, mixed, project_update, vary
from pareto.methods import Run
from pareto.prepared import SETTINGS, prepare
from pareto.setting import divergence, task_loss
from pareto.training import Job
from pareto_tiny import with_more_anchors

from craft_optim.dual import MultiplicativePI

pytestmark = pytest.mark.evidence


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "tiny", with_more_anchors)
    return prepare("tiny", 0, tmp_path)


def generator():
    return torch.Generator().manual_seed(0)


def test_held_out_dual_follows_what_it_measures():
    alone = MultiplicativePI()
    dual = HeldOutDual(alone, lambda: 0.2)
    state = dual.initial_state()
    assert dual(state, loss=1e-9, epsilon=0.1, cap=5.0) == alone(state, loss=0.2, epsilon=0.1, cap=5.0)


def test_mixed_pictures_are_between_two():
    pictures = torch.stack([torch.full((2, 2), float(x)) for x in (0, 10, 20, 30, 40)])
    found = mixed(pictures, generator())
    assert torch.equal(found[0::2], pictures[0::2])
    for changed, low in zip(found[1::2], (0.0, 20.0), strict=True):
        assert low < float(changed[0, 0]) < low + 10.0
        assert changed.unique().numel() == 1
    assert torch.equal(pictures[1], torch.full((2, 2), 10.0))


def test_mixed_texts_are_spliced():
    texts = torch.arange(4)[:, None].expand(4, 50)
    found = mixed(texts, generator())
    assert torch.equal(found[0::2], texts[0::2])
    for changed, (first, second) in zip(found[1::2], ((0, 1), (2, 3)), strict=True):
        cut = int((changed != first).nonzero()[0])
        assert 0 < cut < 50
        assert changed.tolist() == [first] * cut + [second] * (50 - cut)


def test_augmented_pictures_have_moved_by_a_pixel():
    picture = torch.zeros(64, 5, 5)
    picture[:, 2, 2] = 1.0
    found = augmented(picture, generator())
    assert float(found.sum()) == 64.0
    places = {tuple(x) for x in found.nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_augmented_texts_have_other_characters():
    texts = torch.randint(90, (40, 50), generator=generator())
    changed = (augmented(texts, generator()) != texts).float().mean()
    assert 0.03 < float(changed) < 0.07


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_update_loses_what_would_let_the_drift_grow(sign):
    before, anchors = [torch.tensor([1.0, 1.0])], [torch.tensor([0.0, 2.0])]
    parameters = [torch.tensor([1.5, 1.0 + sign * 0.5])]
    project_update(parameters, before, anchors)
    assert parameters[0].tolist() == [1.5, 1.0 if sign > 0.0 else 0.5]


def moved(prepared, strength, by):
    model = prepared.model()
    for p in model.parameters():
        p.data.add_(by * torch.randn(p.shape, generator=generator()))
    return Run(model, torch.optim.SGD(model.parameters()), prepared, strength, seed=0)


@torch.no_grad()
def drift(run):
    return float(divergence(run.model(run.prepared.setting.anchors.inputs), run.prepared.teacher))


def test_interpolation_ends_at_epsilon_exactly(prepared):
    run = moved(prepared, 0.01, 1.0)
    assert drift(run) > 0.05
    interpolate(run)
    assert drift(run) == pytest.approx(0.01, rel=0.01)


def test_interpolation_leaves_what_is_within_epsilon(prepared):
    run = moved(prepared, 100.0, 0.1)
    before = run.snapshot()
    interpolate(run)
    assert all(torch.equal(a, b) for a, b in zip(run.snapshot(), before, strict=True))


def gradients_of(loss, parameters):
    return torch.autograd.grad(loss, list(parameters))


def inner(a, b):
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def weight_of_first_step(task, anchors, drift, epsilon):
    """lambda of a controller that has seen nothing, at its cap |g_t| / |g_r| if that is lower."""
    cap = (inner(task, task) / inner(anchors, anchors)) ** 0.5
    controller = MultiplicativePI()
    return controller(controller.initial_state(), loss=drift, epsilon=epsilon, cap=cap).multiplier


def first_step(run, name):
    """A variant's first step from where the weights are, under SGD with a learning rate of 1."""
    run.base.param_groups[0]["lr"] = 1.0
    step, before = VARIANTS[name].start(run), run.snapshot()
    step(task_loss(run.model, run.prepared.setting.task))
    return [b - p.detach() for p, b in zip(run.parameters, before, strict=True)]


def batch_of_first_step(run):
    rows = next(run.anchor_rows())
    return run.prepared.setting.anchors.inputs[rows], run.prepared.teacher[rows]


def learned_a_little(prepared):
    """A run that has gone a short way down the task's gradient, which costs retention."""
    run = moved(prepared, 0.0, 0.0)
    gradients = gradients_of(task_loss(run.model, prepared.setting.task), run.parameters)
    for p, g in zip(run.parameters, gradients, strict=True):
        p.data.sub_(0.05 * g)
    return run


def with_epsilon(run, share):
    """The run, and an epsilon that is this share of its drift."""
    inputs, teacher = batch_of_first_step(run)
    with torch.no_grad():
        epsilon = share * float(divergence(run.model(inputs), teacher))
    return replace(run, strength=epsilon), epsilon


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.1])
def test_projection_of_the_update(prepared, share):
    """What plain SGD steps by is g_t + lambda g_r; above epsilon it must not work against the anchors."""
    run, epsilon = with_epsilon(learned_a_little(prepared), share)
    inputs, teacher = batch_of_first_step(run)
    task = gradients_of(task_loss(run.model, prepared.setting.task), run.parameters)
    drift = divergence(run.model(inputs), teacher)
    anchors = gradients_of(drift, run.parameters)
    lam = weight_of_first_step(task, anchors, drift.item(), epsilon)
    merged = [t + lam * r for t, r in zip(task, anchors, strict=True)]
    moving = inner(merged, anchors)
    if share == 0.9:
        assert moving < 0.0  # else there is nothing to project
    if share < 1.0 and moving < 0.0:
        merged = [m - moving / inner(anchors, anchors) * r for m, r in zip(merged, anchors, strict=True)]
    close(first_step(run, "update_projection"), merged)


@pytest.mark.parametrize("share", [0.01, 1.0, 100.0])
def test_own_budgets(prepared, share):
    """Of each half: drift with the other one as pretrained, lambda for half of epsilon, a projection of its own."""
    run, epsilon = with_epsilon(moved(prepared, 0.0, 0.3), share)
    inputs, teacher = batch_of_first_step(run)
    task = gradients_of(task_loss(run.model, prepared.setting.task), run.parameters)
    expected = []
    for half in (slice(0, 2), slice(2, 4)):  # weight and bias of either layer
        alone = prepared.model()
        own = list(alone.parameters())[half]
        for p, here in zip(own, run.parameters[half], strict=True):
            p.data.copy_(here)
        drift = divergence(alone(inputs), teacher)
        ours, anchors = task[half], gradients_of(drift, own)
        weight = weight_of_first_step(ours, anchors, drift.item(), epsilon / 2)
        if drift.item() > epsilon / 2 and inner(ours, anchors) < 0.0:
            weight -= inner(ours, anchors) / inner(anchors, anchors)
        expected += [t + weight * r for t, r in zip(ours, anchors, strict=True)]
    close(first_step(run, "own_budgets"), expected)


def test_least_share_bounds_lambda_from_below():
    dual, alone = LeastShare(0.3), MultiplicativePI()
    state = dual.initial_state()
    within = {"loss": 1e-3, "epsilon": 0.1, "cap": 2.0}  # far below epsilon: lambda would be small
    assert alone(state, **within).multiplier < 0.6
    assert dual(state, **within) == alone(state, **within)._replace(multiplier=pytest.approx(0.6))
    above = {"loss": 0.2, "epsilon": 0.1, "cap": 3.0}
    assert dual(state, **above) == alone(state, **above)
    assert dual(state, loss=0.0, epsilon=0.1).multiplier == alone.maximum  # of a gradient that is zero


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_holds_more_with_less_epsilon(name, prepared, tmp_path):
    low, high = (vary(Job("tiny", name, epsilon, 0), tmp_path)["drift_anchors"] for epsilon in (0.003, 1.0))
    assert low < 0.7 * high
