"""Lightning's loops, which step with a closure, are the plain loop, bit for bit."""

import contextlib

import pytest
import torch
from runs import assert_same, batch, new_run
from torch import nn

from craft_optim import CraftOptimizer

lightning = pytest.importorskip("lightning.pytorch", reason="pip install --group integrations")
import quiet_lightning  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*does not have many workers")

BATCHES = 7  # an odd number: of two micro-batches the last step has only one


def seed_for(epoch, i):
    torch.manual_seed(100 * epoch + i)  # of the dropout masks: Lightning does not save the generator


class Module(lightning.LightningModule):
    def __init__(self, run, scheduled=True, automatic=True, skipped=()):
        super().__init__()
        self.run, self.model, self.scheduled, self.skipped = run, run.model, scheduled, skipped
        self.automatic_optimization = automatic

    def configure_optimizers(self):
        if not self.scheduled:
            return self.run.optimizer
        return {
            "optimizer": self.run.optimizer,
            "lr_scheduler": {"scheduler": self.run.scheduler, "interval": "step"},
        }

    def training_step(self, data, i):
        if i in self.skipped:
            return None
        x, y = data
        seed_for(self.current_epoch, i)
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()
        assert optimizer.optimizer is self.run.optimizer
        assert optimizer.metrics is self.run.optimizer.metrics
        return None


def fit(run, folder, epochs=1, load=None, scheduled=True, automatic=True, skipped=(), **trainer):
    module = Module(run, scheduled, automatic, skipped)
    return quiet_lightning.fit(module, [batch(i) for i in range(BATCHES)], folder, epochs, load, **trainer)


def plain(run, accumulate=1, clip=None, autocast=None, scaler=None, scheduled=True):
    """One epoch of what Lightning is to reproduce."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    run.optimizer.zero_grad()
    for i in range(BATCHES):
        x, y = batch(i)
        seed_for(0, i)
        with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(run.model(x), y)
        scaler.scale(loss / accumulate).backward()
        if (i + 1) % accumulate and i + 1 != BATCHES:
            continue
        scaler.unscale_(run.optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        if scheduled:
            run.scheduler.step()
    return run


PRECISIONS = {"32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_trains_as_the_plain_loop_does(caches, tmp_path, precision, accumulate, clip):
    autocast = PRECISIONS[precision]

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "16-mixed" else None

    expected = plain(new_run(caches(autocast)), accumulate, clip, autocast, scaler()).everything()

    run = new_run(caches(autocast))
    how = {"precision": precision}
    if precision == "16-mixed":  # of the name alone Lightning makes bf16 on a CPU
        how = {"plugins": [MixedPrecision(precision, "cpu", scaler())]}
    trainer = fit(run, tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **how)
    assert run.retention.calls == run.optimizer.param_groups[0]["craft_step"] == trainer.global_step
    assert trainer.global_step == -(-BATCHES // accumulate)
    if clip is not None:  # Lightning clips the task gradient, before retention joins it
        assert run.optimizer.metrics["task_grad_norm"] == pytest.approx(clip, rel=1e-3)
    assert_same(expected | {"rng": None}, run.everything() | {"rng": None})


def test_without_a_scheduler_the_optimizer_alone_is_returned(cache, tmp_path):
    expected = plain(new_run(cache), scheduled=False).everything()
    run = new_run(cache)
    fit(run, tmp_path, scheduled=False)
    assert_same(expected | {"rng": None}, run.everything() | {"rng": None})


def test_manual_optimisation(cache, tmp_path):
    expected = plain(new_run(cache)).everything()
    run = new_run(cache)
    fit(run, tmp_path, automatic=False)
    assert_same(expected | {"rng": None}, run.everything() | {"rng": None})
    assert all(p.grad is not None for p in run.model.parameters()), "the task gradients are there after the step"


@pytest.mark.parametrize("base", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_run_resumed_from_a_checkpoint_is_the_straight_one(caches, tmp_path, base, precision):
    def begin():
        return new_run(caches(PRECISIONS[precision]), base)

    straight = begin()
    fit(straight, tmp_path, epochs=3, precision=precision)
    expected = straight.everything()

    first = begin()
    fit(first, tmp_path, epochs=2, precision=precision).save_checkpoint(tmp_path / "run.ckpt")
    resumed = begin()
    fit(resumed, tmp_path, epochs=3, load=tmp_path / "run.ckpt", precision=precision)
    assert resumed.retention.calls == BATCHES
    group = resumed.optimizer.param_groups[0]
    assert group["craft_anchor_position"] == group["craft_step"] == 3 * BATCHES
    assert_same(expected, resumed.everything())


def test_batches_that_training_step_leaves_out_run_no_retention(cache, tmp_path):
    run = new_run(cache)
    fit(run, tmp_path, skipped=(2, 3))
    assert run.retention.calls == BATCHES - 2
    assert run.optimizer.param_groups[0]["craft_step"] == BATCHES


def test_what_lightning_hands_out_is_not_wrapped(cache, tmp_path):
    run = new_run(cache)

    class Wrapping(lightning.Callback):
        def on_train_start(self, trainer, module):
            with pytest.raises(TypeError, match=r"Found LightningCraftOptimizer.*configure_optimizers"):
                CraftOptimizer(module.optimizers(), run.retention)

    fit(run, tmp_path, callbacks=[Wrapping()])
