"""pi0_fast in its real configuration, but for few and narrow layers: trained, saved, resumed, measured."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import real_size
import torch
from real_size import BACKBONE, CAMERAS, CLASSES, SIDE
from training import arguments, assert_same_run, copied, replaced, resume, rows, train

from craft_optim.anchors import AnchorCache
from craft_optim.cli import main
from craft_optim.lerobot import adapter_for
from craft_optim.lerobot.pretrained import load_policy

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from peak_memory import peak_bytes

PICTURES = len(CAMERAS) * 3 * SIDE * SIDE


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the policy, of the data of the old task, and of a run on the new one."""
    folder = tmp_path_factory.mktemp("real")
    old, new = (real_size.record(folder / name, f"Put the {name} one away", i) for i, name in enumerate(("old", "new")))
    policy = real_size.checkpoint(folder / "policy", old)
    anchors = [f"--craft.anchors.root={old}", "--craft.anchors.count=10", "--craft.anchors.heldout=0.5",
               "--craft.anchors.batch_size=4", "--craft.batch_size=2", "--craft.drift_anchors=2"]  # fmt: skip
    given = arguments(policy, folder / "run", f"--dataset.root={new}", "--batch_size=1", *anchors, steps=2)
    train("pi0_fast", policy, *given)
    return policy, old, folder / "run"


def test_a_resumed_run_is_the_run_that_never_stopped(trained, tmp_path):
    policy, _, run = trained
    assert rows(run)[0]["retention_loss"] == pytest.approx(0.0, abs=1e-4)
    assert rows(run)[-1]["drift_anchors"] > 0.0
    stopped = copied(run, tmp_path / "stopped", until=1)
    train("pi0_fast", policy, *resume(stopped, 1))
    assert_same_run(run, stopped, 2)


def test_an_anchor_takes_little_beside_its_pictures(trained):
    _, _, run = trained
    cache = AnchorCache.open(run / "craft" / "anchors")
    (output,) = cache.features.outputs.values()
    assert (output.size, cache.features.top_k_of(output)) == (CLASSES, 64)
    features = cache.read(range(len(cache))).features
    positions = features["mask"].sum(1)
    assert positions.min() > 40
    each = cache.nbytes / len(cache) - PICTURES
    assert each <= 100e3
    # All classes of a position of a chunk of 255 tokens would be a thousand times as much
    assert each - 386 * positions.float().mean() < 10e3


def test_a_pass_holds_no_logits_and_drift_is_measured(trained, capsys):
    _, _, run = trained
    with replaced():
        import_module("small_pi0_fast")
        final = run / "checkpoints" / "last" / "pretrained_model"
        model = load_policy(str(final), "cpu")
        cache = AnchorCache.open(run / "craft" / "anchors")
        retention = adapter_for(model).retention(model, cache, batch_size=2, workers=0)
        retention.loss(0)  # the first pass asks the model about its head
        trained_weights = [p for p in model.parameters() if p.requires_grad]

        def run_pass():
            torch.autograd.grad(retention.loss(1), trained_weights, allow_unused=True)

        positions = int(cache.read(range(2)).features["mask"].sum())
        logits, head = 4 * CLASSES * positions, 4 * CLASSES * BACKBONE.width
        beside = 2 * head  # gradients of the head and of the embedding
        assert peak_bytes(run_pass) - beside <= 0.3 * logits
        capsys.readouterr()
        given = [f"--policy.path={final}", "--count=2", "--batch-size=2", "--json"]
        assert main(["drift", str(run / "craft" / "anchors"), *given]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert found["drift"]["logits"]["mean"] == pytest.approx(rows(run)[-1]["drift_anchors"], rel=1e-3)
