"""Stop, save, load into fresh objects, go on: the run that was never stopped, bit for bit.

By every route, for every base, and whatever else is switched on; frameworks with routes of their own have their tests
beside this file. What is saved is the same for all, so that routes need not be crossed with options.
"""

import copy
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bases import OPTIMIZERS, make
from runs import BASES, Counted, Run, advance, assert_same, bare, evaluation, network, new_run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from craft_optim import Constraint, CraftOptimizer, schedules
from craft_optim.anchors import CombinedRetention, LogitRetention
from craft_optim.rewind import rewound

HALF, END = 12, 20

pytestmark = pytest.mark.usefixtures("without_a_compiler")


# -- routes: save(run, folder) and load(fresh run, folder), of the model and the optimizer -----------------------------


def _torch_save(run, folder):
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, folder / "run.pt")


def _torch_load(run, folder):
    saved = torch.load(folder / "run.pt", weights_only=True)
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])


def _base_load(run, folder):
    """The state dict of a wrapper goes into a base, which is wrapped only then."""
    saved = torch.load(folder / "run.pt", weights_only=True)
    run.model.load_state_dict(saved["model"])
    base = run.optimizer.base_optimizer
    base.load_state_dict(saved["optimizer"])
    run.optimizer = CraftOptimizer(base, run.retention, epsilon=run.optimizer.constraints[None].epsilon)
    run.scheduler.optimizer = run.optimizer


def _optimizer_only(**options):
    options = StateDictOptions(**options)

    def save(run, folder):
        state = get_optimizer_state_dict(run.model, run.optimizer, options=options)
        torch.save({"model": run.model.state_dict(), "optimizer": state}, folder / "run.pt")

    def load(run, folder):
        saved = torch.load(folder / "run.pt", weights_only=True)
        run.model.load_state_dict(saved["model"])
        set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=options)

    return save, load


def _parts(run, options):
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    return {"model": model, "optimizer": optimizer}


def _dcp(in_the_background=False, **options):
    options = StateDictOptions(**options)

    def save(run, folder):
        if in_the_background:
            return dcp.async_save(_parts(run, options), checkpoint_id=folder / "dcp").result
        dcp.save(_parts(run, options), checkpoint_id=folder / "dcp")
        return None

    def load(run, folder):
        parts = _parts(run, options)
        dcp.load(parts, checkpoint_id=folder / "dcp")
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=options,
        )

    return save, load


def _lerobot():
    def save(run, folder):
        from lerobot.optim import save_optimizer_state

        torch.save(run.model.state_dict(), folder / "model.pt")
        save_optimizer_state(run.optimizer, folder)

    def load(run, folder):
        from lerobot.optim import load_optimizer_state

        run.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        assert load_optimizer_state(run.optimizer, folder) is run.optimizer

    return save, load


ROUTES = {
    "torch.save": (_torch_save, _torch_load),
    "torch.save, into the base": (_torch_save, _base_load),
    "get_optimizer_state_dict": _optimizer_only(),
    "get_optimizer_state_dict, flattened": _optimizer_only(flatten_optimizer_state_dict=True),
    "get_optimizer_state_dict, full": _optimizer_only(full_state_dict=True, cpu_offload=True),
    "dcp.save": _dcp(),
    "dcp.save, flattened": _dcp(flatten_optimizer_state_dict=True),
    "dcp.async_save": _dcp(in_the_background=True),
    "lerobot": _lerobot(),
}


@pytest.fixture(scope="module")
def straight(cache):
    """What a run that was never stopped ends with, by its base."""

    @functools.cache
    def ends_with(base):
        with torch.random.fork_rng():  # another run may be on its way
            return new_run(cache, base).train(0, END).everything()

    return ends_with


@pytest.fixture
def route(request):
    name = request.param
    if name == "lerobot":
        pytest.importorskip("lerobot", reason="pip install 'craft-optim[lerobot]', Python >= 3.12")
    if name == "dcp.async_save":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ROUTES[name]
    if name == "dcp.async_save":
        dist.destroy_process_group()


PAIRED = [base for base in OPTIMIZERS if "lr=None" not in base]  # a cosine of no rate is none
CASES = [(route, base) for route in ROUTES for base in PAIRED]

# What cannot be done, and its words. Where "full" is refused, it is by torch, for the bare base, too.
_NO_STEP_ON_ZEROS = "cannot do a step on gradients that are zero"
_NOT_FLAT = "Flattening optimizer state_dict only supports tensor, int, float, dict states"
_ONLY_TENSORS = "is invalid, expected torch.Tensor"
REFUSED = {
    **{
        (route, base): _NO_STEP_ON_ZEROS
        for route in ROUTES
        for base in ("LBFGS", "AdamWScheduleFreeClosure", "SAM")
        if route.startswith(("get_", "dcp"))
    },
    **{(route, base): _NOT_FLAT for route in ROUTES for base in ("LBFGS", "SOAP") if route.endswith("flattened")},
    **{
        (route, base): "no attribute 'to'"
        for route in ROUTES
        for base in PAIRED
        if route.endswith("flattened") and base.startswith("bitsandbytes")
    },
    **{(route, "Lookahead"): "state" for route in ROUTES if route.startswith(("get_", "dcp"))},
    **{("dcp.async_save", base): "aten.new_empty" for base in PAIRED if base.startswith("torchao")},
    ("get_optimizer_state_dict, full", "SGD"): "Expected device to be set",
    ("get_optimizer_state_dict, full", "Prodigy"): "d_denom",
    ("get_optimizer_state_dict, full", "SOAP"): "Q",
    **{
        ("lerobot", base): _ONLY_TENSORS
        for base in PAIRED
        if base in ("LBFGS", "Prodigy", "SOAP", "transformers.Adafactor") or base.startswith("bitsandbytes")
    },
    **{("lerobot", base): "not JSON serializable" for base in PAIRED if base.endswith("tensor lr")},
    **{("lerobot", base): "invalid python storage" for base in PAIRED if base.startswith("torchao")},
    ("lerobot", "Lookahead"): "param_groups",
    **{("lerobot", base): "keys do not match" for base in ("Lion", "ScheduleFreeAdamW")},
}


def go_on(run, before):
    """What a resumed loop restores besides the model and the optimizer."""
    run.scheduler.load_state_dict(before["scheduler"])
    torch.set_rng_state(before["rng"])
    return run.train(HALF, END).everything()


def _saved_and_resumed(cache, base, route, folder):
    save, load = route
    save(new_run(cache, base).train(0, HALF), folder)
    resumed = new_run(cache, base)
    load(resumed, folder)
    resumed.train(HALF, HALF + 1)  # what torch has left out is missed here


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("route", "base"), CASES, indirect=["route"])
def test_a_resumed_run_is_the_straight_one(cache, straight, tmp_path, route, base, request):
    save, load = route
    if words := REFUSED.get((request.node.callspec.params["route"], base)):
        with pytest.raises(Exception) as refused:
            _saved_and_resumed(cache, base, route, tmp_path)
        assert words in "".join([str(refused.value), *getattr(refused.value, "__notes__", [])])
        return
    if "async" in request.node.name and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 writes tensors in main memory as later steps leave them")
    expected = straight(base)

    first = new_run(cache, base).train(0, HALF)
    before, calls = first.everything(), first.retention.calls
    finish = save(first, tmp_path)
    assert_same(before, first.everything(), "saving has moved something")
    assert first.retention.calls == calls, "saving has run retention"
    assert_same(expected, first.train(HALF, END).everything(), "saved, and gone on")
    if finish is not None:  # what is written in the background is the moment of the call
        finish()

    resumed = new_run(cache, base)
    load(resumed, tmp_path)
    assert resumed.retention.calls == 0, "loading has run retention"
    assert resumed.optimizer.param_groups[0]["craft_anchor_position"] == HALF
    assert resumed.optimizer.param_groups[0]["craft_step"] == HALF
    assert_same(expected, go_on(resumed, before), "resumed")


# -- options: what they keep besides is in the optimizer's state, too --------------------------------------------------


def _two_constraints(closure):
    other = LogitRetention(closure.model, closure.cache, 8, seed=3)
    return {"many": Constraint(closure, 0.01), "few": Constraint(other, 0.02, "ascent")}


def _two_closures(closure):
    return CombinedRetention({"many": closure, "few": LogitRetention(closure.model, closure.cache, 8, seed=3)})


OPTIONS = {
    "every third step": {"retention_every": 3},
    "ascent": {"dual": "ascent"},
    "nupi": {"dual": "nupi"},
    "augmented Lagrangian": {"dual": "augmented_lagrangian"},
    "a schedule": {"epsilon": schedules.Linear(0.02, 0.005, 16)},
    "a clipped norm": {"max_grad_norm": 0.5, "merge": "equal", "projection": "always"},
    "gradients that wait in bfloat16": {"gradient_memory": "bfloat16"},
    "two constraints": {"closures": _two_constraints},
    "two closures under one epsilon": {"closures": _two_closures, "epsilon": 0.01},
}


def _resumed(cache, tmp_path, **options):
    """A straight run and one that was stopped, by torch.save."""
    expected = new_run(cache, **options).train(0, END).everything()
    first = new_run(cache, **options).train(0, HALF)
    before = first.everything()
    _torch_save(first, tmp_path)
    resumed = new_run(cache, **options)
    _torch_load(resumed, tmp_path)
    return expected, go_on(resumed, before)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_resumed_run_is_the_straight_one_with(cache, tmp_path, option):
    expected, resumed = _resumed(cache, tmp_path, **OPTIONS[option])
    assert_same(expected, resumed)
    plain = new_run(cache).train(0, END).everything()
    assert not torch.equal(plain["model"]["5.weight"], expected["model"]["5.weight"]), "the option does something"


def test_a_resumed_run_is_the_straight_one_in_float16(caches, tmp_path):
    expected, resumed = _resumed(caches(torch.float16), tmp_path)
    assert_same(expected, resumed)
    (group,) = resumed["optimizer"]["param_groups"]
    assert group["craft_scale_passes"] == END, "its scale is of the whole run"


NEW_PROCESS = """
import sys
import torch
from runs import new_run
from craft_optim.anchors import AnchorCache
torch.set_num_threads(1)
cache, last, *files = sys.argv[1:]
for file in files:
    saved = torch.load(file, weights_only=True)
    run = new_run(AnchorCache.open(cache), **saved["options"])
    for part in ("model", "optimizer", "scheduler"):
        getattr(run, part).load_state_dict(saved[part])
    torch.set_rng_state(saved["rng"])
    torch.save(run.train(saved["step"], int(last)).everything(), file)
"""


def test_a_run_resumed_in_a_new_process_is_the_straight_one(cache, tmp_path):
    runs = [{}, {"retention_every": 3}]
    files = [tmp_path / f"{number}.pt" for number in range(len(runs))]
    for options, file in zip(runs, files, strict=True):
        saved = new_run(cache, **options).train(0, HALF).everything()
        torch.save(saved | {"options": options, "step": HALF}, file)
    command = [sys.executable, "-c", NEW_PROCESS, str(cache.path), str(END), *map(str, files)]
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(command, env=os.environ | {"PYTHONPATH": here}, check=True)
    for options, file in zip(runs, files, strict=True):
        expected = new_run(cache, **options).train(0, END).everything()
        assert_same(expected, torch.load(file, weights_only=True))


SCHEDULE_FREE = ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "ScheduleFreeAdamW")


@pytest.mark.parametrize("switched", [("eval",), ("eval", "train"), ("train", "eval", "train")], ids=" ".join)
@pytest.mark.parametrize("base", SCHEDULE_FREE)
def test_a_schedule_free_base_is_resumed_whatever_its_mode_was(cache, straight, tmp_path, base, switched):
    """Its average would be lost in silence: a look at its mode before a first step leaves empty entries behind."""
    save, load = ROUTES["dcp.save"]
    first = new_run(cache, base).train(0, HALF)
    before = first.everything()
    save(first, tmp_path)
    resumed = new_run(cache, base)
    for mode in switched:
        getattr(resumed.optimizer, mode)()
    assert not resumed.optimizer.state
    load(resumed, tmp_path)
    assert_same(straight(base), go_on(resumed, before))


@pytest.mark.parametrize("route", ["torch.save", "dcp.save", "get_optimizer_state_dict"])
@pytest.mark.parametrize("base", SCHEDULE_FREE)
def test_what_is_saved_is_the_average_if_it_is_asked_for(cache, tmp_path, base, route):
    """As its authors want it: in eval mode for a checkpoint, in train mode again for what follows."""
    save, load = ROUTES[route]
    first = new_run(cache, base).train(0, HALF)
    stepped = first.model[3].weight.detach().clone()
    first.optimizer.eval()
    assert not torch.equal(stepped, first.model[3].weight)
    before = first.everything()
    save(first, tmp_path)
    first.optimizer.train()
    expected = first.train(HALF, END).everything()
    resumed = new_run(cache, base)
    load(resumed, tmp_path)
    assert_same(before["model"], dict(resumed.model.state_dict()))
    resumed.optimizer.train()
    assert_same(expected, go_on(resumed, before))


@pytest.mark.parametrize("base", SCHEDULE_FREE)
def test_torchs_distributed_checkpoint_may_look_before_train_is_called(cache, base):
    model = network()
    optimizer = CraftOptimizer(make(base)(model.parameters()), LogitRetention(model, cache, 16), epsilon=0.01)
    (group,) = optimizer.param_groups
    before = group["lr"], group["train_mode"]
    get_optimizer_state_dict(model, optimizer)
    assert (group["lr"], group["train_mode"]) == before
    assert_same(dict(network().state_dict()), dict(model.state_dict()))
    optimizer.train()
    for step in range(8):  # RAdam begins with its warm-up
        advance(optimizer, evaluation(model, optimizer, step), "loop")
    assert not torch.equal(network()[3].weight, model[3].weight)


@pytest.mark.parametrize("base", PAIRED)
def test_a_deep_copy_goes_on_as_the_original(cache, straight, base):
    twin, run = new_run(cache, base), new_run(cache, base).train(0, HALF)
    before = run.everything()
    if base == "Lookahead":  # cannot be copied, nor unpickled, without a wrapper either
        with pytest.raises(AttributeError, match="no attribute 'defaults'"):
            copy.deepcopy(run.optimizer)
        return
    twin.model, twin.retention, twin.optimizer = copy.deepcopy((run.model, run.retention, run.optimizer))
    twin.scheduler.optimizer = twin.optimizer
    assert_same(before["model"], dict(twin.model.state_dict()))
    assert twin.optimizer.retention_closure is twin.retention
    assert_same(straight(base), run.train(HALF, END).everything(), "copied, and gone on")
    assert_same(straight(base), go_on(twin, before))


@pytest.mark.parametrize("base", PAIRED)
def test_an_unpickled_optimizer_goes_on_as_the_original(cache, straight, base):
    twin, run = new_run(cache, base), new_run(cache, base).train(0, HALF)
    before = run.everything()
    if base in ("torchao.AdamWFp8", "Lookahead"):  # torch unpickles float8 by torch.load alone
        with pytest.raises(AttributeError, match=r"no attribute '(dtype|defaults)'"):
            pickle.loads(pickle.dumps(run.optimizer))
        return
    twin.model, twin.optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    twin.retention = twin.optimizer.retention_closure = Counted(twin.model, cache, 16)
    twin.scheduler.optimizer = twin.optimizer
    assert_same(straight(base), run.train(HALF, END).everything(), "copied, and gone on")
    assert_same(straight(base), go_on(twin, before))


@pytest.mark.parametrize("how", ["found by itself", "named"])
@pytest.mark.parametrize("base", PAIRED)
def test_what_is_rewound_never_was(cache, straight, base, how):
    run = new_run(cache, base).train(0, HALF)
    before = run.everything()
    bare_base = run.optimizer.base_optimizer
    with rewound(run.model, [run.scheduler, *([bare_base] if how == "named" else [])]):
        Run(run.model, run.retention, bare_base, run.scheduler, run.way).train(HALF, HALF + 3)
        assert not torch.equal(run.model[3].weight, before["model"]["3.weight"])
    assert_same(before, run.everything())
    assert_same(straight(base), run.train(HALF, END).everything())


@pytest.mark.parametrize("base", BASES)
def test_looking_at_an_optimizer_before_its_first_step_moves_nothing(cache, base):
    """torch.distributed.checkpoint steps on zeros then, to have a state to look at: as much as it moves a bare base."""
    other = new_run(cache, base)
    get_optimizer_state_dict(other.model, other.optimizer.base_optimizer)
    expected = other.train(0, HALF).everything()

    run = new_run(cache, base)
    for _ in range(3):
        get_optimizer_state_dict(run.model, run.optimizer)
    assert run.retention.calls == run.optimizer.param_groups[0]["craft_anchor_position"] == 0
    assert run.optimizer.metrics == {}
    assert_same(expected, run.train(0, HALF).everything())


# -- lerobot -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_lerobots_training_state_brings_everything_back(cache, tmp_path, base):
    common = pytest.importorskip("lerobot.common.train_utils", reason="pip install 'craft-optim[lerobot]'")
    first = new_run(cache, base).train(0, HALF)
    common.save_training_state(tmp_path, HALF, first.optimizer, first.scheduler)
    weights = copy.deepcopy(first.model.state_dict())
    expected = first.train(HALF, END).everything()

    resumed = new_run(cache, base)
    resumed.model.load_state_dict(weights)
    step, optimizer, scheduler = common.load_training_state(tmp_path, resumed.optimizer, resumed.scheduler)
    assert (step, optimizer, scheduler) == (HALF, resumed.optimizer, resumed.scheduler)
    assert_same(expected, resumed.train(HALF, END).everything())


def test_lerobot_wants_a_plain_checkpoint_in_the_base_which_is_wrapped_then(cache, tmp_path):
    optim = pytest.importorskip("lerobot.optim", reason="pip install 'craft-optim[lerobot]', Python >= 3.12")
    plain = new_run(cache, wrap=bare).train(0, HALF)
    optim.save_optimizer_state(plain.optimizer, tmp_path)

    wrapped = new_run(cache)
    with pytest.raises(ValueError, match="keys do not match"):
        optim.load_optimizer_state(wrapped.optimizer, tmp_path)

    base = new_run(cache, wrap=bare).optimizer
    optim.load_optimizer_state(base, tmp_path)
    craft = CraftOptimizer(base, wrapped.retention)
    assert_same(plain.optimizer.state_dict()["state"], craft.state_dict()["state"])
    assert craft.param_groups[0]["craft_step"] == 0.0


# -- state dicts of other versions -------------------------------------------------------------------------------------


def _without(*names):
    return lambda group: [group.pop(name) for name in names]


OTHERS_OF_OURS = {
    "before craft_skipped": _without("craft_skipped"),
    "before the float16 scale": _without("craft_scale", "craft_scale_passes"),
    "with more keys": lambda group: group.update(craft_forgotten=3.0, craft_dual_average=1.0),
    "with integers": lambda group: group.update(craft_step=HALF, craft_anchor_position=HALF),
    "with tensors": lambda group: group.update(
        {k: torch.tensor(v, dtype=torch.float64) for k, v in ours(group).items()}
    ),
}


def ours(group):
    return {key: value for key, value in group.items() if key.startswith("craft_")}


@pytest.mark.parametrize("other", OTHERS_OF_OURS)
def test_a_state_dict_of_another_version_of_ours_goes_on(cache, other):
    first = new_run(cache).train(0, HALF)
    before = first.everything()
    expected = first.train(HALF, END).everything()

    saved = copy.deepcopy(before)
    for group in saved["optimizer"]["param_groups"]:
        OTHERS_OF_OURS[other](group)
    resumed = new_run(cache)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    (group,) = resumed.optimizer.param_groups
    assert ours(group) == ours(before["optimizer"]["param_groups"][0])
    assert all(type(value) is float for value in ours(group).values())
    assert_same(expected, go_on(resumed, before))


def test_without_our_keys_lambda_and_step_start_anew_also_in_a_used_optimizer(cache):
    first = new_run(cache).train(0, HALF)
    before = first.everything()
    fresh = ours(new_run(cache).optimizer.param_groups[0])
    plain = copy.deepcopy(before)
    _without(*fresh)(plain["optimizer"]["param_groups"][0])

    results = []
    for used in (False, True):
        run = new_run(cache)
        if used:
            run.train(0, 5)
        run.model.load_state_dict(plain["model"])
        run.optimizer.load_state_dict(copy.deepcopy(plain["optimizer"]))
        assert ours(run.optimizer.param_groups[0]) == fresh
        run.optimizer.param_groups[0]["craft_anchor_position"] = float(HALF)
        results.append(go_on(run, before))
    assert results[0]["optimizer"]["param_groups"][0]["craft_step"] == END - HALF
    assert_same(*results)


OTHERS_OF_TORCH = {
    "AdamW": ["foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"],
    "SGD": ["maximize", "foreach", "differentiable", "fused"],
}


@pytest.mark.parametrize("base", OTHERS_OF_TORCH)
def test_a_state_dict_of_an_older_torch_is_mended_as_the_base_mends_it(cache, base):
    first = new_run(cache, base, wrap=bare).train(0, HALF)
    before = copy.deepcopy(first.model.state_dict()), copy.deepcopy(first.optimizer.state_dict())
    others = [name for name in OTHERS_OF_TORCH[base] if name in first.optimizer.defaults]  # 2.6 has not all of them
    assert len(others) >= 4
    for group in before[1]["param_groups"]:
        _without(*others)(group)
    for state in before[1]["state"].values():
        if "step" in state:
            state["step"] = int(state["step"])
    results = []
    for wrap in (bare, lambda base, *_, **__: CraftOptimizer(base), CraftOptimizer):
        run = new_run(cache, base, wrap=wrap)
        run.model.load_state_dict(before[0])
        run.optimizer.load_state_dict(copy.deepcopy(before[1]))
        (group,) = run.optimizer.param_groups
        if "craft_anchor_position" in group:
            group["craft_anchor_position"] = float(HALF)
        run.train(HALF, END)
        group = {k: v for k, v in group.items() if k != "params" and not k.startswith("craft_")}
        assert set(others) <= set(group)
        results.append(([p.detach() for p in run.model.parameters()], group))
    assert_same(results[0], results[1])
    assert_same(results[0][1], results[2][1])


@pytest.mark.parametrize("named_then", [False, True])
@pytest.mark.parametrize("named_now", [False, True])
def test_parameter_names_in_state_dicts_are_treated_as_the_base_treats_them(named_then, named_now):
    def optimizer(named, wrap):
        model = network()
        return wrap(torch.optim.AdamW(model.named_parameters() if named else model.parameters()))

    saved = optimizer(named_then, CraftOptimizer).state_dict()
    assert ("param_names" in saved["param_groups"][0]) == named_then
    results = []
    for wrap in (lambda base: base, CraftOptimizer):
        loading = optimizer(named_now, wrap)
        loading.load_state_dict(saved)
        results.append(loading.state_dict()["param_groups"])
    assert_same(*results)
