"""Each variant's one change."""

from dataclasses import replace

import pytest
import torch
from pareto.beyond import (
    VARIANTS,
    Averaged,
    Drift,
    HalfDrift,
    augmented,
    held_out,
    interpolate,
    mixed,
    own_budgets,
    project_update,
    vary,
    with_defaults,
)
from pareto.methods import METHODS, Run
from pareto.prepared import SETTINGS, prepare
from pareto.setting import divergence, task_loss
from pareto.training import Job
from pareto_tiny import with_more_anchors

from craft_optim.anchors.sampling import AnchorSampler

pytestmark = pytest.mark.evidence


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "tiny", with_more_anchors)
    return prepare("tiny", 0, tmp_path)


def generator():
    return torch.Generator().manual_seed(0)


def test_a_quarter_is_held_out(prepared):
    """Of the anchors every fourth is what epsilon is about; the others are trained on."""
    run = moved(prepared, 0.02, 0.0)
    inputs = prepared.setting.anchors.inputs
    (constraint,) = held_out(run).constraints.values()
    aside, rest = constraint.heldout, constraint.closure.cache
    assert torch.equal(aside.read(range(len(aside))).inputs, inputs[::4])
    assert torch.equal(rest.read(range(len(rest))).inputs, inputs[torch.arange(len(inputs)) % 4 > 0])


def test_the_drift_is_that_of_the_method(prepared):
    """So that a variant's one change is all that differs from the method \"craft\"."""
    run = moved(prepared, 0.02, 0.3)
    theirs = METHODS["craft"].start
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pareto.methods.CraftOptimizer", lambda base, retention, **named: seen.append(retention))
        theirs(run)
    for number in (1, 5):  # in pass 0 theirs wants the pretrained network; a cache rounds what that says
        torch.testing.assert_close(Drift(run).loss(number), seen[0].loss(number), rtol=5e-3, atol=0.0)


def test_changed_anchors_are_those_of_the_number(prepared):
    """The trust region asks again, and must see the same ones; the pretrained network has not drifted on them."""
    drift = Drift(moved(prepared, 0.02, 0.3), augmented)
    assert drift.loss(3) == drift.loss(3) != drift.loss(4)
    assert float(Drift(moved(prepared, 0.02, 0.0), mixed).loss(0).detach().abs()) < 1e-6


def test_gradients_are_averaged_over_passes(prepared):
    run = moved(prepared, 0.02, 0.3)
    drift, expected = Drift(run), None
    averaged = Averaged(drift, run.parameters)
    for number in range(3):
        loss = averaged.loss(number)
        new = gradients_of(drift.loss(number), run.parameters)
        expected = new if expected is None else [0.8 * a + 0.2 * b for a, b in zip(expected, new, strict=True)]
        torch.testing.assert_close(loss, drift.loss(number), rtol=1e-5, atol=1e-6)
        close(gradients_of(loss, run.parameters), expected)
        with torch.no_grad():  # as the trust region does; it is no pass
            assert averaged.loss(number + 7) == drift.loss(number + 7)


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


def with_little_retention(run):
    """As after many passes below epsilon; else lambda's first value outweighs what works against the anchors."""
    for group in run.base.param_groups:
        group["craft_dual_integral"] = 0.1


def first_step(run, name):
    """A variant's first step from where the weights are, under SGD with a learning rate of 1."""
    run.base.param_groups[0]["lr"] = 1.0
    step, before = VARIANTS[name].start(run), run.snapshot()
    with_little_retention(run)
    step(task_loss(run.model, run.prepared.setting.task))
    return [b - p.detach() for p, b in zip(run.parameters, before, strict=True)]


def batch_of_first_step(run):
    setting = run.prepared.setting
    rows = AnchorSampler(len(setting.anchors), setting.anchor_batch, run.seed).indices(0)
    return run.prepared.setting.anchors.inputs[rows], run.prepared.teacher[rows]


def learned_a_little(prepared):
    """A run that has gone a short way down the task's gradient, which costs retention."""
    run = moved(prepared, 0.0, 0.0)
    gradients = gradients_of(task_loss(run.model, prepared.setting.task), run.parameters)
    for p, g in zip(run.parameters, gradients, strict=True):
        p.data.sub_(0.05 * g)
    return run


def with_epsilon(run, share):
    """The run with an epsilon that is this share of its drift."""
    inputs, teacher = batch_of_first_step(run)
    with torch.no_grad():
        epsilon = share * float(divergence(run.model(inputs), teacher))
    return replace(run, strength=epsilon)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.1])
def test_projection_of_the_update(prepared, share):
    """A step without projection of the gradient; above epsilon what works against the anchors is taken from it."""
    run = with_epsilon(learned_a_little(prepared), share)
    inputs, teacher = batch_of_first_step(run)
    anchors = gradients_of(divergence(run.model(inputs), teacher), run.parameters)
    other = with_epsilon(learned_a_little(prepared), share)
    other.base.param_groups[0]["lr"] = 1.0
    reference, before = with_defaults(other, Drift(other), projection="never"), other.snapshot()
    with_little_retention(other)
    task_loss(other.model, prepared.setting.task).backward()
    reference.step()
    whole = [p.detach() - q for p, q in zip(other.parameters, before, strict=True)]
    moving = inner(whole, anchors)
    if share == 0.9:
        assert moving > 0.0  # else there is nothing to project
    if share < 1.0 and moving > 0.0:
        whole = [w - moving / inner(anchors, anchors) * r for w, r in zip(whole, anchors, strict=True)]
    close([-x for x in first_step(run, "update_projection")], whole)


def test_own_budgets(prepared):
    """Of each half: half of epsilon, drift with the other one as pretrained, and a gradient of its own alone."""
    run = moved(prepared, 0.04, 0.3)
    found = own_budgets(run).constraints
    assert {name: one.epsilon for name, one in found.items()} == {"early": 0.02, "late": 0.02}
    inputs, teacher = batch_of_first_step(run)
    for name, half in (("early", slice(0, 2)), ("late", slice(2, 4))):  # weight and bias of either layer
        alone = prepared.model()
        own = list(alone.parameters())[half]
        for p, here in zip(own, run.parameters[half], strict=True):
            p.data.copy_(here)
        drift = divergence(alone(inputs), teacher)
        loss = found[name].closure.loss(0)
        assert isinstance(found[name].closure, HalfDrift)
        torch.testing.assert_close(loss, drift, rtol=1e-4, atol=1e-7)
        close(gradients_of(loss, run.parameters[half]), gradients_of(drift, own))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_holds_more_with_less_epsilon(name, prepared, tmp_path):
    low, high = (vary(Job("tiny", name, epsilon, 0), tmp_path)["drift_anchors"] for epsilon in (0.003, 1.0))
    assert low < 0.7 * high
