"""State in the base's groups, sinks that fail, settings that look like attributes, circumstances that change."""

import copy
import gc
import json
import os
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from craft_optim import Constraint, CraftOptimizer, Retention, schedules
from craft_optim.anchors import CombinedRetention, LogitRetention, OnlineRetention, build
from craft_optim.metrics import JSONLWriter


class Pull(Retention):
    """Towards where the model was; the target depends on the pass, so that a wrong place shows."""

    def __init__(self, model):
        self.model, self.start = model, [p.detach().clone() for p in model.parameters()]

    def loss(self, number):
        away = 0.01 * (number % 7)
        return sum((p - q - away).square().sum() for p, q in zip(self.model.parameters(), self.start, strict=True))


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().sub(model(-x).sum()).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_resumes(run):
    """By torch's distributed checkpoint, from the 10th step, to the bit; `run()` makes model and optimizer."""
    model, optimizer = run()
    train(model, optimizer, 10)
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    expected, groups = train(model, optimizer, 5, 10), len(optimizer.param_groups)
    model, optimizer = run()
    model.load_state_dict(saved[0])
    set_optimizer_state_dict(model, optimizer, saved[1])
    assert [group["craft_step"] for group in optimizer.param_groups] == [10.0] * groups
    found = train(model, optimizer, 5, 10)
    assert all(map(torch.equal, expected, found))


# -- floats in the groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [0, 1, 2])
@pytest.mark.parametrize("several", [False, True])
def test_a_run_resumes_from_a_distributed_checkpoint_with_an_empty_group(empty, several):
    def run():
        model = model_of()
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.01}]
        groups.insert(empty, {"params": []})
        pull = Pull(model)
        given = {"a": pull, "b": Constraint(Pull(model), 0.2)} if several else pull
        return model, CraftOptimizer(torch.optim.AdamW(groups, lr=0.02), given)

    assert_resumes(run)


@pytest.mark.parametrize("way", ["replaced", "loaded", "one more", "without ours"])
def test_groups_that_the_base_was_given_get_all_floats(way):
    model = model_of()
    base = torch.optim.AdamW(model[0].parameters(), lr=0.02)
    optimizer = CraftOptimizer(base, Pull(model), dual="ascent")
    train(model, optimizer, 4)
    floats = {k for k in base.param_groups[0] if k.startswith("craft_")}
    if way == "replaced":
        base.param_groups = [{k: v for k, v in g.items() if not k.startswith("craft_")} for g in base.param_groups]
    elif way == "loaded":  # by a run with another controller
        other = CraftOptimizer(torch.optim.AdamW(model_of()[0].parameters()), lambda: 0.0, dual="pi")
        base.load_state_dict(other.state_dict())
    elif way == "one more":
        base.add_param_group({"params": list(model[2].parameters())})
    else:
        for key in floats:
            del base.param_groups[0][key]
    train(model, optimizer, 1)
    for group in base.param_groups:
        assert {k for k in group if k.startswith("craft_")} == floats
        assert group["craft_step"] == (5.0 if way == "one more" else 1.0)


def test_a_second_task_on_the_same_base_begins_anew(tmp_path):
    """Its schedule, its multiplier, its anchors, and the check of their teacher."""
    model, data = model_of(), torch.randn(32, 3)
    first = build(model, data.split(8), tmp_path / "first", class_dim=-1)
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    ramp = schedules.Linear(0.5, 0.05, 20)
    train(model, CraftOptimizer(base, LogitRetention(model, first, 8), epsilon=ramp), 30)
    again = CraftOptimizer(base, LogitRetention(model, first, 8), epsilon=ramp)
    assert {k: v for k, v in base.param_groups[0].items() if k in ("craft_step", "craft_anchor_position")} == {
        "craft_step": 0.0,
        "craft_anchor_position": 0.0,
    }
    with pytest.raises(ValueError, match="does not reproduce"):
        train(model, again, 1)
    second = CraftOptimizer(
        base, LogitRetention(model, build(model, data.split(8), tmp_path / "second", class_dim=-1), 8)
    )
    train(model, second, 1)


def test_of_two_around_one_base_the_later_steps():
    """As after a cell of a notebook was run again, where something still has the first."""
    model = model_of()
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    first = CraftOptimizer(base, Pull(model))
    train(model, first, 2)
    second = CraftOptimizer(base, Pull(model))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="Another CraftOptimizer has been made around this base"):
        train(model, first, 1)
    assert all(map(torch.equal, before, model.parameters()))
    train(model, second, 2)
    twin, twin_model = copy.deepcopy((second, model))
    train(twin_model, twin, 1)
    train(model, second, 1)
    del second, twin
    gc.collect()
    train(model, first, 1)
    assert base.param_groups[0]["craft_step"] == 4.0


def test_unpickling_what_had_no_closure_has_nothing_to_tell():
    model = model_of()
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), Pull(model))
    optimizer.retention_closure = None
    copied, twin = pickle.loads(pickle.dumps((model, optimizer)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(copied, twin, 1)


@pytest.mark.parametrize("several", [False, True])
def test_another_closure_begins_anew_after_a_while_without_one(several):
    def given(pull):
        return {"a": pull, "b": Pull(model)} if several else pull

    model = model_of()
    place = "craft_anchor_position" + "/a" * several
    first = given(Pull(model))
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), first)
    train(model, optimizer, 3)
    for closure, expected in ((first, 3.0), (given(Pull(model)), 0.0)):
        optimizer.retention_closure = None
        train(model, optimizer, 1)
        optimizer.retention_closure = closure
        assert optimizer.param_groups[0][place] == expected
    train(model, optimizer, 2)
    optimizer.retention_closure = None
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.retention_closure = given(Pull(model))
    assert optimizer.param_groups[0][place] == 2.0, "the place is that of the state"


@pytest.mark.parametrize("way", [lambda optimizer: optimizer, lambda optimizer: optimizer.base_optimizer])
@pytest.mark.parametrize(("then", "now"), [("a", "b"), ("a", None), (None, "b"), ("ab", "ac"), ("ab", "a"), ("a", "a")])
def test_constraints_that_a_state_does_not_know_are_told_of(then, now, way):
    def run(names):
        model = model_of()
        given = Pull(model) if names is None else {name: Pull(model) for name in names}
        return model, CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=0.02), given)

    model, optimizer = run(then)
    train(model, optimizer, 3)
    other, later = run(now)
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way(later).load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, later, 1)
    new = sorted(set([now] if now is None else now) - set([then] if then is None else then), key=str)
    assert [f"has nothing of {new}" in str(warning.message) for warning in caught] == [True] * bool(new)


def test_groups_that_another_base_had_bring_no_place_along():
    model = model_of()
    old = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), Pull(model))
    train(model, old, 3)
    new = CraftOptimizer(torch.optim.AdamW(old.param_groups), Pull(model))
    assert {new.param_groups[0][key] for key in ("craft_step", "craft_anchor_position", "craft_lambda")} == {0.0}


def test_two_optimizers_of_one_model_resume_in_any_order():
    def run():
        model = model_of()
        pull = Pull(model)
        return model, [
            CraftOptimizer(torch.optim.AdamW(model[0].parameters(), lr=0.02), pull),
            CraftOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.02, momentum=0.9), pull),
        ]

    def go(model, optimizers, start):
        for step in range(start, start + 8):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(x).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    results = []
    for order in ((0, 1), (1, 0)):
        model, optimizers = run()
        go(model, optimizers, 0)
        saved = copy.deepcopy([model.state_dict(), *(o.state_dict() for o in optimizers)])
        results.append(go(model, optimizers, 8))
        model, optimizers = run()
        model.load_state_dict(saved[0])
        for number in order:
            optimizers[number].load_state_dict(saved[1 + number])
        results.append(go(model, optimizers, 8))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_schedule_free_resumes_from_a_distributed_checkpoint():
    """Its modes leave empty entries in the state, which look like a state that is complete."""
    schedulefree = pytest.importorskip("schedulefree")

    def run():
        model = model_of()
        optimizer = CraftOptimizer(schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02), Pull(model))
        optimizer.eval()
        optimizer.train()
        return model, optimizer

    assert_resumes(run)


# -- sinks -------------------------------------------------------------------------------------------------------------


def test_a_sink_that_fails_is_told_of_once_and_the_run_is_the_same():
    calls = []

    def full(metrics):
        calls.append(metrics["retention_step"])
        raise OSError(28, "No space left on device")

    model, twin = model_of(), model_of()
    expected = train(twin, CraftOptimizer(torch.optim.AdamW(twin.parameters()), Pull(twin)), 4)
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters()), Pull(model), on_metrics=full)
    with pytest.warns(UserWarning, match="OSError: .*No space left") as caught:
        found = train(model, optimizer, 4)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert calls == [0.0, 1.0, 2.0, 3.0]
    assert all(map(torch.equal, expected, found))


def test_a_sink_may_be_interrupted():
    def stop(metrics):
        raise KeyboardInterrupt

    model = model_of()
    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters()), Pull(model), on_metrics=stop)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1)
    assert optimizer.param_groups[0]["craft_step"] == 1.0


@pytest.mark.parametrize("half", ['{"a": 1', '{"a": 1}\n{"b": 0.', '{"a": 1}\n', ""])
def test_a_line_that_was_cut_short_costs_no_other(half, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(half)
    writer = JSONLWriter(path)
    writer({"c": 2.0})
    writer({"c": 3.0})
    writer.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["c"] for line in lines[-2:]] == [2.0, 3.0]
    assert lines[:-2] == half.splitlines()


def test_a_disk_that_was_full_for_a_while(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    writer = JSONLWriter(path)
    file, room = writer._file, [7]

    class Small:
        def write(self, data):
            if room[0] == 0:
                raise OSError(28, "No space left on device")
            written = file.write(data[: room[0]])
            room[0] -= written
            return written

        def close(self):
            file.close()

    monkeypatch.setattr(writer, "_file", Small())
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            writer({"c": 1.0})
    room[0] = 1000
    writer({"c": 2.0})
    writer.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["c"] == 2.0


def test_a_pipe_is_a_file_too(tmp_path):
    read, write = os.pipe()
    writer = JSONLWriter(f"/dev/fd/{write}")
    writer({"c": 2.0})
    writer.close()
    assert json.loads(os.read(read, 1000))["c"] == 2.0
    os.close(read)
    os.close(write)


# -- what looks like an attribute --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon", "dual", "rho", "retention_every", "max_grad_norm", "projection"])
def test_settings_of_an_optimizer_are_no_attributes(name):
    optimizer = CraftOptimizer(torch.optim.SGD(model_of().parameters(), lr=0.1))
    with pytest.raises(AttributeError, match=f"`{name}` of an optimizer is not an attribute. Found {name}=5: set `r"):
        setattr(optimizer, name, 5)
    assert not hasattr(optimizer, name)


def test_processes_may_be_set_and_are_checked_then():
    model = model_of()
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Pull(model))
    with pytest.raises(TypeError, match=r"`process_group` must be .* Found process_group=5"):
        optimizer.process_group = 5
    optimizer.process_group = False
    train(model, optimizer, 1)


def test_settings_of_closures_are_fixed_or_take_effect(tmp_path):
    model, data = model_of(), torch.randn(32, 3)
    cache = build(model, data.split(8), tmp_path / "a", class_dim=-1)
    logits, online = (
        LogitRetention(model, cache, 8),
        OnlineRetention(model, list(data), 8, teacher=copy.deepcopy(model)),
    )
    combined = CombinedRetention({"a": logits, "b": LogitRetention(model, cache, 8)}, {"b": 2.0})
    for closure, names in (
        (logits, ["batch_size", "seed", "strict", "cache", "model", "tolerance", "device"]),
        (online, ["batch_size", "teacher", "collate", "strict"]),
        (combined, ["weights", "members", "tolerance"]),
    ):
        for name in names:
            with pytest.raises(AttributeError):
                setattr(closure, name, 3)
    with torch.no_grad():
        model[2].bias.add_(0.1 * torch.tensor([1.0, -1.0]))
    logits.__dict__["_unchecked"] = combined.members["b"].__dict__["_unchecked"] = False
    once = combined.loss(1).item()
    combined.weights["b"] = 5.0
    assert combined.loss(1).item() == pytest.approx(2.0 * once)
    assert combined.drift() == pytest.approx(6.0 * logits.drift())
    assert copy.deepcopy(combined).loss(1).item() == pytest.approx(2.0 * once)


# -- circumstances -----------------------------------------------------------------------------------------------------


def test_a_closure_at_the_place_of_one_that_is_gone_is_another():
    """Python gives the addresses of what is gone to what comes next."""
    told = []

    class Told(Pull):
        shared = True

        def shard(self, rank, world_size, mean):
            told.append(id(self))
            self.__dict__["shared"] = True

    model = model_of()
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for number in range(20):
        made = [Told(model) for _ in range(100)]  # so many that one of them gets the address of one that is gone
        optimizer.retention_closure = next((one for one in made if id(one) in told), made[0])
        del made
        train(model, optimizer, 1)
        assert len(told) == number + 1
        optimizer.retention_closure = None
        gc.collect()
    assert len(set(told)) < 20, "no address was used again, which this test is about"


def test_unpickling_is_told_of_unless_a_closure_was_set():
    model = model_of()
    optimizer = pickle.loads(pickle.dumps(CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Pull(model))))
    optimizer.retention_closure = Pull(model)
    optimizer.retention_closure = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


# -- what limits a multiplier ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*lambda has been at its cap")
@pytest.mark.filterwarnings("ignore:.*After 10 retention steps")
@pytest.mark.parametrize("dual", ["pi", "ascent", "nupi", "augmented_lagrangian"])
def test_nor_where_no_multiplier_helps(dual):
    """The constraint is violated, and nothing that the task trains now is what holds it."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CraftOptimizer(torch.optim.SGD([a, b], lr=1e-4), lambda: b.square().sum(), epsilon=0.1, dual=dual)
    for _ in range(200):
        a.grad = torch.ones(2)
        optimizer.step()
    (floats,) = optimizer.param_groups
    assert max(value for key, value in floats.items() if key in ("craft_dual_integral", "craft_dual_multiplier")) < 3.0
    assert floats["craft_lambda"] == 0.0


@pytest.mark.filterwarnings("ignore:.*lambda has been at its cap")
@pytest.mark.parametrize("dual", ["pi", "ascent", "nupi", "augmented_lagrangian"])
@pytest.mark.parametrize(("merge", "several"), [("weighted", False), ("weighted", True), ("task_priority", False)])
def test_no_integral_winds_up_against_what_limits_the_multiplier(dual, merge, several):
    """The cap, the common factor of several, and what the merge cuts off."""
    x = nn.Parameter(torch.zeros(2))
    up, down = (lambda: (x[0] - 1.0).square()), (lambda: (x[0] + 1.0).square() + (x[1] - 0.5).square())
    closures = {"up": Constraint(up, 1e-3, dual), "down": Constraint(down, 1e-3, dual)} if several else up
    optimizer = CraftOptimizer(
        torch.optim.SGD([x], lr=1e-3), closures, merge=merge, **({} if several else {"epsilon": 1e-3, "dual": dual})
    )
    (floats,) = optimizer.param_groups
    memory = [key for key in floats if key.startswith(("craft_dual_integral", "craft_dual_multiplier"))]
    held = 0
    for _ in range(400):
        before = dict(floats)
        x.grad = torch.ones(2)
        optimizer.step()
        for key in memory:
            _, _, name = key.partition("/")
            end = f"/{name}" if name else ""
            m = optimizer.metrics
            if m["capped" + end]:
                held += 1
                most = before[key]
                if dual == "pi":  # room for batches that are heavy by chance: three times the share of the cap
                    unit = m["task_grad_norm"] / m["retention_grad_norm" + end]
                    most = max(most, 3.001 * m["lambda" + end] / unit / m["interval"])
                assert floats[key] <= most, key
            if dual != "pi":  # whose integral is a share, without the unit of lambda
                assert floats[key] <= 1.1 * floats[f"craft_lambda/{name}" if name else "craft_lambda"] + 1.0, key
    assert held > 10


def test_of_two_optimizers_around_one_base_the_older_does_not_step_without_retention_either():
    p = torch.nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    older = CraftOptimizer(base, None)
    newer = CraftOptimizer(base, lambda: p.square().sum())
    p.sum().backward()
    with pytest.raises(RuntimeError, match="Another CraftOptimizer has been made around this base"):
        older.step()
    newer.step()
