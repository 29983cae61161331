"""One step of CraftOptimizer: identities, exact solutions, what it leaves behind, what it refuses."""

import copy
import dataclasses
import functools
import json
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, Retention, Rules, schedules
from craft_optim.dual import DualAscent, make_controller
from craft_optim.metrics import METRICS, JSONLWriter


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Drift(Retention):
    """Mean squared drift of the outputs on seeded inputs."""

    def __init__(self, model, batch=16):
        self.model, self.teacher, self.batch = model, copy.deepcopy(model), batch

    def inputs(self, number):
        g = torch.Generator().manual_seed(number)
        return torch.randn(self.batch, 4, generator=g)

    def loss(self, number):
        x = self.inputs(number)
        with torch.no_grad():
            target = self.teacher(x)
        return (self.model(x) - target).square().mean()


def drawn(optimizer):
    """Number of anchor batches that the optimizer has used."""
    return optimizer.param_groups[0]["craft_anchor_position"]


def task_loss(model, step):
    g = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, 4, generator=g)
    return nn.functional.cross_entropy(model(x), x[:, :3].argmin(1))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        task_loss(model, step).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


BASES = {
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", [*BASES, "Muon"])
def test_every_base_steps_on_the_merged_gradient(name):
    # Against the same base fed by hand with g_t + lambda g_r.
    if name == "Muon":
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this torch has no Muon")
        build, make = torch.optim.Muon, lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False))
    else:
        build, make = BASES[name], network
    torch.manual_seed(0)
    by_hand = make()
    wrapped = copy.deepcopy(by_hand)
    drift, drift_by_hand = Drift(wrapped), Drift(by_hand)
    base = build(by_hand.parameters())
    craft = CraftOptimizer(
        build(wrapped.parameters()),
        drift,
        dual=DualAscent(0.5, 0.0),
        rho=math.inf,
        projection="never",
        retention_every=1,
        trust_region=None,
    )
    for step in range(6):
        base.zero_grad()
        (task_loss(by_hand, step) + 0.5 * drift_by_hand()).backward()
        base.step()
        craft.zero_grad()
        task_loss(wrapped, step).backward()
        craft.step()
    for a, b in zip(by_hand.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_lambda_zero_always_threshold_zero_is_a_gem():
    model, by_hand = network(), network()
    drift, drift_by_hand = Drift(model), Drift(by_hand)
    with torch.no_grad():  # away from the teacher, where the retention gradient is not zero
        for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
            p.add_(0.1)
            q.add_(0.1)
    craft = CraftOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        drift,
        dual=DualAscent(0.0, 0.0),
        projection="always",
        conflict_threshold=0.0,
        retention_every=1,
        trust_region=None,
    )
    projections = 0
    for step in range(30):
        craft.zero_grad()
        task_loss(model, step).backward()
        craft.step()
        projections += int(craft.metrics["projected"])

        t = torch.autograd.grad(task_loss(by_hand, step), list(by_hand.parameters()))
        r = torch.autograd.grad(drift_by_hand(), list(by_hand.parameters()))
        t, r = (torch.cat([g.reshape(-1) for g in gs]) for gs in (t, r))
        g = t - (t @ r) / (r @ r) * r if t @ r < 0 else t
        with torch.no_grad():
            vector = nn.utils.parameters_to_vector(by_hand.parameters())
            nn.utils.vector_to_parameters(vector - 0.1 * g, by_hand.parameters())
    assert projections > 3
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# min |x - c|^2 / 2 subject to |x|^2 / 2 <= epsilon: x* = c sqrt(2 epsilon) / |c|, lambda* = |c| / sqrt(2 epsilon) - 1.
CENTRE = torch.tensor([3.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("dual", "gain", "settings", "steps"),
    [
        ("pi", None, {}, 2000),
        ("ascent", 0.5, {"rho": math.inf, "projection": "never"}, 500),
        ("nupi", 0.5, {"rho": math.inf, "projection": "never"}, 500),
        ("augmented_lagrangian", 0.5, {"rho": math.inf, "projection": "never"}, 500),
    ],
)
def test_a_quadratic_is_solved_to_its_known_solution(dual, gain, settings, steps):
    epsilon = 0.5
    x = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    optimizer = CraftOptimizer(
        torch.optim.SGD([x], lr=0.01),
        lambda: 0.5 * x.square().sum(),
        epsilon=epsilon,
        dual=make_controller(dual, gain=gain),
        retention_every=1,
        **settings,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (x - CENTRE).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(x.detach(), CENTRE / 5.0, rtol=0.02, atol=0.0)
    assert optimizer.metrics["violation"] == pytest.approx(1.0, abs=0.04)
    if dual != "pi":  # with projection a part of the force against the constraint is not lambda's
        assert optimizer.metrics["lambda"] == pytest.approx(4.0, rel=0.02)


def test_pi_finds_the_multiplier_where_nothing_is_projected():
    x = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    optimizer = CraftOptimizer(
        torch.optim.SGD([x], lr=0.02),
        lambda: 0.5 * x.square().sum(),
        epsilon=0.5,
        projection="never",
        rho=math.inf,
        retention_every=1,
    )
    for _ in range(500):
        optimizer.zero_grad()
        (0.5 * (x - CENTRE).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(x.detach(), CENTRE / 5.0, rtol=1e-6, atol=0.0)
    assert optimizer.metrics["lambda"] == pytest.approx(4.0, rel=1e-6)


def test_an_inactive_constraint_costs_the_task_nothing():
    # The unconstrained optimum has |x|^2 / 2 = 12.5: with epsilon = 20 it must be reached, conflict or not.
    x = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
    optimizer = CraftOptimizer(torch.optim.SGD([x], lr=0.05), lambda: 0.5 * x.square().sum(), epsilon=20.0)
    for _ in range(500):
        optimizer.zero_grad()
        (0.5 * (x - CENTRE).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(x.detach(), CENTRE, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_epsilon_keeps_its_meaning_whatever_the_scale_of_the_task_loss(scale):
    model = network()
    optimizer = CraftOptimizer(torch.optim.Adam(model.parameters(), lr=3e-3), Drift(model, 128), epsilon=0.05)
    violations = []
    for step in range(500):
        optimizer.zero_grad()
        (task_loss(model, step) * scale).backward()
        optimizer.step()
        violations.append(optimizer.metrics["violation"])
    assert 0.85 < sum(violations[-100:]) / 100 < 1.15


def test_the_user_finds_the_task_gradients_after_the_step():
    model = network()
    frozen = torch.nn.Parameter(torch.ones(2))
    craft = CraftOptimizer(torch.optim.Adam([*model.parameters(), frozen]), Drift(model))
    task_loss(model, 0).backward()
    pointers = [p.grad for p in model.parameters()]
    values = [g.clone() for g in pointers]
    craft.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), pointers, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(pointers, values, strict=True))
    assert frozen.grad is None
    assert torch.equal(frozen, torch.ones(2))


def test_a_parameter_with_a_task_gradient_of_zeros_is_moved_by_retention():
    model, extra = network(), nn.Parameter(torch.ones(3))
    drift = Drift(model)
    craft = CraftOptimizer(
        torch.optim.SGD([*model.parameters(), extra], lr=0.1), lambda: drift() + extra.square().sum()
    )
    task_loss(model, 0).backward()
    extra.grad = torch.zeros(3)
    craft.step()
    assert torch.equal(extra.grad, torch.zeros(3))
    assert (extra < 1.0).all()


@pytest.mark.parametrize("kind", ["it names them", "it names some", "its graph shows them", "a plain function"])
def test_gradients_of_parameters_that_others_own_are_protected(kind):
    model, head = network(), nn.Linear(3, 3)

    class Both(Drift):
        def loss(self, number):
            return super().loss(number) + head(self.model(self.inputs(number))).square().mean()

        def parameters(self):
            named = {"it names them": [*self.model.parameters(), *head.parameters()], "it names some": [head.bias]}
            return named.get(kind, [])

    both = Both(model)
    closure = (lambda: both.loss(0)) if kind == "a plain function" else both
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), closure)
    head(torch.ones(1, 3)).sum().backward()
    kept = [p.grad.clone() for p in head.parameters()]
    task_loss(model, 0).backward()
    craft.step()
    assert all(torch.equal(p.grad, k) for p, k in zip(head.parameters(), kept, strict=True))


class Holder:
    def __init__(self, head):
        self.head = head

    def run(self, h):
        return self.head(h)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, scale=1.0):
        return scale * self.inner(x)


@pytest.mark.parametrize("how", ["module", "method", "partial", "lambda", "default", "list", "object", "nested"])
def test_what_a_reentrant_checkpoint_hides_is_protected_too(how):
    """Its function is run in the backward, on parameters that the graph does not show."""
    model, head = network(), Twice()
    functions = {
        "module": head,
        "method": head.forward,
        "partial": functools.partial(head.forward, scale=2.0),
        "lambda": lambda h: head(h),
        "default": lambda h, of=head.inner: of(h),
        "list": lambda h, of=[head.inner]: of[0](h),
        "object": Holder(head).run,
        "nested": lambda h: torch.utils.checkpoint.checkpoint(lambda g: head(g), h, use_reentrant=True),
    }

    def drift():
        return torch.utils.checkpoint.checkpoint(functions[how], model(torch.ones(2, 4)), use_reentrant=True).sum()

    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), drift)
    head(torch.ones(1, 3)).sum().backward()
    kept = [p.grad.clone() for p in head.parameters()]
    task_loss(model, 0).backward()
    craft.step()
    assert craft.metrics["retention_grad_norm"] > 0.0
    assert all(torch.equal(p.grad, k) for p, k in zip(head.parameters(), kept, strict=True))


def test_retention_runs_on_every_kth_step_and_metrics_say_so():
    model = network()
    drift = Drift(model)
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), drift, retention_every=3)
    fresh, calls = [], []
    for step in range(7):
        train(model, craft, 1, step)
        fresh.append(craft.metrics["fresh"])
        calls.append(drawn(craft))
    assert fresh == [1, 0, 0, 1, 0, 0, 1]
    assert calls == [1, 1, 1, 2, 2, 2, 3]
    assert craft.metrics["retention_step"] == 6.0
    assert craft.metrics["interval"] == 3.0
    assert craft.param_groups[0]["craft_step"] == 7.0


def test_steps_between_retention_are_the_bases_alone():
    results = []
    for wrap in (lambda o, m: o, lambda o, m: CraftOptimizer(o, Drift(m), retention_every=10)):
        model = network()
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
        if isinstance(optimizer, CraftOptimizer):
            for group in optimizer.param_groups:
                group["craft_step"] = 1.0
        results.append(train(model, optimizer, 9))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_metrics_are_the_documented_floats(tmp_path):
    model = network()
    craft = CraftOptimizer(
        torch.optim.Adam(model.parameters()), Drift(model), on_metrics=JSONLWriter(tmp_path / "m.jsonl")
    )
    assert craft.metrics == {}
    train(model, craft, 3)
    assert set(craft.metrics) == set(METRICS) - {"heldout", "epsilon_heldout"}, "which are of held-out anchors"
    assert all(type(v) is float for v in craft.metrics.values())
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["retention_step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["lambda"] == craft.metrics["lambda"] == craft.param_groups[0]["craft_lambda"]


def test_jsonl_stays_json_when_a_value_is_not_finite(tmp_path):
    writer = JSONLWriter(tmp_path / "m.jsonl")
    writer({"violation": math.inf, "epsilon": 0.0})
    writer.close()
    row = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"violation": None, "epsilon": 0.0, "time": row["time"]}


def test_accumulation_needs_nothing():
    # Four micro-batches before one step are one batch; an earlier implementation kept only the last of them.
    results = []
    for parts in (1, 4):
        model = network()
        craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model))
        for step in range(5):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            for part in x.chunk(parts):
                (nn.functional.cross_entropy(model(part), part[:, :3].argmin(1)) / parts).backward()
            craft.step()
            craft.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_one_copy_of_the_gradients_is_added():
    # Task gradients are stashed by pointer and the merge writes into the retention buffers.
    model = network()
    allocated = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            allocated.append({p.grad.data_ptr() for p in model.parameters()})
            return super().step(closure)

    drift = Drift(model)
    buffers = []

    class Watching(Drift):
        def loss(self, number):
            loss = drift.loss(number)
            for p in model.parameters():
                assert p.grad is None, "task gradients are set aside while the retention pass runs"
            return loss

    craft = CraftOptimizer(Spy(model.parameters(), lr=0.1), Watching(model), dual="ascent", trust_region=None)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: buffers.append(p.grad.data_ptr()))
    task_loss(model, 0).backward()
    task = {p.grad.data_ptr() for p in model.parameters()}
    buffers.clear()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)  # away from the teacher, so that there is something to merge
    craft.step()
    assert allocated == [set(buffers)]
    assert not set(buffers) & task


def test_max_grad_norm_caps_what_the_base_steps_on():
    model = network()
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.linalg.vector_norm(torch.cat([p.grad.reshape(-1) for p in model.parameters()])).item())
            return super().step(closure)

    craft = CraftOptimizer(Spy(model.parameters(), lr=0.1), Drift(model), max_grad_norm=0.05)
    train(model, craft, 5)
    assert seen == pytest.approx([0.05] * 5, rel=1e-4)
    assert craft.metrics["clipped"] == 1.0
    assert craft.metrics["merged_grad_norm"] == 0.05


def test_a_line_search_sees_the_same_anchors_and_multiplier():
    model = network()
    positions = []

    class Spy(Drift):
        def loss(self, number):
            positions.append(number)
            return Drift.loss(self, number)

    craft = CraftOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=6), Spy(model))

    def closure():
        craft.zero_grad()
        loss = task_loss(model, 0)
        loss.backward()
        return loss

    for _ in range(2):
        craft.step(closure)
    assert len(positions) > 4
    assert set(positions) == {0, 1}
    assert sorted(positions) == positions
    assert drawn(craft) == 2
    assert craft.param_groups[0]["craft_step"] == 2.0


def test_published_preset_is_the_published_method():
    model = network()
    craft = CraftOptimizer.published(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model), total_steps=100)
    assert [craft.constraints[None].schedule(t) for t in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])
    assert craft.rules == Rules(math.inf, "always", -0.1, retention_every=5, trust_region=None)
    train(model, craft, 6)
    # lambda_0 = 1 was used at step 0, then 1 + eta (L(0) - epsilon(0)) with L(0) = 0.
    assert craft.metrics["lambda"] == pytest.approx(1.0 - 0.01)
    assert craft.metrics["capped"] == 0.0
    other = CraftOptimizer.published(craft.base_optimizer, Drift(model), total_steps=9, merge="equal")
    assert other.rules.merge == "equal"


def test_schedules_are_followed():
    model = network()
    craft = CraftOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), Drift(model), epsilon=schedules.Linear(1.0, 0.5, 4)
    )
    found = []
    for step in range(6):
        train(model, craft, 1, step)
        found.append(craft.metrics["epsilon"])
    assert found == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5])


# -- state -----------------------------------------------------------------------------------------------------------


def test_state_is_finite_floats_in_every_group():
    model = network()
    craft = CraftOptimizer(
        torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]),
        Drift(model),
    )
    for moment in ("new", "used", "grown"):
        if moment == "used":
            train(model, craft, 3)
        if moment == "grown":
            craft.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        states = [{k: v for k, v in g.items() if k.startswith("craft_")} for g in craft.param_groups]
        assert {"craft_step", "craft_lambda", "craft_anchor_position", "craft_dual_integral"} <= set(states[0])
        assert all(s == states[0] for s in states)
        assert all(type(v) is float and math.isfinite(v) for v in states[0].values())


@pytest.mark.parametrize("dual", ["pi", "ascent", "nupi", "augmented_lagrangian"])
def test_state_dict_round_trip_resumes_bit_for_bit(dual, tmp_path):
    def build():
        model = network()
        drift = Drift(model)
        return (
            model,
            drift,
            CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), drift, dual=dual, epsilon=0.01),
        )

    straight, _, optimizer = build()
    expected = train(straight, optimizer, 40)

    model, _, first = build()
    train(model, first, 20)
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)

    resumed, _, second = build()
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert drawn(second) == 20
    found = train(resumed, second, 20, start=20)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    ours = [k for k in optimizer.param_groups[0] if k.startswith("craft_")]
    assert [second.param_groups[0][k] for k in ours] == [optimizer.param_groups[0][k] for k in ours]
    assert second.metrics == optimizer.metrics


def test_a_plain_checkpoint_loads_and_one_of_ours_loads_into_the_base():
    model = network()
    base = torch.optim.Adam(model.parameters())
    train(model, base, 3)
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model))
    craft.load_state_dict(base.state_dict())
    assert craft.param_groups[0]["craft_step"] == 0.0
    train(model, craft, 2)
    base.load_state_dict(craft.state_dict())
    train(model, base, 1)


def test_restoring_the_base_before_wrapping_it_goes_on_too():
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model))
    train(model, craft, 5)
    base = torch.optim.Adam(model.parameters())
    base.load_state_dict(craft.state_dict())
    again = CraftOptimizer(base, Drift(model))
    assert again.param_groups[0]["craft_step"] == 5.0
    assert drawn(again) == 5


def test_a_base_that_was_wrapped_before_begins_anew():
    model = network()
    base = torch.optim.Adam(model.parameters())
    first = CraftOptimizer(base, Drift(model), epsilon=schedules.Linear(1.0, 0.5, 4))
    fresh = {key: x for key, x in base.param_groups[0].items() if key.startswith("craft_")}
    train(model, first, 5)
    again = CraftOptimizer(base, Drift(model), epsilon=schedules.Linear(1.0, 0.5, 4))
    assert {key: x for key, x in base.param_groups[0].items() if key.startswith("craft_")} == fresh
    train(model, again, 1)
    assert again.metrics["epsilon"] == 1.0
    assert base.state[model[0].weight]["step"] == 6, "the base's own state stays"


def test_another_controllers_state_is_replaced():
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model), dual="nupi")
    train(model, craft, 2)
    other = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model), dual="ascent")
    other.load_state_dict(craft.state_dict())
    assert {k for k in other.param_groups[0] if k.startswith("craft_dual")} == {"craft_dual_multiplier"}
    train(model, other, 1, start=2)


def test_pickle_leaves_the_closure_behind_and_says_so():
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model))
    torch.optim.lr_scheduler.ConstantLR(craft)  # patches `step` on the instance
    train(model, craft, 2)
    twin = pickle.loads(pickle.dumps(craft))
    assert twin.retention_closure is None
    assert twin.param_groups[0]["craft_step"] == 2.0
    with pytest.warns(UserWarning, match="retention closure"):
        twin.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.step()


def test_a_copy_with_its_model_goes_on_as_the_original():
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model))
    train(model, craft, 2)
    copied, twin = copy.deepcopy((model, craft))
    assert twin.retention_closure.model is copied
    assert twin.base_optimizer is not craft.base_optimizer
    assert twin.state_dict()["param_groups"] == craft.state_dict()["param_groups"]
    found = train(copied, twin, 3, start=2)
    assert all(map(torch.equal, train(model, craft, 3, start=2), found))
    assert twin.metrics == craft.metrics


def test_a_copy_shares_a_plain_function_which_runs_the_original():
    model = network()
    drift = Drift(model)
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), lambda: drift.loss(0))
    train(model, craft, 2)
    copied, twin = copy.deepcopy((model, craft))
    assert twin.retention_closure is craft.retention_closure
    kept = [p.grad for p in model.parameters()]
    task_loss(copied, 2).backward()
    with pytest.raises(RuntimeError, match="reaches none"):
        twin.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True)), "the original's gradients"


@pytest.mark.parametrize("way", ["unpickled", "loaded before there is a closure"])
def test_a_closure_that_is_set_later_goes_on_where_the_state_is(way):
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model))
    train(model, craft, 3)
    copied = copy.deepcopy(model)
    if way == "unpickled":
        copied, later = pickle.loads(pickle.dumps((model, craft)))
    else:
        later = CraftOptimizer(torch.optim.Adam(copied.parameters()))
        later.load_state_dict(copy.deepcopy(craft.state_dict()))
    drift = Drift(copied)
    drift.teacher = craft.retention_closure.teacher
    later.retention_closure = drift
    expected = train(model, craft, 3, start=3)
    assert all(map(torch.equal, train(copied, later, 3, start=3), expected))
    assert drawn(later) == 6


def test_another_closure_begins_with_its_first_anchors():
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model))
    train(model, craft, 3)
    craft.retention_closure = craft.retention_closure
    assert drawn(craft) == 3
    craft.retention_closure = Drift(model)
    assert drawn(craft) == 0


def test_two_optimizers_on_one_closure_have_their_own_places():
    model = network()
    drift = Drift(model)
    crafts = [CraftOptimizer(torch.optim.SGD(part.parameters(), lr=0.1), drift) for part in (model[0], model[2])]
    for step in range(4):
        model.zero_grad()
        task_loss(model, step).backward()
        crafts[0].step()
        if step % 2:
            crafts[1].step()
    assert [drawn(craft) for craft in crafts] == [4, 2]
    states = [craft.state_dict() for craft in crafts]
    for craft, state in reversed([*zip(crafts, states, strict=True)]):
        craft.load_state_dict(state)
    assert [drawn(craft) for craft in crafts] == [4, 2]
    assert drift.position == 0, "calls without a number are counted apart"


def test_a_base_that_loads_a_plain_state_begins_anew():
    model = network()
    base = torch.optim.Adam(model.parameters())
    plain = base.state_dict()
    craft = CraftOptimizer(base, Drift(model))
    train(model, craft, 3)
    base.load_state_dict(plain)
    train(model, craft, 1)
    assert craft.param_groups[0]["craft_step"] == drawn(craft) == 1


def test_rules_are_set_as_a_whole():
    model = network()
    craft = CraftOptimizer(torch.optim.Adam(model.parameters()), Drift(model), retention_every=2)
    with pytest.raises(AttributeError):
        craft.rules.retention_every = 3
    craft.rules = dataclasses.replace(craft.rules, retention_every=3)
    train(model, craft, 4)
    assert drawn(craft) == 2, "on steps 0 and 3"
    with pytest.raises(TypeError, match="Found dict"):
        craft.rules = {"retention_every": 3}


def test_attributes_of_a_users_own_object_are_not_touched():
    model = network()

    class Robot:
        position, unit, tolerance = 2.7, 3, "some"

        def __call__(self):
            return model(torch.ones(1, 4)).square().mean()

        def parameters(self):
            raise AssertionError("not ours to call")

        shard = state_dict = loss = parameters

    robot = Robot()
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), robot)
    train(model, craft, 2)
    assert robot.position == 2.7
    assert craft.retention_closure is robot


def test_bind_gives_a_class_that_builds_and_wraps():
    model = network()
    drift = Drift(model)
    bound = CraftOptimizer.bind(torch.optim.AdamW, drift, epsilon=0.2)
    assert issubclass(bound, CraftOptimizer)
    craft = bound(model.parameters(), lr=0.3)
    assert type(craft.base_optimizer) is torch.optim.AdamW
    assert craft.param_groups[0]["lr"] == 0.3
    assert craft.constraints[None].schedule(0) == 0.2
    train(model, craft, 1)
    assert type(pickle.loads(pickle.dumps(craft))) is CraftOptimizer


def test_groups_and_state_are_the_bases_own():
    model = network()
    base = torch.optim.Adam(model.parameters())
    craft = CraftOptimizer(base, Drift(model))
    assert craft.param_groups is base.param_groups
    assert craft.state is base.state
    train(model, craft, 1)
    craft.load_state_dict(craft.state_dict())
    assert craft.param_groups is base.param_groups
    craft.param_groups = [*base.param_groups]
    assert craft.param_groups is base.param_groups
    assert craft.defaults is base.defaults


@pytest.mark.parametrize("on", ["base", "wrapper"])
def test_schedulers_on_either(on):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    craft = CraftOptimizer(base, Drift(model))
    scheduler = torch.optim.lr_scheduler.StepLR(base if on == "base" else craft, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, craft, 1)
        scheduler.step()
    assert craft.param_groups[0]["lr"] == base.param_groups[0]["lr"] == 0.5


def test_hooks_fire_once_and_in_torchs_order():
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    model = network()
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model))
    order = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: order.append(("global-pre", type(o)))),
        register_optimizer_step_post_hook(lambda o, a, k: order.append(("global-post", type(o)))),
        craft.register_step_pre_hook(lambda o, a, k: order.append(("pre", type(o)))),
        craft.register_step_post_hook(lambda o, a, k: order.append(("post", type(o)))),
        craft.base_optimizer.register_step_post_hook(lambda o, a, k: order.append(("base", type(o)))),
    ]
    try:
        task_loss(model, 0).backward()
        for _ in range(2):
            craft.step()
    finally:
        for handle in handles:
            handle.remove()
    once = [
        ("global-pre", CraftOptimizer),
        ("pre", CraftOptimizer),
        ("base", torch.optim.SGD),
        ("post", CraftOptimizer),
        ("global-post", CraftOptimizer),
    ]
    assert order == once * 2
    order.clear()
    craft.step()
    assert order == []


def test_state_dict_hooks_fire():
    model = network()
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model))
    seen = []
    craft.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    craft.register_state_dict_post_hook(lambda o, d: d | {"mark": 1})
    craft.register_load_state_dict_pre_hook(lambda o, d: seen.append(d.pop("mark")))
    craft.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    craft.load_state_dict(craft.state_dict())
    assert seen == ["pre", 1, "loaded"]


def test_a_fused_base_does_not_leak_its_scaler_promise():
    model = network()
    craft = CraftOptimizer(torch.optim.AdamW(model.parameters(), fused=True), Drift(model))
    assert craft.base_optimizer._step_supports_amp_scaling is True
    assert craft._step_supports_amp_scaling is False
    assert not hasattr(craft, "train")


def test_train_and_eval_reach_a_schedule_free_base():
    class ScheduleFree(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    model = network()
    craft = CraftOptimizer(ScheduleFree(model.parameters(), lr=0.1), Drift(model))
    craft.eval()
    assert craft.base_optimizer.mode == "eval"


def test_a_priming_step_moves_nothing():
    # torch.distributed.checkpoint steps with zero gradients and lr = 0 to create an optimizer's state.
    model = network()
    drift = Drift(model)
    craft = CraftOptimizer(torch.optim.AdamW(model.parameters()), drift)
    before = [p.detach().clone() for p in model.parameters()]
    groups = copy.deepcopy(craft.state_dict()["param_groups"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rates = [g["lr"] for g in craft.param_groups]
    for g in craft.param_groups:
        g["lr"] = 0.0
    craft.step(closure=None)
    for g, lr in zip(craft.param_groups, rates, strict=True):
        g["lr"] = lr
    assert craft.state_dict()["param_groups"] == groups
    assert len(craft.state) == 4
    assert drawn(craft) == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_step_without_any_gradient_runs_no_retention():
    model = network()
    drift = Drift(model)
    craft = CraftOptimizer(torch.optim.AdamW(model.parameters()), drift)
    before = [p.detach().clone() for p in model.parameters()]
    craft.step()
    assert drawn(craft) == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# -- failures --------------------------------------------------------------------------------------------------------


def unchanged(model, craft, act, error, match):
    task_loss(model, 0).backward()
    params = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    groups = copy.deepcopy(craft.state_dict()["param_groups"])
    state = len(craft.state)
    with pytest.raises(error, match=match):
        act()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), params, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert craft.state_dict()["param_groups"] == groups
    assert len(craft.state) == state


@pytest.mark.parametrize(
    ("broken", "error", "match"),
    [
        (lambda loss, d: (loss * 0).item(), TypeError, "Found float"),
        (lambda loss, d: loss.expand(3), RuntimeError, r"shape \(3,\)"),
        (lambda loss, d: loss.detach(), RuntimeError, "without a graph"),
        (lambda loss, d: d.teacher(d.inputs(0)).sum(), RuntimeError, "reaches none"),
        (lambda loss, d: loss + d.model.no_such_attribute, AttributeError, "no_such_attribute"),
    ],
)
def test_a_broken_closure_changes_nothing(broken, error, match):
    model = network()

    class Broken(Drift):
        def loss(self, number):
            return broken(super().loss(number), self)

    craft = CraftOptimizer(torch.optim.AdamW(model.parameters()), Broken(model))
    unchanged(model, craft, craft.step, error, match)


def test_an_error_in_the_base_leaves_everything_as_it_was():
    model = network()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise OSError("disk")

    drift = Drift(model)
    craft = CraftOptimizer(Failing(model.parameters(), lr=0.1), drift)
    unchanged(model, craft, craft.step, OSError, "disk")


def test_a_negative_epsilon_from_a_schedule_changes_nothing():
    model = network()
    drift = Drift(model)
    craft = CraftOptimizer(torch.optim.AdamW(model.parameters()), drift, epsilon=lambda step: -1.0)
    unchanged(model, craft, craft.step, ValueError, r"epsilon\(0\)")


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_retention_pass_is_a_counted_skip(where, value):
    model, plain = network(), network()
    drift = Drift(model)

    def closure():
        loss = drift()
        if where == "loss":
            return loss * value
        loss.register_hook(lambda g: g * value)
        return loss + loss.detach()

    base = torch.optim.AdamW(plain.parameters())
    craft = CraftOptimizer(torch.optim.AdamW(model.parameters()), closure)
    multiplier = craft.param_groups[0]["craft_dual_integral"]
    with pytest.warns(UserWarning, match="retention pass is not finite") as caught:
        found = train(model, craft, 5)
    expected = train(plain, base, 5)
    assert len(caught) == 1, "reported once, then at 10, 100, ..."
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert craft.param_groups[0]["craft_skipped"] == 5.0
    assert craft.metrics["skipped"] == 5.0
    assert craft.metrics["fresh"] == 0.0
    assert craft.param_groups[0]["craft_dual_integral"] == multiplier
    assert craft.param_groups[0]["craft_step"] == 5.0


def test_a_nonfinite_task_gradient_is_left_to_the_base():
    model = network()
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model))
    task_loss(model, 0).backward()
    next(model.parameters()).grad[0] = math.nan
    with pytest.warns(UserWarning, match="task gradient is not finite"):
        craft.step()
    assert craft.param_groups[0]["craft_skipped"] == 1.0


@pytest.mark.parametrize(("every", "patience"), [(1, 100), (3, 34), (10, 20)])
def test_a_cap_that_binds_for_long_is_reported_once(every, patience):
    model = network()
    drift = Drift(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    base = torch.optim.SGD(model.parameters(), lr=1e-6)
    craft = CraftOptimizer(base, drift, epsilon=1e-6, rho=0.1, retention_every=every)
    train(model, craft, every * (patience - 1))
    with pytest.warns(UserWarning, match=f"at its cap for {patience} retention steps") as caught:
        train(model, craft, 250)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the line that stepped"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon=-0.1"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"epsilon": "small"}, TypeError, "epsilon"),
        ({"dual": "pid"}, ValueError, "dual"),
        ({"projection": "sometimes"}, ValueError, "projection='sometimes'"),
        ({"merge": "sum"}, ValueError, "merge='sum'"),
        ({"granularity": "global"}, TypeError, "no `granularity`. Its keywords are epsilon, dual, .*, rho"),
        ({"lambda_init": 0.5}, TypeError, "no `lambda_init`.*DualAscent"),
        ({"conflict_threshold": -1.5}, ValueError, "cosine"),
        ({"retention_every": 0}, ValueError, "retention_every=0"),
        ({"retention_every": 2.5}, ValueError, "retention_every=2.5"),
        ({"retention_every": "often"}, ValueError, "'auto' or a whole number. Found retention_every='often'"),
        ({"total_steps": 0}, ValueError, "total_steps=0"),
        ({"trust_region": 1.0}, ValueError, "trust_region=1.0"),
        ({"trust_region": math.inf}, ValueError, "trust_region=inf"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"rho": -1.0}, ValueError, "rho"),
        ({"process_group": 2}, TypeError, "process_group=2"),
        ({"retention_closure": []}, ValueError, "at least one"),
        ({"retention_closure": 3}, TypeError, "retention_closure"),
        ({"base_optimizer": nn.Linear(1, 1)}, TypeError, "Found Linear"),
    ],
)
def test_bad_arguments_name_themselves(arguments, error, match):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        CraftOptimizer(**{"base_optimizer": base, "retention_closure": Drift(model)} | arguments)
    assert not any(k.startswith("craft_") for k in base.param_groups[0]), "the base was touched"


def test_a_wrapper_is_not_wrapped_again():
    craft = CraftOptimizer(torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="already"):
        CraftOptimizer(craft)


@pytest.mark.parametrize(
    ("name", "kind", "remedy"),
    [
        ("AcceleratedOptimizer", torch.optim.Optimizer, "accelerator.prepare"),
        ("LightningOptimizer", torch.optim.Optimizer, "configure_optimizers"),
        ("DeepSpeedOptimizer", object, "FSDP2"),
    ],
)
def test_optimizers_that_a_framework_has_wrapped_are_refused_with_the_remedy(name, kind, remedy):
    wrapped = type("Subclass", (type(name, (kind,), {}),), {})
    with pytest.raises(TypeError, match=f"Found Subclass.*{remedy}"):
        CraftOptimizer(wrapped.__new__(wrapped), lambda: None)


def test_flattened_copies_of_the_parameters_are_no_silent_baseline():
    """As DeepSpeed ZeRO puts them into the groups of an optimizer that it was given."""
    model = network()
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model))
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).requires_grad_()
    craft.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO"):
        craft.step()


def test_gradients_in_buffers_that_the_retention_backward_overwrites_are_noticed():
    model = network()
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}

    def into_its_buffer(p):
        p.grad = buffers[p].copy_(p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(into_its_buffer)
    craft = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Drift(model))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="memory of the task gradients"):
        train(model, craft, 1)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_parameter_in_two_groups_is_refused():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.param_groups.append(dict(base.param_groups[0], params=[model[0].weight]))
    with pytest.raises(ValueError, match=r"groups 0 and 1"):
        CraftOptimizer(base, Drift(model))


def test_one_process_does_not_import_what_several_need():
    script = "import sys, craft_optim; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
