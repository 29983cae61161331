"""Plans of lerobot's policies: by their configs alone, and against real steps of a small one."""

import json
import sys
from pathlib import Path

import pytest
import small
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # for `planned_peaks`

from craft_optim import plan
from craft_optim.cli import main
from craft_optim.lerobot import adapter_for
from craft_optim.lerobot.shapes import batch_of_shapes, plan_settings, policy_without_weights

PROMISED = 0.15


def test_a_small_pi0_fast_planned_and_measured(tmp_path):
    from planned_peaks import CASES, HELD, planned, real_peak

    case = CASES["small pi0_fast"]()
    found = planned(case)
    for held in HELD:
        assert found.peak(held) == pytest.approx(real_peak(case, tmp_path / "cache", held), rel=PROMISED), held
    written = (tmp_path / "cache" / "shard-00000.safetensors").stat().st_size
    assert 8 * found.per_anchor == pytest.approx(written, rel=0.02)
    assert found.phases.left_out


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_a_small_flow_policy_planned_and_measured(name, tmp_path):
    from planned_peaks import HELD, Case, real_peak

    def make():
        torch.manual_seed(0)
        return small.pi(name)

    policy = make()
    adapter = adapter_for(policy)
    shapes = batch_of_shapes(policy.config, 8)
    batch = {key: (4 * torch.rand(x.shape)).to(x.dtype) for key, x in shapes.items()}
    batch["action_is_pad"] = torch.zeros(8, small.CHUNK, dtype=torch.bool)
    case = Case(
        make=make,
        batch=lambda: {key: x.clone() for key, x in batch.items()},
        anchor_batch=lambda: adapter.inputs(batch),
        loss=lambda model, given: model(given)[0],
        build={"reading": adapter.reading, "output": None, "layers": adapter.layers},
    )
    found = plan(policy, batch, adapter.inputs(batch), base=case.base, **plan_settings(adapter))
    for held in HELD:
        assert found.peak(held) == pytest.approx(real_peak(case, tmp_path / "cache", held), rel=PROMISED), held


def test_the_real_pi0_is_planned_without_weights():
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    state, action = PolicyFeature(FeatureType.STATE, (7,)), PolicyFeature(FeatureType.ACTION, (7,))
    camera = PolicyFeature(FeatureType.VISUAL, (3, 480, 640))
    seen = {"observation.images.top": camera, "observation.state": state}
    policy = policy_without_weights(PI0Config(input_features=seen, output_features={"action": action}))
    assert 4.0e9 < sum(p.numel() for p in policy.parameters()) < 4.1e9
    batch = batch_of_shapes(policy.config, 2)
    assert batch["action"].shape == (2, 50, 7)
    anchors = adapter_for(policy).inputs(batch)
    assert anchors["anchor.noise"].shape == (2, 50, 32)
    assert all(x.is_meta for x in anchors.values())


@pytest.fixture
def real_config():
    """pi0_fast as lerobot has it: PaliGemma 3B, three cameras of 224 pixels."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

    cameras = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for name in ("a", "b", "c")
    }
    return PI0FastConfig(device="cpu", dtype="bfloat16", input_features=cameras)


def test_the_real_pi0_fast_is_made_without_weights_or_tokenizers(real_config):
    policy = policy_without_weights(real_config)
    assert 3.4e9 < sum(p.numel() for p in policy.parameters()) < 3.5e9
    assert all(p.is_meta for p in policy.parameters())
    batch = batch_of_shapes(policy.config, 2)
    assert {key: tuple(x.shape) for key, x in batch.items()} == {
        **{f"observation.images.{name}": (2, 3, 224, 224) for name in ("a", "b", "c")},
        "observation.language.tokens": (2, 200),
        "observation.language.attention_mask": (2, 200),
        "action.tokens": (2, 256),
        "action.token_mask": (2, 256),
    }
    assert adapter_for(policy).inputs(batch).keys() == batch.keys()


def test_the_command_reads_the_config_alone(pi0_fast, capsys):
    (pi0_fast / "model.safetensors").unlink()
    options = ["--batch-size=4", "--anchor-batch-size=2", "--top-k=16", "--valid=0.5", "--gpu", "24", "80"]
    assert main(["plan", f"--policy.path={pi0_fast}", *options]) == 0
    said = capsys.readouterr().out
    for words in (
        "Batches of 4, 2 anchors per pass",
        "GPUs of 24 GiB",
        "the head runs in pieces",
        f"craft-optim build-anchors anchors/ --policy.path={pi0_fast} --dataset.repo_id=OLD_TASK --count=512",
    ):
        assert words in said, words


def test_passes_are_as_large_as_in_training(pi0_fast, capsys):
    assert main(["plan", f"--policy.path={pi0_fast}", "--batch-size=32"]) == 0
    assert "Batches of 32, 16 anchors per pass" in capsys.readouterr().out


def test_dtype_is_the_policys_own(pi0_fast, capsys):
    """Vision and norms stay in float32."""
    found = []
    for dtype in ("float32", "bfloat16"):
        assert main(["plan", f"--policy.path={pi0_fast}", "--batch-size=1", f"--dtype={dtype}", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["weights"])
    assert found[0] / 2 < found[1] < found[0]


def test_adapters_alone_are_refused(pi0_fast, capsys):
    about = json.loads((pi0_fast / "config.json").read_text())
    (pi0_fast / "config.json").write_text(json.dumps(about | {"use_peft": True}))
    with pytest.raises(SystemExit):
        main(["plan", f"--policy.path={pi0_fast}"])
    assert "holds adapters alone" in capsys.readouterr().err


def test_act_too(act, capsys):
    (act / "model.safetensors").unlink()
    assert main(["plan", f"--policy.path={act}", "--batch-size=2"]) == 0
    assert "peak with retention" in capsys.readouterr().out


def test_other_policies_are_told_what_to_do():
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    with pytest.raises(ValueError, match=r"act, pi0, pi05, pi0_fast. Found diffusion: give a function .* --factory"):
        policy_without_weights(DiffusionConfig(device="cpu"))


def test_pi0_fast_trains_what_is_not_frozen(pi0_fast):
    """A frozen vision tower needs neither gradients nor a copy."""
    from craft_optim.lerobot.pretrained import load_config

    policy = policy_without_weights(load_config(str(pi0_fast)))
    batch, adapter = batch_of_shapes(policy.config, 2), adapter_for(policy)

    def planned():
        return plan(policy, batch, adapter.inputs(batch), **plan_settings(adapter))

    whole = planned()
    tower = policy.model.paligemma_with_expert.paligemma.model.vision_tower
    size = sum(p.numel() for p in tower.requires_grad_(False).parameters())
    part = planned()
    assert part.trained == whole.trained - size
    assert part.phases.gradients == whole.phases.gradients - 4 * size
    assert torch.is_grad_enabled()
