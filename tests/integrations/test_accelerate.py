"""A loop with Accelerate around it is the plain loop, bit for bit: precision, accumulation, clipping, checkpoints."""

import contextlib

import pytest
import torch
from runs import assert_same, batch, new_run
from torch import nn

from craft_optim import CraftOptimizer

accelerate = pytest.importorskip("accelerate", reason="pip install --group integrations")
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.scheduler import AcceleratedScheduler  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture
def accelerator():
    """Makes one; they share state within a process, which is cleared before and after each."""

    def make(**kwargs):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **kwargs)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loader(batches):
    return torch.utils.data.DataLoader([batch(step) for step in range(batches)], batch_size=None)


def plain(run, batches, accumulate=1, clip=None, autocast=None):
    """The loop that Accelerate is to reproduce. At the end of the data it steps on what there is."""
    for i, (x, y) in enumerate(loader(batches), start=1):
        with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
            logits = run.model(x)
        (nn.functional.cross_entropy(logits.float(), y) / accumulate).backward()
        if i % accumulate and i != batches:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
    return run


def accelerated(run, accelerator, batches, clip=None):
    """The same with the objects that `prepare` returns."""
    model, optimizer, data, scheduler = accelerator.prepare(run.model, run.optimizer, loader(batches), run.scheduler)
    assert optimizer.optimizer is run.optimizer  # where its metrics are
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return run


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_trains_as_the_plain_loop_does(caches, accelerator, precision, accumulate, clip):
    autocast = torch.bfloat16 if precision == "bf16" else None
    expected = plain(new_run(caches(autocast)), 14, accumulate, clip, autocast).everything()

    tool = accelerator(mixed_precision=precision, gradient_accumulation_steps=accumulate)
    found = accelerated(new_run(caches(autocast)), tool, 14, clip)
    steps = -(-14 // accumulate)
    assert found.retention.calls == steps, "retention runs once for all micro-batches of a step"
    assert found.optimizer.param_groups[0]["craft_step"] == steps
    if clip is not None:
        assert found.optimizer.metrics["task_grad_norm"] == pytest.approx(clip, rel=1e-3)
    # The rates are in the optimizer's groups; the scheduler's own counter has the micro-batches as well.
    assert_same(expected | {"scheduler": None}, found.everything() | {"scheduler": None})


def test_the_forward_that_prepare_has_patched_puts_the_retention_pass_into_bf16(cache, accelerator):
    run = new_run(cache)
    seen = []
    run.model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    accelerated(run, accelerator(mixed_precision="bf16"), 2)
    assert seen == [torch.bfloat16] * 2 * (2 + 4), (
        "of each step the task's, the pass, and two looks before and after it"
    )
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("base", ["AdamW", "SGD", "Adafactor"])
def test_save_state_and_load_state_into_fresh_objects(cache, accelerator, tmp_path, base):
    first = new_run(cache, base)
    tool = accelerator()
    accelerated(first, tool, 9)
    before = first.everything()
    tool.save_state(tmp_path)
    assert_same(before, first.everything(), "saving has moved something")
    expected = first.train(9, 15).everything()

    resumed = new_run(cache, base)
    torch.manual_seed(99)  # Accelerate brings the generator back, too
    tool = accelerator()
    tool.prepare(resumed.model, resumed.optimizer, resumed.scheduler)
    tool.load_state(tmp_path)
    assert resumed.retention.calls == 0
    group = resumed.optimizer.param_groups[0]
    assert group["craft_anchor_position"] == group["craft_step"] == 9
    assert_same(expected, resumed.train(9, 15).everything())


def test_a_step_that_the_scaler_skips_leaves_everything_in_phase(cache, accelerator):
    """On a CPU Accelerate makes no scaler, but its optimizer takes one."""
    results = []
    for overflow in (False, True):
        accelerator()
        run = new_run(cache)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = AcceleratedOptimizer(run.optimizer, scaler=scaler)
        scheduler = AcceleratedScheduler(run.scheduler, optimizer)
        for step in range(8):
            for broken in (True, False) if overflow and step == 4 else (False,):
                rng, before = torch.get_rng_state(), run.everything()
                x, y = batch(step)
                loss = nn.functional.cross_entropy(run.model(x), y)
                scaler.scale(loss * torch.inf if broken else loss).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                assert optimizer.step_was_skipped == broken
                assert run.retention.calls == step + (not broken)
                if broken:
                    torch.set_rng_state(rng)
                    assert_same(before, run.everything())
        results.append(run.everything())
        assert scaler.get_scale() == 2.0 ** (9 if overflow else 10)
    assert_same(*results)


def test_what_prepare_returns_is_not_wrapped(cache, accelerator):
    run = new_run(cache)
    prepared = accelerator().prepare(torch.optim.AdamW(run.model.parameters()))
    with pytest.raises(TypeError, match=r"Found AcceleratedOptimizer.*accelerator\.prepare"):
        CraftOptimizer(prepared, run.retention)


def test_train_and_eval_go_through_both_wrappers(cache, accelerator):
    schedulefree = pytest.importorskip("schedulefree", reason="pip install --group integrations")
    tool = accelerator()
    run = new_run(cache)
    tool.prepare(run.optimizer).train()  # a base without modes does not mind
    craft = CraftOptimizer(schedulefree.AdamWScheduleFree(run.model.parameters()), run.retention)
    optimizer = tool.prepare(craft)
    for mode in (True, False):
        optimizer.train() if mode else optimizer.eval()
        assert craft.param_groups[0]["train_mode"] is mode
