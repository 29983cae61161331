"""Stop and resume in a new process: 50 steps, save, load, 50 more are 100 steps straight, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from torch import nn
from craft_optim import CraftOptimizer, anchors

first, last, load, save, cache_path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
torch.manual_seed(7)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
generator = torch.Generator().manual_seed(3)
inputs = torch.randn(40, 6, generator=generator)
cache = anchors.build(model, inputs.split(10), cache_path, progress=False)
retention = anchors.LogitRetention(model, cache, batch_size=12)
base = torch.optim.AdamW(model.parameters(), lr=1e-2)
optimizer = CraftOptimizer(base, retention, epsilon=0.02, retention_every=int(sys.argv[6]))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
if load != "-":
    saved = torch.load(load, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"])
for step in range(first, last):
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=g), torch.randint(4, (16,), generator=g)
    loss = nn.functional.cross_entropy(model(x), y)  # dropout draws from the global generator
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state()}, save)
"""


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, *map(str, arguments)], check=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("every", [1, 3])
def test_fifty_and_fifty_steps_are_a_hundred(tmp_path: Path, every: int) -> None:
    cache = tmp_path / "anchors"
    run(0, 100, "-", tmp_path / "straight.pt", cache, every)
    run(0, 50, "-", tmp_path / "half.pt", cache, every)
    run(50, 100, tmp_path / "half.pt", tmp_path / "resumed.pt", cache, every)
    straight = torch.load(tmp_path / "straight.pt", weights_only=True)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert_same(straight, resumed)
    group = straight["optimizer"]["param_groups"][0]
    assert group["craft_step"] == 100.0
    assert group["craft_anchor_position"] == len(range(0, 100, every))
    assert group["craft_lambda"] > 0.0
