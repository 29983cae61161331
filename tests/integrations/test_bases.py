"""Base optimizers beyond torch's defaults, in lockstep with a bare twin that steps on gradients merged by hand."""

import copy
import importlib
import math

import pytest
import torch
from bases import OPTIMIZERS, in_train_mode, make, ways
from runs import advance, assert_same, evaluation, loss_of, network

from craft_optim import CraftOptimizer, calibrate, functional
from craft_optim._tensors import copies_of
from craft_optim.anchors import LogitRetention

pytestmark = pytest.mark.usefixtures("without_a_compiler")


WHOLE = {
    "trust_region": None,
    "retention_every": 1,
}  # what the base makes of a gradient is compared, not what is kept of it


def merged_by_hand(optimizer, retention, twin):
    """Puts g_t + w g_r into `.grad`; of the wrapped twin only lambda is taken, and whether it projected."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def then():
        task = [p.grad for p in parameters]
        r = torch.autograd.grad(retention(), parameters)
        weight = twin.metrics["lambda"]
        if twin.metrics["projected"]:
            gram = functional.gram(task, list(r))
            weight -= gram.tr / gram.rr
        for p, t, g in zip(parameters, task, r, strict=True):
            p.grad = g * weight + t

    return then


# One evaluation per step: the others are in tests/test_every_torch_optimizer.py
CASES = [(name, way) for name in OPTIMIZERS for way in ways(name) if name not in ("LBFGS", "SAM")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_it_steps_on_the_merged_gradient_bit_for_bit(cache, name, way):
    build = make(name)
    by_hand, model = network(), network()
    base = in_train_mode(build(by_hand.parameters()))
    retention = LogitRetention(by_hand, cache, 16)
    craft = in_train_mode(
        CraftOptimizer(build(model.parameters()), LogitRetention(model, cache, 16), epsilon=3e-4, **WHOLE)
    )
    projected = []
    for step in range(12):
        advance(craft, evaluation(model, craft, step), way)
        advance(base, evaluation(by_hand, base, step, merged_by_hand(base, retention, craft)), way)
        assert_same(dict(by_hand.state_dict()), dict(model.state_dict()), f"step {step}")
        projected.append(craft.metrics["projected"])
    assert set(projected) == {0.0, 1.0}
    assert craft.metrics["lambda"] > 0.0


@pytest.mark.parametrize(("name", "way"), CASES)
def test_without_a_closure_it_is_the_base_and_follows_its_scheduler(name, way):
    build = make(name)
    results = []
    for wrap in (lambda base: base, CraftOptimizer):
        model = network()
        optimizer = in_train_mode(wrap(build(model.parameters())))
        scheduler = None
        if optimizer.param_groups[0]["lr"] is not None:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        rates = []
        for step in range(6):
            advance(optimizer, evaluation(model, optimizer, step), way)
            if scheduler is not None:
                scheduler.step()
                rates.append(float(optimizer.param_groups[0]["lr"]))
        results.append((dict(model.state_dict()), rates))
    assert_same(*results)
    assert not rates or rates[-1] == pytest.approx(rates[0] / 8)


@pytest.mark.parametrize(
    ("name", "entry", "kind"),
    [
        ("torchao.AdamW8bit", "exp_avg", "OptimState8bit"),
        ("torchao.AdamW4bit", "exp_avg", "OptimState4bit"),
        ("torchao.AdamWFp8", "exp_avg", "OptimStateFp8"),
        ("bitsandbytes.AdamW8bit", "state1", "torch.uint8"),
        ("bitsandbytes.Lion8bit", "state1", "torch.uint8"),
    ],
)
def test_the_states_above_are_as_narrow_as_they_claim(name, entry, kind):
    model = network()
    craft = CraftOptimizer(make(name)(model.parameters()))
    advance(craft, evaluation(model, craft, 0), "loop")
    value = craft.state[model[3].weight][entry]
    assert kind in (type(value).__name__, str(value.dtype))


@pytest.mark.parametrize("name", ["torchao.AdamW8bit", "torchao.AdamW4bit", "torchao.AdamWFp8"])
def test_a_quantised_state_that_has_stepped_can_be_calibrated(cache, name):
    model = network()
    base = make(name)(model.parameters())
    for step in range(3):
        advance(base, evaluation(model, base, step), "loop")
    retention = LogitRetention(model, cache, 16, strict=False, tolerance=math.inf)
    before = copy.deepcopy(dict(model.state_dict())), copies_of(base.state[model[3].weight].values())
    batches = iter(range(3, 100))
    found = calibrate(
        model, retention, train_step=lambda: advance(base, evaluation(model, base, next(batches)), "loop"), steps=(1, 5)
    )
    assert found.plain[1].drift != found.plain[0].drift
    assert_same(before, (dict(model.state_dict()), copies_of(base.state[model[3].weight].values())))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_eval_and_train_between_the_steps_of_a_schedule_free_base(cache, name):
    build = make(name)
    by_hand, model = network(), network()
    base = in_train_mode(build(by_hand.parameters()))
    retention, closure = LogitRetention(by_hand, cache, 16), LogitRetention(model, cache, 16)
    craft = in_train_mode(CraftOptimizer(build(model.parameters()), closure, epsilon=1e-3, **WHOLE))
    for step in range(10):
        advance(craft, evaluation(model, craft, step), "loop")
        advance(base, evaluation(by_hand, base, step, merged_by_hand(base, retention, craft)), "loop")
        if step in (5, 7):  # RAdam's first steps are its warm-up, in which it averages nothing
            stepped = model[3].weight.detach().clone()
            craft.eval()
            base.eval()
            assert not torch.equal(model[3].weight, stepped)
            assert_same(dict(by_hand.state_dict()), dict(model.state_dict()), f"the average, step {step}")
            groups = craft.state_dict()["param_groups"]
            with pytest.raises(Exception, match="not in train mode"):
                craft.step()
            assert craft.state_dict()["param_groups"] == groups
            assert craft.param_groups[0]["craft_anchor_position"] == step + 1
            craft.train()
            base.train()
        assert_same(dict(by_hand.state_dict()), dict(model.state_dict()), f"step {step}")


@pytest.mark.parametrize("on", ["base", "wrapper"])
def test_the_schedule_that_reads_adafactors_own_rates(cache, on):
    build = make("transformers.Adafactor, lr=None")
    schedule = importlib.import_module("transformers.optimization").AdafactorSchedule
    model = network()
    base = build(model.parameters())
    craft = CraftOptimizer(base, LogitRetention(model, cache, 16))
    scheduler = schedule(base if on == "base" else craft)
    for step in range(3):
        advance(craft, evaluation(model, craft, step), "loop")
        scheduler.step()
    assert scheduler.get_lr() == [base._get_lr(base.param_groups[0], base.state[model[0].weight])]
    assert craft.param_groups[0]["craft_step"] == 3.0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_for_the_matrices_and_adamw_for_the_rest_are_two_wrappers(cache):
    """Each has its own closure and lambda, and merges on its own parameters; anchors are the same in both."""
    epsilon, steps = 0.02, 60

    def bases(model):
        matrices = [model[3].weight]
        rest = [p for p in model.parameters() if p is not matrices[0]]
        return torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=3e-3)

    def backward(model, optimizers, step):
        torch.manual_seed(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()

    model, by_hand, free = network(), network(), network()
    crafts = [CraftOptimizer(b, LogitRetention(model, cache, 16), epsilon=epsilon, **WHOLE) for b in bases(model)]
    twins = [(b, LogitRetention(by_hand, cache, 16)) for b in bases(by_hand)]
    unconstrained = bases(free)
    for step in range(steps):
        backward(model, crafts, step)
        backward(by_hand, [b for b, _ in twins], step)
        backward(free, unconstrained, step)
        for craft, (base, retention), other in zip(crafts, twins, unconstrained, strict=True):
            craft.step()
            merged_by_hand(base, retention, craft)()
            base.step()
            other.step()
        assert_same(dict(by_hand.state_dict()), dict(model.state_dict()), f"step {step}")
    assert crafts[0].metrics["lambda"] != crafts[1].metrics["lambda"]
    assert [craft.param_groups[0]["craft_anchor_position"] for craft in crafts] == [steps, steps]
    drift = [LogitRetention(m, cache, 16, strict=False).drift() for m in (model, free)]
    assert drift[0] < 2 * epsilon
    assert drift[1] > 10 * epsilon
