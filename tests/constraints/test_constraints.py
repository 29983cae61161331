"""CraftOptimizer under several constraints: known solutions, identities, state, metrics, failures, what is refused."""

import copy
import json
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from craft_optim import Constraint, CraftOptimizer, Retention, Rules, schedules
from craft_optim._step.step import put_together
from craft_optim.dual import DualAscent, MultiplicativePI, make_controller
from craft_optim.metrics import METRICS, JSONLWriter

OF_HELD_OUT_ANCHORS = {"heldout", "epsilon_heldout"}
PER_CONSTRAINT = [name for name, metric in METRICS.items() if metric.per_constraint and name not in OF_HELD_OUT_ANCHORS]

# Known solutions


def solve(centre, constraints, start=(0.3, -0.2), steps=600, lr=0.05, dual="pi", retention_every=1, **settings):
    """min |x - centre|^2 / 2 subject to |x - a|^2 / 2 <= epsilon for each (a, epsilon)."""
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    centre = torch.tensor(centre, dtype=torch.float64)
    middles = {name: torch.tensor(a, dtype=torch.float64) for name, (a, _) in constraints.items()}
    optimizer = CraftOptimizer(
        torch.optim.SGD([x], lr=lr),
        {
            name: Constraint(lambda a=a: 0.5 * (x - a).square().sum(), constraints[name][1], dual)
            for name, a in middles.items()
        },
        retention_every=retention_every,
        **settings,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (x - centre).square().sum()).backward()
        optimizer.step()
    return x.detach().tolist(), optimizer.metrics


# centre, constraints, x*, lambda*: centre - x* = sum_j lambda_j (x* - a_j)
BOTH = ((2.0, 4.0), {"a": ((0.0, 0.0), 1.0), "b": ((2.0, 0.0), 1.0)}, (1.0, 1.0), (2.0, 1.0))
ONE = ((3.0, 4.0), {"a": ((0.0, 0.0), 0.5), "b": ((2.0, 0.0), 20.0)}, (0.6, 0.8), (4.0, 0.0))
# The gradients of the constraints are 134 degrees apart: lambda_j |g_j| = 1.7 |g_t| and 1.4 |g_t|
AGAINST_EACH_OTHER = ((1.2, 1.8), {"a": ((0.0, 0.0), 0.625), "b": ((4.0, 0.0), 4.625)}, (1.0, 0.5), (2.0, 0.6))
PROBLEMS = {"both": BOTH, "one": ONE, "against each other": AGAINST_EACH_OTHER}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_solution_and_multipliers(problem):
    centre, constraints, solution, multipliers = PROBLEMS[problem]
    x, metrics = solve(centre, constraints, projection="never", rho=math.inf)
    assert x == pytest.approx(solution, rel=1e-3)
    assert [metrics["lambda/a"], metrics["lambda/b"]] == pytest.approx(multipliers, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_solution_with_all_defaults(problem):
    """Whose projection does a part of what the multipliers do."""
    centre, constraints, solution, _ = PROBLEMS[problem]
    x, metrics = solve(centre, constraints, steps=2500, lr=0.002, retention_every="auto")
    assert x == pytest.approx(solution, rel=0.1)  # of up to ten steps between two passes
    assert metrics["violation"] == pytest.approx(1.0, abs=0.06)
    assert metrics["interval"] > 1.0


@pytest.mark.parametrize(
    ("dual", "rho"), [("pi", 2.8), (make_controller("augmented_lagrangian", gain=0.5), 1.2)], ids=["half", "whole"]
)
def test_the_cap_does_not_rule_out_the_solution(dual, rho):
    """Nor does the half of it that "pi" has for long, from rho = 2 on."""
    centre, constraints, solution, multipliers = AGAINST_EACH_OTHER
    x, metrics = solve(centre, constraints, start=(0.9, 0.4), projection="never", rho=rho, dual=dual)
    assert x == pytest.approx(solution, rel=1e-3)
    assert [metrics["lambda/a"], metrics["lambda/b"]] == pytest.approx(multipliers, rel=2e-3)
    assert metrics["lambda/a"] * metrics["retention_grad_norm/a"] > 1.2 * metrics["task_grad_norm"]


@pytest.mark.parametrize("dual", ["ascent", "nupi", "augmented_lagrangian"])
def test_other_controllers(dual):
    centre, constraints, solution, multipliers = BOTH
    x, metrics = solve(centre, constraints, dual=make_controller(dual, gain=0.5), rho=math.inf, projection="never")
    assert x == pytest.approx(solution, rel=0.01)
    assert [metrics["lambda/a"], metrics["lambda/b"]] == pytest.approx(multipliers, rel=0.02)


# A small network


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Drift(Retention):
    """Mean squared drift of some outputs on seeded inputs."""

    def __init__(self, model, outputs=slice(None), shift=0.0, dtype=None):
        self.model, self.teacher = model, copy.deepcopy(model)
        self.outputs, self.shift, self.dtype = outputs, shift, dtype
        self.calls = 0

    def loss(self, number):
        self.calls += 1
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number)) + self.shift
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            drift = (self.model(x) - self.teacher(x).detach())[:, self.outputs]
        return drift.float().square().mean()


def two(model, **options):
    return {"first": Drift(model, slice(0, 1), **options), "others": Drift(model, slice(1, 3), 1.0, **options)}


def held(drifts, **epsilons):
    """A constraint of each drift."""
    return {name: Constraint(drifts[name], epsilon) for name, epsilon in epsilons.items()}


def drawn(optimizer):
    """Number of anchor batches that each constraint has used, in the order of the names."""
    group = optimizer.param_groups[0]
    return [int(group[f"craft_anchor_position/{name}"]) for name in optimizer.constraints]


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 + step))
        nn.functional.cross_entropy(model(x), x[:, :3].argmin(1)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr)


SETTINGS = [
    {},
    {"merge": "equal", "projection": "always"},
    {"merge": "task_priority", "max_grad_norm": 0.1},
    {"retention_every": 3},
    {"gradient_memory": "bfloat16", "dual": "nupi"},
    {"conflict_threshold": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_mapping_of_one_is_its_closure_bit_for_bit(settings):
    runs = []
    for named in (False, True):
        model = network()
        drift = Drift(model)
        optimizer = CraftOptimizer(adamw(model), {"all": drift} if named else drift, epsilon=0.01, **settings)
        runs.append((train(model, optimizer, 25), optimizer))
    assert same(runs[0][0], runs[1][0])
    alone, named = (optimizer.metrics for _, optimizer in runs)
    assert {key: x for key, x in named.items() if "/" not in key} == alone
    assert {key: x for key, x in named.items() if "/" in key} == {f"{key}/all": alone[key] for key in PER_CONSTRAINT}
    states = [{k: v for k, v in o.param_groups[0].items() if k.startswith("craft_")} for _, o in runs]
    assert {key.removesuffix("/all"): x for key, x in states[1].items()} == states[0]


@pytest.mark.parametrize("rho", [math.inf, 0.5])
def test_two_equal_constraints_are_one(rho):
    """Their multipliers add up to its own, also below the cap."""
    runs = []
    for names in (["one"], ["one", "two"]):
        model = network().double()
        drifts = {name: Drift(model, shift=torch.ones(4, dtype=torch.float64)) for name in names}
        optimizer = CraftOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.3), drifts, epsilon=0.01, rho=rho,
            dual=DualAscent(1.0 / len(names), 0.0, 10.0), retention_every=1, trust_region=None,
        )  # fmt: skip
        found = []
        for step in range(20):
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
            nn.functional.cross_entropy(model(x), x[:, :3].argmin(1)).backward()
            optimizer.step()
            m = optimizer.metrics
            found.append(
                [sum(m[f"lambda/{name}"] for name in names), m["merged_grad_norm"], m["projected"], m["capped"]]
            )
        runs.append((found, [p.detach().clone() for p in model.parameters()]))
    for one, both in zip(runs[0][0], runs[1][0], strict=True):
        assert one == pytest.approx(both, rel=1e-6)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert any(row[2] for row in runs[0][0]), "the projection is compared, too"
    assert any(row[3] for row in runs[0][0]) == (rho == 0.5)


def test_both_are_held():
    """Each at its own epsilon, where they differ fivefold; and one alone lets the other go."""
    finals = {}
    for kept in (["first"], ["first", "others"]):
        model = network()
        drifts = two(model)
        optimizer = CraftOptimizer(
            adamw(model, 3e-3), held(drifts, **{name: {"first": 0.1, "others": 0.02}[name] for name in kept})
        )
        train(model, optimizer, 200)
        seen = []
        for step in range(200, 250):
            train(model, optimizer, 1, step)
            seen.append([drift.loss(10_000 + step).item() for drift in drifts.values()])
        finals[len(kept)] = torch.tensor(seen).mean(0).tolist()
    assert finals[2] == pytest.approx([0.1, 0.02], rel=0.5)
    assert finals[1][1] > 10 * finals[2][1]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_memory": "bfloat16"},
        {"merge": "equal", "projection": "always", "conflict_threshold": -0.1},
        {"merge": "task_priority", "gradient_memory": "host", "projection": "never"},
    ],
    ids=str,
)
def test_settings_leave_gradients_and_finish(settings):
    model = network()
    optimizer = CraftOptimizer(adamw(model), two(model), epsilon=0.001, max_grad_norm=0.05, **settings)
    train(model, optimizer, 5)
    task = [p.grad for p in model.parameters()]
    values = [g.clone() for g in task]
    optimizer.step()
    rounded = settings.get("gradient_memory") == "bfloat16"
    for p, g, v in zip(model.parameters(), task, values, strict=True):
        assert rounded or p.grad is g
        torch.testing.assert_close(p.grad, v, rtol=2**-8 if rounded else 0.0, atol=0.0)
    assert optimizer.metrics["merged_grad_norm"] == 0.05
    assert optimizer.metrics["clipped"] == 1.0


def test_as_many_copies_as_constraints_and_one_in_the_bases_step():
    model = network()
    alive, passes = [], []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            alive.append(sum(one() is not None for one in made))
            return super().step(closure)

    def watched(drift):
        def run():
            passes.append(sum(one() is not None for one in made))
            return drift.loss(0)

        return run

    made = []
    drifts = {str(j): watched(Drift(model, slice(j, j + 1))) for j in range(3)}
    optimizer = CraftOptimizer(Spy(model.parameters(), lr=0.1), drifts)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)  # away from the teacher, so that there is something to merge
    train(model, optimizer, 1)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: made.append(weakref.ref(p.grad)))
    alive.clear(), passes.clear()
    optimizer.step()
    assert passes == [0, 4, 8], "lists of four gradients wait for the next pass"
    assert alive == [4]
    assert len(made) == 12


# Metrics


def test_metrics_have_names_and_the_whole_is_that_of_the_worst(tmp_path):
    model = network()
    optimizer = CraftOptimizer(
        adamw(model),
        held(two(model), first=0.5, others=schedules.Linear(0.015625, 0.0009765625, 10)),
        on_metrics=JSONLWriter(tmp_path / "m.jsonl"),
    )
    train(model, optimizer, 20)
    m = optimizer.metrics
    named = [f"{key}/{name}" for name in ("first", "others") for key in PER_CONSTRAINT]
    assert sorted(m) == sorted([*(set(METRICS) - OF_HELD_OUT_ANCHORS), *named])
    assert all(type(x) is float for x in m.values())
    assert m["violation/others"] > 1.0 > m["violation/first"]
    assert (m["epsilon/first"], m["epsilon/others"]) == (0.5, 0.0009765625)
    for key in ("retention_loss", "epsilon", "lambda", "violation", "grad_cos", "retention_grad_norm"):
        assert m[key] == m[f"{key}/others"]
    assert m["lambda/first"] != m["lambda/others"] == optimizer.param_groups[0]["craft_lambda/others"]
    for key in ("conflict", "projected", "capped"):
        assert m[key] == max(m[f"{key}/first"], m[f"{key}/others"])
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows[-1]["lambda/first"] == m["lambda/first"]
    assert {key: value for key, value in rows[-1].items() if key != "time"} == m


def test_the_whole_of_a_row():
    row = dict.fromkeys(PER_CONSTRAINT, 0.0)
    rows = {
        "a": row | {"violation": 0.5, "epsilon": 1.0, "capped": 1.0, "conflict": 0.25},
        "b": row | {"violation": math.inf, "epsilon": 2.0, "projected": 0.5},
        "c": row | {"violation": 1.5, "epsilon": 3.0, "conflict": 0.75},
    }
    whole = put_together(rows)
    assert {key: whole[key] for key in PER_CONSTRAINT} == rows["b"] | {"capped": 1.0, "conflict": 0.75}
    assert whole["epsilon/c"] == 3.0
    assert len(whole) == 4 * len(PER_CONSTRAINT)


def test_the_pass_runs_on_every_kth_step_for_all():
    model = network()
    drifts = two(model)
    optimizer = CraftOptimizer(adamw(model), drifts, retention_every=3)
    train(model, optimizer, 7)
    assert drawn(optimizer) == [3, 3]
    assert optimizer.metrics["fresh"] == 1.0
    train(model, optimizer, 1, 7)
    assert optimizer.metrics["fresh"] == 0.0


def test_a_line_search_sees_the_same_anchors_and_multipliers():
    model = network()
    drifts = two(model)
    optimizer = CraftOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=5), drifts, epsilon=0.01)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert all(drift.calls > 2 for drift in drifts.values())
    assert drawn(optimizer) == [2, 2]


# State


@pytest.mark.parametrize(
    "duals", [[MultiplicativePI(2.0), MultiplicativePI(0.5)], ["nupi", DualAscent(0.5, 0.1, 3.0)]], ids=str
)
def test_resumed_is_straight_bit_for_bit(duals, tmp_path):
    def build():
        model = network()
        drifts = two(model)
        constraints = {"first": Constraint(drifts["first"], 0.01, duals[0])}
        constraints["others"] = Constraint(drifts["others"], 0.002, duals[1])
        return model, CraftOptimizer(adamw(model), constraints)

    model, first = build()
    train(model, first, 15)
    for group in first.param_groups:
        group["craft_anchor_position/others"] += 100  # positions are each constraint's own
    train(model, first, 1, 15)
    torch.save([model.state_dict(), first.state_dict()], tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    state = {k: v for k, v in saved[1]["param_groups"][0].items() if k.startswith("craft_")}
    assert all(type(x) is float and math.isfinite(x) for x in state.values())
    assert (state["craft_anchor_position/first"], state["craft_anchor_position/others"]) == (16.0, 116.0)
    expected = train(model, first, 14, 16)

    model, second = build()
    model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert drawn(second) == [16, 116]
    assert same(train(model, second, 14, 16), expected)
    assert second.metrics == first.metrics
    ours = [key for key in first.param_groups[0] if key.startswith("craft_")]
    assert [second.param_groups[0][key] for key in ours] == [first.param_groups[0][key] for key in ours]


@pytest.mark.parametrize("as_constraints", [False, True])
def test_pickles_and_copies_keep_what_belongs_to_names(as_constraints):
    model = network()
    drifts = two(model)
    optimizer = CraftOptimizer(adamw(model), held(drifts, first=0.01, others=0.02) if as_constraints else drifts)
    train(model, optimizer, 3)
    assert optimizer.retention_closure == drifts
    copied, twin = copy.deepcopy((model, optimizer))
    assert same(train(copied, twin, 2, 3), train(model, optimizer, 2, 3))
    assert twin.metrics == optimizer.metrics
    back = pickle.loads(pickle.dumps(optimizer))
    assert back.retention_closure is None
    back.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    back.retention_closure = two(model)
    for group in back.param_groups:
        assert group["craft_lambda/others"] == optimizer.param_groups[0]["craft_lambda/others"]


def test_closures_that_are_set_later_get_a_state():
    model = network()
    optimizer = CraftOptimizer(adamw(model), epsilon=0.01)
    train(model, optimizer, 2)
    optimizer.retention_closure = two(model)
    train(model, optimizer, 2, 2)
    assert optimizer.metrics["lambda/first"] > 0.0
    assert "craft_lambda" not in optimizer.param_groups[0]
    optimizer.retention_closure = Drift(model)
    train(model, optimizer, 2, 4)
    assert not [key for key in optimizer.param_groups[0] if "/" in key]
    assert optimizer.param_groups[0]["craft_step"] == 4.0, "steps with closures"


# What goes wrong


def poisoned(drift, factor=float("nan")):
    class Poisoned(Drift):
        def loss(self, number):
            return super().loss(number) * factor

    drift.__class__ = Poisoned


@pytest.mark.parametrize("bad", ["first", "others"])
def test_what_is_not_finite_is_named_and_changes_nothing(bad):
    model, plain = network(), network()
    drifts = two(model)
    poisoned(drifts[bad])
    optimizer = CraftOptimizer(adamw(model), drifts)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k.startswith("craft_dual")}
    with pytest.warns(UserWarning, match=f"retention pass of '{bad}' is not finite"):
        found = train(model, optimizer, 1)
    assert same(found, train(plain, adamw(plain), 1))
    assert {k: v for k, v in optimizer.param_groups[0].items() if k.startswith("craft_dual")} == before
    assert optimizer.param_groups[0]["craft_skipped"] == optimizer.metrics["skipped"] == 1.0
    assert drawn(optimizer) == [1, 1]


@pytest.mark.parametrize(
    ("broken", "error", "match"),
    [
        (lambda d, m: d.loss(0).item(), TypeError, r"`retention_closure\['others'\]` must return .* Found float"),
        (lambda d, m: d.loss(0).detach(), RuntimeError, r"\['others'\]` returned a loss without a graph"),
        (lambda d, m: nn.Parameter(torch.ones(())) * 1.0, RuntimeError, "Constraint 'others': .* reaches none"),
    ],
)
def test_an_error_in_one_undoes_all(broken, error, match):
    model = network()
    drifts = two(model)
    optimizer = CraftOptimizer(adamw(model), {**drifts, "others": lambda: broken(drifts["others"], model)})
    model(torch.ones(1, 4)).sum().backward()
    task, state = [p.grad for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), task, strict=True))
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert drawn(optimizer) == [0, 0]


def test_gradients_of_parameters_that_others_own_are_protected():
    model, head = network(), nn.Linear(3, 3)

    class Through(Drift):
        def loss(self, number):
            return super().loss(number) + head(self.model(torch.ones(1, 4))).square().mean()

        def parameters(self):
            return [*self.model.parameters(), *head.parameters()]

    optimizer = CraftOptimizer(adamw(model), {"plain": Drift(model), "through": Through(model)})
    head(torch.ones(1, 3)).sum().backward()
    kept = [p.grad.clone() for p in head.parameters()]
    train(model, optimizer, 1)
    assert same([p.grad for p in head.parameters()], kept)


def test_the_warning_at_the_cap_names_the_constraint():
    model = network()
    drifts = {"held": Drift(model), "hopeless": lambda: 9.0 + model[0].weight.sum()}
    optimizer = CraftOptimizer(adamw(model, 1e-4), held(drifts, held=10.0, hopeless=0.1), rho=0.1)
    with pytest.warns(UserWarning, match="^Constraint 'hopeless': lambda has been at its cap for 100") as caught:
        train(model, optimizer, 120)
    assert len(caught) == 1


def test_little_reach_is_named():
    model = network()
    optimizer = CraftOptimizer(adamw(model), {"all": Drift(model), "bias": lambda: model[2].bias.square().sum()})
    with pytest.warns(UserWarning, match=r"^Constraint 'bias': After 10 .* gradient in 4\.5%") as caught:
        train(model, optimizer, 12)
    assert len(caught) == 1


def test_float16_has_a_scale_for_each():
    """An overflow of one repeats its pass alone."""
    model = network()
    drifts = two(model, dtype=torch.float16)
    optimizer = CraftOptimizer(adamw(model), drifts, trust_region=None)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["craft_scale/others"] = 2.0**40
    calls = drifts["first"].calls, drifts["others"].calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, 2)
    assert drifts["first"].calls == calls[0] + 1
    assert drifts["others"].calls > calls[1] + 1
    assert drawn(optimizer) == [3, 3]
    group = optimizer.param_groups[0]
    assert group["craft_scale/others"] < 2.0**40
    assert group["craft_scale/first"] == 2.0**16
    assert optimizer.metrics["skipped"] == 0.0


def test_float16_decides_as_float32():
    """Each product is freed of the scales of both its gradients, which differ."""
    found = []
    for dtype in (torch.float16, None):
        model = network()
        optimizer = CraftOptimizer(
            adamw(model), two(model, dtype=dtype), epsilon=1e-6, rho=0.5, dual=MultiplicativePI(100.0)
        )
        train(model, torch.optim.SGD(model.parameters(), lr=0.5), 10)
        optimizer.param_groups[0]["craft_scale/others"] = 2.0**10
        train(model, optimizer, 1, 10)
        found.append(optimizer.metrics)
    assert found[0]["projected/first"] == found[0]["projected/others"] == 1.0
    for key in ("lambda/first", "lambda/others", "merged_grad_norm", "retention_grad_norm/first"):
        assert found[0][key] == pytest.approx(found[1][key], rel=0.02)


def test_gradients_that_a_wrapper_keeps_in_its_own_buffers_are_refused():
    """The second backward would overwrite what the first has left."""
    model = network()
    optimizer = CraftOptimizer(adamw(model), two(model))
    model(torch.ones(1, 4)).sum().backward()
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}

    def keep(p):
        p.grad = buffers[p].copy_(p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(keep)
    with pytest.raises(RuntimeError, match="or of another constraint's, which are lost now"):
        optimizer.step()


def test_a_scaler_changes_no_decision():
    runs = []
    for scale in (1.0, 2.0**12):
        model = network()
        optimizer = CraftOptimizer(adamw(model), two(model), epsilon=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            scaler.scale(nn.functional.cross_entropy(model(x), x[:, :3].argmin(1))).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(([p.detach() for p in model.parameters()], optimizer.metrics))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# What is refused


@pytest.mark.parametrize(
    ("closures", "settings", "error", "match"),
    [
        ({}, {}, ValueError, "at least one closure, or be None. Found none"),
        ([], {}, ValueError, "at least one closure, or be None. Found none"),
        ({"a": None}, {}, TypeError, r"`retention_closure\['a'\]` must be callable .* Found NoneType"),
        ({1: sum}, {}, TypeError, "must be strings. Found 1"),
        ({"a/b": sum}, {}, ValueError, "Found 'a/b'"),
        ({"": sum}, {}, ValueError, "must not be empty"),
        (dict.fromkeys("abcdefghi", sum), {}, ValueError, "at most 8 .* Found 9.*CombinedRetention"),
        (dict.fromkeys("ab", sum), {"epsilon": -1.0}, ValueError, "epsilon=-1.0"),
        (dict.fromkeys("ab", sum), {"epsilon": {"a": 1.0}}, TypeError, "`epsilon` must be a number .* Found dict"),
        (dict.fromkeys("ab", sum), {"dual": "pid"}, ValueError, "Found dual='pid'"),
        ([Constraint(sum)], {"epsilon": 0.1}, ValueError, r"1 Constraint objects. Found epsilon=.*0\.1.*in each"),
        ({"a": Constraint(sum), "b": sum}, {"dual": "pi"}, ValueError, "say it in each, Constraint"),
        (dict.fromkeys("ab", sum), {"conflict_threshold": 0.1}, ValueError, "must be <= 0 with several"),
    ],
)
def test_what_cannot_be_is_refused_at_once(closures, settings, error, match):
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        CraftOptimizer(base, closures, **settings)
    assert not [key for key in base.param_groups[0] if key.startswith("craft_")]


def test_what_cannot_be_is_refused_later_too():
    model = network()
    drift = Drift(model)
    optimizer = CraftOptimizer(adamw(model), drift, conflict_threshold=0.1)
    with pytest.raises(ValueError, match="several constraints"):
        optimizer.retention_closure = two(model)
    assert optimizer.retention_closure is drift
    optimizer = CraftOptimizer(adamw(model), two(model))
    with pytest.raises(ValueError, match="several constraints"):
        optimizer.rules = Rules(conflict_threshold=0.1)
    assert optimizer.rules == Rules()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3,), TypeError, "`retention` must be callable"),
        ((Drift,), TypeError, "Found Drift"),
        ((sum, -0.1), ValueError, "epsilon=-0.1"),
        ((sum, 0.1, "pid"), ValueError, "dual='pid'"),
    ],
)
def test_a_constraint_checks_itself(arguments, error, match):
    with pytest.raises(error, match=match):
        Constraint(*arguments)


def test_a_list_has_its_places_as_names():
    model = network()
    drifts = [*two(model).values()]
    optimizer = CraftOptimizer(adamw(model), [Constraint(drifts[0], 0.5), Constraint(drifts[1], 0.25)])
    train(model, optimizer, 2)
    assert (optimizer.metrics["epsilon/0"], optimizer.metrics["epsilon/1"]) == (0.5, 0.25)
    assert optimizer.retention_closure == {"0": drifts[0], "1": drifts[1]}
