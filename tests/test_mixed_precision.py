"""GradScaler and autocast around a CraftOptimizer."""

import copy

import pytest
import torch
from torch import nn

from craft_optim import CraftOptimizer, anchors


def build(tmp_path, fused=False, autocast=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    reading = anchors.Reading(autocast=autocast)
    cache = anchors.build(model, torch.randn(60, 5).split(20), tmp_path, reading, dtype=torch.float32, class_dim=-1)
    retention = anchors.LogitRetention(model, cache, 16)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    return model, retention, CraftOptimizer(base, retention, epsilon=0.01)


def loss_of(model, step):
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x).float(), x[:, :4].argmin(1))


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_changes_no_decision(tmp_path, fused):
    # The scale is a power of two: gradients are the same bits after unscaling, and so is everything that follows.
    results, metrics = [], []
    for scale in (None, 2.0**14):
        model, _, optimizer = build(tmp_path / str(scale), fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        torch.manual_seed(1)
        for step in range(12):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(parameters(model))
        metrics.append(optimizer.metrics)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_everything_in_phase(tmp_path, fused):
    # One run has an overflow between its steps, the other never had that step.
    results = []
    for overflow in (False, True):
        model, _, optimizer = build(tmp_path / str(overflow), fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(8):
            if overflow and step == 4:
                rng, groups = torch.get_rng_state(), copy.deepcopy(optimizer.state_dict()["param_groups"])
                optimizer.zero_grad()
                with torch.random.fork_rng([]):
                    scaler.scale(loss_of(model, 99) * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update()
                assert optimizer.state_dict()["param_groups"] == groups
                assert torch.equal(torch.get_rng_state(), rng)
                assert optimizer.param_groups[0]["craft_anchor_position"] == 4
                assert scaler.get_scale() == 2.0**9
            torch.manual_seed(step)
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unscaling_and_clipping_before_the_step(tmp_path):
    model, _, optimizer = build(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics["task_grad_norm"] == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_forward_and_in_the_retention_pass(tmp_path, dtype):
    model, retention, optimizer = build(tmp_path, autocast=dtype)
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        assert not torch.is_autocast_enabled("cpu")
    assert optimizer.metrics["skipped"] == 0.0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert retention.drift() < 0.03
