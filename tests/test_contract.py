"""What torch's own tools expect of an optimizer: compilers, profilers, names, hooks, schedulers, averaging, clipping.

`tests/test_optimizer.py` has groups, state and the order of global hooks.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from craft_optim import CraftOptimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def distance(model):
    """A retention closure: how far the parameters are from where they are now."""
    start = [p.detach().clone() for p in model.parameters()]
    return lambda: sum((p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True))


def bare(base, model):
    return base


def idle(base, model):
    return CraftOptimizer(base)


def active(base, model):
    return CraftOptimizer(base, distance(model), epsilon=1e-4)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x), x[:, :3].argmin(1))


def train(model, optimizer, steps, act=lambda step: None):
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        act(step)
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def counter():
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    yield testing.CompileCounter()
    torch._dynamo.reset()


def compiled_steps(model, optimizer, **compile):
    """Compiles the optimizer's step, as users do who compile it apart from the model."""
    step = torch.compile(lambda: optimizer.step(), **compile)
    for i in range(6):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_idle_step_compiles_to_the_graph_of_the_base(counter, name):
    graphs, results = [], []
    for wrap in (bare, idle):
        torch._dynamo.reset()
        counter.clear()
        model = network()
        optimizer = wrap(getattr(torch.optim, name)(model.parameters(), lr=1e-2), model)
        results.append(compiled_steps(model, optimizer, backend=counter))
        graphs.append((counter.frame_count, counter.op_count))
    assert graphs[0] == graphs[1]
    assert graphs[0][1] > 0
    assert same(*results)


def test_an_active_step_runs_outside_of_the_graph(counter):
    model = network()
    expected = train(model, active(adamw(model), model), 6)
    model = network()
    craft = active(adamw(model), model)
    assert same(expected, compiled_steps(model, craft, backend=counter))
    assert craft.metrics["retention_step"] == 5.0
    assert counter.op_count == 0


def test_an_active_step_in_a_compiled_training_step(counter):
    model = network()
    optimizer = active(adamw(model), model)
    expected = train(model, optimizer, 6)
    metrics = optimizer.metrics

    model = network()
    craft = active(adamw(model), model)

    @torch.compile(backend=counter)
    def training_step(x, y):
        craft.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        craft.step()
        return loss * 1.0

    for step in range(6):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        training_step(x, x[:, :3].argmin(1))
    assert same(expected, [p.detach() for p in model.parameters()])
    assert craft.metrics == metrics
    assert counter.op_count > 0, "the forward is compiled"


# -- torch.profiler ----------------------------------------------------------------------------------------------------


def test_the_profiler_shows_each_part_of_a_step_within_it():
    model = network()
    craft = active(adamw(model), model)
    train(model, craft, 1)
    loss_of(model, 1).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        craft.step()
        craft.zero_grad()
    outer = "Optimizer.step#CraftOptimizer.step"
    parents = {}
    for event in profile.events():
        if event.name.startswith(("Optimizer.", "CraftOptimizer.")):
            parents.setdefault(event.name, set()).add(event.cpu_parent and event.cpu_parent.name)
    assert parents == {
        outer: {None},
        "CraftOptimizer.retention": {outer},
        "CraftOptimizer.merge": {outer},
        "Optimizer.step#AdamW.step": {outer},
        "Optimizer.zero_grad#AdamW.zero_grad": {None},
    }


# -- named parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [idle, active])
def test_names_of_parameters_stay_with_them(wrap):
    model = network()
    names = [name for name, _ in model.named_parameters()]
    extra = nn.Parameter(torch.ones(2))
    states = []
    for make in (bare, wrap):
        twin = copy.deepcopy(model)
        optimizer = make(torch.optim.AdamW(twin.named_parameters(), lr=1e-2), twin)
        train(twin, optimizer, 2)
        optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5})
        with pytest.raises(ValueError, match="name"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        optimizer.load_state_dict(optimizer.state_dict())
        groups = optimizer.state_dict()["param_groups"]
        assert [group["param_names"] for group in groups] == [names, ["extra"]]
        states.append([{k: v for k, v in g.items() if not k.startswith("craft_")} for g in groups])
    assert states[0] == states[1]


# -- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [idle, active])
def test_step_hooks_see_and_change_the_arguments_as_on_the_base(wrap):
    """A pre-hook may put another closure into the call."""
    seen, results = [], []
    for make in (bare, wrap):
        model = network()
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.0), model)
        calls = []

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        def pre(o, args, kwargs, optimizer=optimizer, closure=closure, calls=calls):
            calls.append(("pre", o is optimizer, len(args), sorted(kwargs)))
            return (args[0], lambda: closure() + 1.0), {}

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(
            lambda o, args, kwargs, calls=calls: calls.append(("post", len(args), sorted(kwargs)))
        )
        results += [optimizer.step(closure).item(), optimizer.step(closure=closure).item()]
        seen.append(calls)
        assert results[-1] == pytest.approx(closure().item() + 1.0)
    assert seen[0] == seen[1]
    assert results[:2] == results[2:]


def test_state_dict_hooks_fire_in_torchs_order_around_those_of_the_base():
    orders = []
    for make in (bare, active):
        model = network()
        base = adamw(model)
        optimizer = make(base, model)
        order = []
        for name in ("first", "second", "prepended"):
            at = {"prepend": name == "prepended"}
            optimizer.register_state_dict_pre_hook(lambda o, n=name, s=order: s.append(f"pre {n}"), **at)
            optimizer.register_state_dict_post_hook(lambda o, d, n=name, s=order: s.append(f"post {n}"), **at)
            optimizer.register_load_state_dict_pre_hook(lambda o, d, n=name, s=order: s.append(f"load {n}"), **at)
            optimizer.register_load_state_dict_post_hook(lambda o, n=name, s=order: s.append(f"loaded {n}"), **at)
        if make is active:
            base.register_state_dict_pre_hook(lambda o, s=order: s.append("base"))
            base.register_load_state_dict_post_hook(lambda o, s=order: s.append("base"))
        optimizer.load_state_dict(optimizer.state_dict())
        orders.append(order)
    hooks = ["prepended", "first", "second"]
    assert orders[0] == [f"{when} {n}" for when in ("pre", "post", "load", "loaded") for n in hooks]
    assert [entry for entry in orders[1] if entry != "base"] == orders[0]
    assert [orders[1].index("base"), orders[1][::-1].index("base")] == [3, 3], "between the wrapper's pre and post"


# -- schedulers --------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, total_iters=3)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
CYCLES_MOMENTUM = ("CyclicLR", "OneCycleLR")


def test_the_table_of_schedulers_is_complete():
    kinds = {
        n for n, c in vars(lr_scheduler).items() if isinstance(c, type) and issubclass(c, lr_scheduler.LRScheduler)
    }
    assert kinds - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("wrap", [idle, active])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_the_wrapper_as_it_moves_the_base(name, wrap):
    moved, results, states = [], [], []
    for make in (bare, wrap):
        model = network()
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model)
        scheduler = SCHEDULERS[name](optimizer)
        values = []

        def act(step, scheduler=scheduler, optimizer=optimizer, values=values):
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            (group,) = optimizer.param_groups
            values.append((group["lr"], group["momentum"]))

        results.append(train(model, optimizer, 10, act))
        moved.append(values)
        states.append({k: v for k, v in scheduler.state_dict().items() if not callable(v)})
    assert moved[0] == moved[1]
    assert len({lr for lr, _ in moved[1]}) > 1
    assert (len({momentum for _, momentum in moved[1]}) > 1) == (name in CYCLES_MOMENTUM)
    assert states[0] == states[1]
    assert same(*results) == (wrap is idle)


def test_a_scheduler_that_steps_before_the_wrapper_says_so():
    model = network()
    scheduler = lr_scheduler.StepLR(active(adamw(model), model), 2)
    with pytest.warns(UserWarning, match=r"before `optimizer\.step\(\)`"):
        scheduler.step()


def test_averaged_weights():
    results = []
    for make in (bare, idle, active):
        model = network()
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1), model)
        average = swa_utils.AveragedModel(model)
        passed = []

        def act(step, average=average, model=model, passed=passed):
            average.update_parameters(model)
            passed.append([p.detach().clone() for p in model.parameters()])

        train(model, optimizer, 8, act)
        means = [torch.stack(p).mean(0) for p in zip(*passed, strict=True)]
        for p, mean in zip(average.module.parameters(), means, strict=True):
            torch.testing.assert_close(p.detach(), mean)
        results.append([p.detach() for p in average.parameters()])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_bounds_the_task_gradient_which_is_there_after_the_step(clip):
    model = network()
    craft = active(adamw(model), model)
    train(model, craft, 4)
    craft.zero_grad()
    loss_of(model, 4).backward()
    if clip == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    else:
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    clipped = [p.grad.clone() for p in model.parameters()]
    craft.step()
    assert same(clipped, [p.grad for p in model.parameters()])
    norm = torch.cat([g.flatten() for g in clipped]).norm().item()
    assert craft.metrics["task_grad_norm"] == pytest.approx(norm, rel=1e-5)
