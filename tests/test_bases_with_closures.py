"""Bases that evaluate a closure: line searches, SAM, and those whose `step` takes more than a closure."""

import copy
import math

import pytest
import torch
from torch import nn

from craft_optim import Constraint, CraftOptimizer, Retention
from craft_optim.anchors import AnchorMismatchError, CombinedRetention, HiddenRetention, LogitRetention, build


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as pytorch_optimizer has it: the closure is evaluated at perturbed weights."""

    def __init__(self, params, rho, lr):
        super().__init__(params, {"rho": rho, "lr": lr})

    @torch.no_grad()
    def step(self, closure):
        (group,) = self.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        moves = [p.grad * group["rho"] / (norm + 1e-12) for p in group["params"]]
        torch._foreach_add_(group["params"], moves)
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(group["params"], moves)
        torch._foreach_sub_(group["params"], [group["lr"] * p.grad for p in group["params"]])
        return loss


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return build(classifier(), inputs.split(16), tmp_path_factory.mktemp("anchors") / "a", layers=["1"], class_dim=-1)


def combined(model, cache, size):
    return CombinedRetention({"a": LogitRetention(model, cache, size), "b": HiddenRetention(model, cache, size)})


RETENTIONS = {"logits": LogitRetention, "hidden": HiddenRetention, "combined": combined}
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))


def closure_of(model, optimizer, seen=None):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), X[:, :3].argmin(1))
        loss.backward()
        if seen is not None:
            seen.append(loss.item())
        return loss

    return closure


def values(model):
    return [p.detach().clone() for p in model.parameters()]


# -- line searches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "several"), [*((kind, False) for kind in RETENTIONS), ("hidden", True)])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_holds_the_constraint(cache, kind, search, several):
    model = classifier()
    retention = RETENTIONS[kind](model, cache, 64)
    given = {"a": Constraint(retention, 0.02), "b": Constraint(LogitRetention(model, cache, 64), 0.03)}
    # Without a line search it cannot follow a multiplier that moves between steps at a large rate
    rate = 0.02 if search else 0.01
    base = torch.optim.LBFGS(model.parameters(), lr=rate, max_iter=5, line_search_fn=search)
    optimizer = CraftOptimizer(base, given if several else retention, **({} if several else {"epsilon": 0.02}))
    first = last = None
    for _ in range(40):
        loss = optimizer.step(closure_of(model, optimizer)).item()
        first, last = first or loss, loss
    assert last < first
    assert retention.drift() < 2.0 * 0.02


@pytest.mark.parametrize("projection", ["violated", "always", "never"])
@pytest.mark.parametrize("merge", ["weighted", "equal", "task_priority"])
@pytest.mark.parametrize("most", [None, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_base_gets_the_value_whose_gradient_it_gets(projection, merge, most, maximize):
    """By central differences, at the second evaluation and at later ones."""
    x = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))
    centre = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    found = []

    class Probe(torch.optim.SGD):
        def step(self, closure):
            for shift in (0.0, 0.1, -0.2):
                with torch.no_grad():
                    x.add_(shift)
                closure()
                gradient = x.grad.clone()
                for i in range(3):
                    ends = []
                    for h in (1e-5, -1e-5):
                        with torch.no_grad():
                            x[i] += h
                        ends.append(float(closure()))
                        with torch.no_grad():
                            x[i] -= h
                    found.append((gradient[i].item(), (ends[0] - ends[1]) / 2e-5))
            return closure()

    def task():
        optimizer.zero_grad()
        loss = (x - centre).square().sum() * (-1.0 if maximize else 1.0)
        loss.backward()
        return loss

    optimizer = CraftOptimizer(
        Probe([x], lr=0.1, maximize=maximize),
        {"a": Constraint(lambda: x.square().sum(), 0.1), "b": Constraint(lambda: (x[0] - x[1]) ** 2, 0.01)},
        projection=projection,
        merge=merge,
        max_grad_norm=most,
    )
    optimizer.step(task)
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-7) for a, b in found)


@pytest.mark.parametrize("base", ["SGD", "LBFGS"])
def test_the_caller_gets_the_loss_of_the_task(cache, base):
    model, seen = classifier(), []
    optimizer = CraftOptimizer(
        getattr(torch.optim, base)(model.parameters(), lr=0.1), LogitRetention(model, cache), epsilon=1e-4
    )
    for _ in range(3):
        seen.clear()
        assert optimizer.step(closure_of(model, optimizer, seen)).item() == seen[0]


class Numbers(torch.optim.SGD):
    """Returns a number, as some bases do."""

    def step(self, closure=None):
        value = float(closure())
        super().step()
        return value


def test_the_caller_gets_the_tasks_loss_of_a_base_that_returns_a_number():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = CraftOptimizer(Numbers([p], lr=0.1), lambda: (p - 1.0).square().sum() + 5.0, epsilon=0.01)

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0


@pytest.mark.parametrize("returned", [None, "text", 2.0, 3, torch.ones(2)], ids=str)
def test_a_closure_may_return_what_it_likes(returned):
    x = nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(torch.optim.SGD([x], lr=0.1), lambda: x.square().sum())

    def closure():
        x.grad = torch.ones(2)
        return returned

    assert optimizer.step(closure) is returned


def test_a_first_evaluation_that_is_not_finite_makes_a_step_of_the_task_alone():
    x, calls = nn.Parameter(torch.tensor([1.0, 2.0])), []

    def broken():
        calls.append(1)
        return x.sum() * (math.nan if len(calls) == 1 else 1.0)

    optimizer = CraftOptimizer(torch.optim.LBFGS([x], lr=0.1, max_iter=4), broken)
    twin = nn.Parameter(x.detach().clone())
    bare = torch.optim.LBFGS([twin], lr=0.1, max_iter=4)
    for p, o in ((twin, bare), (x, optimizer)):

        def closure(p=p, o=o):
            o.zero_grad()
            loss = (p - 3.0).square().sum()
            loss.backward()
            return loss

        if o is optimizer:
            with pytest.warns(UserWarning, match="not finite"):
                o.step(closure)
        else:
            o.step(closure)
    assert torch.equal(x, twin)
    assert torch.equal(x.grad, twin.grad)
    assert len(calls) == 1


# -- bases that move the parameters first ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RETENTIONS)
def test_sam_trains_and_holds_with_the_strict_check(cache, kind):
    model = classifier()
    retention = RETENTIONS[kind](model, cache, 64)
    optimizer = CraftOptimizer(SAM(model.parameters(), 0.05, 0.1), retention, epsilon=0.02)
    first = None
    for _ in range(150):
        closure = closure_of(model, optimizer)
        loss = closure().item()
        first = first or loss
        optimizer.step(closure)
    assert loss < first
    assert retention.drift() < 1.5 * 0.02


def test_another_model_is_still_refused_and_nothing_has_moved(cache):
    for base in (
        lambda m: SAM(m.parameters(), 0.05, 0.1),
        lambda m: torch.optim.LBFGS(m.parameters()),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    ):
        model = classifier()
        with torch.no_grad():
            model[2].weight.mul_(2.0)
        optimizer = CraftOptimizer(base(model), LogitRetention(model, cache))
        closure = closure_of(model, optimizer)
        closure()
        before, gradients = values(model), [p.grad.clone() for p in model.parameters()]
        with pytest.raises(AnchorMismatchError):
            optimizer.step(closure)
        assert all(map(torch.equal, before, values(model)))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("place", ["task", "retention", "base"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 3])
def test_after_an_error_the_weights_are_the_callers(place, error, at):
    model = classifier()
    teacher, calls = copy.deepcopy(model), []

    def fail(where):
        if where == place:
            calls.append(1)
            if len(calls) == at:
                raise error("stop")

    class Drift(Retention):
        def loss(self, number):
            fail("retention")
            return (model(X) - teacher(X).detach()).square().mean()

    class Base(SAM):
        @torch.no_grad()
        def step(self, closure):
            def after():
                loss = closure()
                fail("base")
                return loss

            return super().step(after)

    optimizer = CraftOptimizer(Base(model.parameters(), 0.05, 0.1), Drift(), trust_region=None)
    plain = closure_of(model, optimizer)

    def closure():
        loss = plain()
        fail("task")
        return loss

    for _ in range(at - 1):
        plain()
        optimizer.step(closure)
    plain()
    before, groups = values(model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(error, match="stop"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, values(model)))
    assert optimizer.state_dict()["param_groups"] == groups


def test_bases_that_evaluate_first_cost_no_copy(monkeypatch):
    from craft_optim import optimizer as module

    model, copies = classifier(), []
    kept = module.values_back_after_errors
    monkeypatch.setattr(module, "values_back_after_errors", lambda p: copies.append(1) or kept(p))

    class Own(torch.optim.SGD):
        """Of another library: it is looked at in its first step."""

    for base, expected in ((torch.optim.AdamW, 0), (Own, 1), (torch.optim.LBFGS, 4)):
        copies.clear()
        optimizer = CraftOptimizer(base(model.parameters(), lr=1e-3), lambda: model(X).square().mean())
        for _ in range(4):
            optimizer.step(closure_of(model, optimizer))
        assert len(copies) == expected


def test_an_optimizer_that_wraps_another_is_told_to_wrap_ours():
    class Wraps(torch.optim.SGD):
        def first_step(self):
            raise AssertionError("not ours to call")

    optimizer = CraftOptimizer(Wraps([nn.Parameter(torch.ones(2))], lr=0.1))
    assert not hasattr(optimizer, "first_step")
    with pytest.raises(AttributeError, match=r"'first_step'\. Its `base_optimizer` has.*If Wraps wraps.*bind"):
        optimizer.first_step  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        optimizer.nothing  # noqa: B018


@pytest.mark.parametrize("enabled", [True, False])
def test_a_base_steps_in_the_callers_grad_mode(enabled):
    seen = []

    class Own(torch.optim.Optimizer):
        def step(self, closure=None):
            seen.append(torch.is_grad_enabled())
            return closure and closure()

    x = nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(Own([x], {}), lambda: x.square().sum())

    def closure():
        seen.append(torch.is_grad_enabled())
        x.grad = torch.ones(2)

    with torch.set_grad_enabled(enabled):
        closure()
        optimizer.step()
        optimizer.step(closure)
        optimizer.step(closure)
    assert seen == [enabled, enabled, enabled, True, enabled, True]


# -- what else a step takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retention", [None, lambda p: lambda: p.square().sum()])
@pytest.mark.parametrize("every", [1, 2])
def test_more_arguments_reach_the_base(retention, every):
    class Takes(torch.optim.SGD):
        def step(self, closure=None, scale=1.0, *, note=None):
            seen.append((closure is not None, scale, note))
            return super().step(closure)

    seen, p = [], nn.Parameter(torch.ones(2))
    closure = None if retention is None else retention(p)
    optimizer = CraftOptimizer(Takes([p], lr=0.1), closure, retention_every=every)

    def evaluate():
        p.grad = torch.ones(2)
        return 1.0

    for _ in range(2):
        evaluate()
        optimizer.step(scale=2.0)
        optimizer.step(evaluate, note="a")
        optimizer.step(closure=evaluate, scale=3.0)
        optimizer.step(None, 4.0)
        optimizer.step(evaluate, 5.0, note="b")
    calls = [(False, 2.0, None), (True, 1.0, "a"), (True, 3.0, None), (False, 4.0, None), (True, 5.0, "b")]
    assert seen == calls * 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        optimizer.step(other=1)
    if retention is not None:
        with pytest.raises(TypeError, match="Found dict"):
            optimizer.step({"scale": 1.0})
