"""Each method's step against its formula, on a tiny network under SGD with a learning rate of 1."""

from dataclasses import replace

import pytest
import torch
from pareto.methods import METHODS, Run, a_gem, fisher_diagonal
from pareto.prepared import SETTINGS, prepare
from pareto.setting import Examples, chance, divergence, orders, score, task_loss, teacher_logprobs
from pareto.training import Job, fine_tune
from pareto_tiny import tiny

from craft_optim import Constraint

pytestmark = pytest.mark.evidence


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "tiny", tiny)
    return prepare("tiny", 0, tmp_path)


@pytest.fixture
def run(prepared):
    """Of a model that has moved a little since it was pretrained."""

    def make(strength, moved=0.1):
        model = prepared.model()
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.data.add_(moved * torch.randn(p.shape, generator=generator))
        return Run(model, torch.optim.SGD(model.parameters(), lr=1.0), prepared, strength, seed=0)

    return make


def gradients(run, loss):
    return torch.autograd.grad(loss, run.parameters)


def step_of(name, run):
    """What one step of the method subtracts from the weights."""
    step, before = METHODS[name].start(run), run.snapshot()
    run.base.zero_grad()
    step(task_loss(run.model, run.prepared.setting.task))
    return [b - p.detach() for p, b in zip(run.parameters, before, strict=True)]


def both(run):
    setting = run.prepared.setting
    return gradients(run, task_loss(run.model, setting.task)), gradients(run, task_loss(run.model, setting.anchors))


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_plain(run):
    of = run(0.0)
    task, _ = both(of)
    close(step_of("plain", of), task)


def test_replay(run):
    of = run(0.7)
    task, anchors = both(of)
    close(step_of("replay", of), [t + 0.7 * a for t, a in zip(task, anchors, strict=True)])


def test_fixed_lambda(run):
    of = run(0.7)
    inputs, teacher = of.prepared.setting.anchors.inputs, of.prepared.model()
    p = teacher(inputs).softmax(-1).detach()
    drift = (p * (p.log() - of.model(inputs).softmax(-1).log())).sum() / len(inputs)
    task, kl = both(of)[0], gradients(of, drift)
    close(step_of("fixed", of), [t + 0.7 * k for t, k in zip(task, kl, strict=True)])


def away(method, of):
    """A step after the weights have left where the method started, and how far they are."""
    step = METHODS[method].start(of)
    start = of.snapshot()
    for p in of.parameters:
        p.data.add_(0.2)
    task, before = both(of)[0], of.snapshot()
    of.base.zero_grad()
    step(task_loss(of.model, of.prepared.setting.task))
    found = [b - p.detach() for p, b in zip(of.parameters, before, strict=True)]
    return found, task, [b - s for b, s in zip(before, start, strict=True)]


def test_l2_sp(run):
    found, task, moved = away("l2_sp", run(0.7))
    close(found, [t + 0.7 * m for t, m in zip(task, moved, strict=True)])


def test_ewc(run):
    of = run(0.7)
    fisher = fisher_diagonal(of)
    found, task, moved = away("ewc", of)
    close(found, [t + 0.7 * f * m for t, f, m in zip(task, fisher, moved, strict=True)])


def test_fisher_is_the_expectation_under_the_networks_own_answers(prepared):
    """Of the last layer by hand: sum_y p_y ((p - onehot(y)) x^T)^2, and many copies of one anchor instead of a sum."""
    copies = 3000
    one = prepared.setting.anchors[:1]
    setting = replace(prepared.setting, anchors=Examples(one.inputs.expand(copies, -1, -1), one.targets.expand(copies)))
    model = setting.make_model()  # untrained, and then: one answer is likelier, and the other one not rare
    model[-1].bias.data = torch.tensor([0.0, 1.4])
    teacher = teacher_logprobs(model, one.inputs)
    repeated = replace(prepared, setting=setting, teacher=teacher.expand(copies, -1))
    found = fisher_diagonal(Run(model, torch.optim.SGD(model.parameters()), repeated, 0.0, seed=0))
    x, p = model[:3](one.inputs)[0].detach(), teacher[0].exp()
    expected = sum(p[y] * torch.outer(p - torch.eye(2)[y], x).square() for y in range(2))
    torch.testing.assert_close(found[2], expected, rtol=0.1, atol=1e-6)


def test_a_gem_removes_what_works_against_the_anchors():
    task, anchors = [torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([-1.0]), torch.tensor([-1.0])]
    close(a_gem(task, anchors), [torch.tensor([-0.5]), torch.tensor([0.5])])  # 3 / 2 of (1, 1) less
    close(a_gem(task, [-a for a in anchors]), task)


@pytest.mark.parametrize("name", ["a_gem", "pcgrad", "upgrad"])
def test_surgery_steps_on_what_is_merged(run, name):
    """No step of these lets the loss on the anchors grow, to first order; the plain step does."""
    of = run(0.0)
    task, anchors = both(of)
    assert sum(float((t * a).sum()) for t, a in zip(task, anchors, strict=True)) < -1e-3
    found = step_of(name, of)
    assert sum(float((f * a).sum()) for f, a in zip(found, anchors, strict=True)) >= -1e-6
    assert sum(float((f * t).sum()) for f, t in zip(found, task, strict=True)) > 0.0


def test_wise_ft_goes_part_of_the_way(run):
    of = run(0.25)
    ends = of.snapshot()
    METHODS["wise_ft"].finish(of)
    start = [of.prepared.weights[name] for name, _ in of.model.named_parameters()]
    close(of.snapshot(), [0.75 * s + 0.25 * e for s, e in zip(start, ends, strict=True)])


def test_what_a_method_finishes_with_is_done(prepared, tmp_path):
    assert fine_tune(Job("tiny", "wise_ft", 0.0, 0), tmp_path)["drift_anchors"] == pytest.approx(0.0, abs=1e-9)


def test_craft_ends_at_its_epsilon(prepared, tmp_path, monkeypatch):
    """By its public interface, with its defaults; half of plain's drift and a tenth."""
    free = fine_tune(Job("tiny", "plain", 0.0, 0), tmp_path)
    for epsilon in (free["drift_anchors"] * share for share in (0.5, 0.1)):
        drift = fine_tune(Job("tiny", "craft", epsilon, 0), tmp_path)["drift_anchors"]
        assert 0.6 * epsilon < drift < 1.5 * epsilon


def test_runs_are_deterministic_and_see_scale_and_rate(prepared, tmp_path):
    job = Job("tiny", "fixed", 1.0, 0)
    found = fine_tune(job, tmp_path)
    assert fine_tune(job, tmp_path) == found
    assert fine_tune(Job("tiny", "fixed", 1.0, 0, scale=10.0), tmp_path)["drift_anchors"] > found["drift_anchors"]
    assert fine_tune(Job("tiny", "fixed", 1.0, 0, lr=0.1), tmp_path)["drift_anchors"] < found["drift_anchors"]


def test_what_is_prepared_is_read_again(prepared, tmp_path):
    prepare.cache_clear()
    again = prepare("tiny", 0, tmp_path)
    assert again is not prepared
    assert all(torch.equal(again.weights[name], w) for name, w in prepared.weights.items())
    assert prepared.old > 0.9 > prepared.new


def test_all_methods_are_swept_over_as_many_strengths_and_meet_in_the_middle():
    for count in (5, 9):
        grids = {name: method.grid(count) for name, method in METHODS.items()}
        assert {name: len(grid) for name, grid in grids.items()} == {
            name: count if method.unit else 1 for name, method in METHODS.items()
        }
        assert grids["craft"][count // 2] == Constraint(lambda: torch.zeros(())).epsilon
        assert grids["fixed"][count // 2] == 1.0
        assert grids["craft"][-1] / grids["craft"][0] == pytest.approx(grids["fixed"][-1] / grids["fixed"][0])


def test_orders_are_whole_batches_of_each_epoch():
    rows = orders(5, 2, seed=0)
    epochs = [torch.cat([next(rows), next(rows)]).tolist() for _ in range(3)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match=r"`size` must be in \[1, 5\].*size=6"):
        next(orders(5, 6, seed=0))


def test_scores_and_chance():
    targets = torch.tensor([0, 0, 0, 1])
    examples = Examples(torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]), targets)
    assert score(torch.nn.Identity(), examples, "accuracy") == 0.75
    assert chance(examples, "accuracy") == 0.75
    log = torch.tensor([0.75, 0.25]).log()
    assert chance(examples, "cross_entropy") == pytest.approx(float(0.75 * log[0] + 0.25 * log[1]))
    constant = Examples(log.expand(4, 2), targets)
    assert score(torch.nn.Identity(), constant, "cross_entropy") == pytest.approx(chance(examples, "cross_entropy"))


def test_divergence_is_a_mean_over_positions():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    by_hand = float((p * (p / q).log()).sum())
    teacher = p.log().expand(2, 3, 2)
    logits = torch.stack([q.log().expand(3, 2), p.log().expand(3, 2)])
    assert float(divergence(logits, teacher)) == pytest.approx(by_hand / 2)
