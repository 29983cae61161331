"""Policies and preprocessors from checkpoints: whole ones, and adapters on another."""

import json
import sys

import pytest
import small
import torch
from lerobot.policies.factory import make_pre_post_processors
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file

from craft_optim.lerobot import adapter_for, load_config, load_policy, load_preprocessor

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapted(tmp_path):
    """An ACT in one folder; in another, as lerobot-train --peft writes them, its adapters and its own action head."""
    policy = small.build("act", tmp_path, **small.features(small.TOP)).eval()
    policy.save_pretrained(tmp_path / "base")
    policy.config.pretrained_path = tmp_path / "base"
    wrapped = policy.wrap_with_peft(
        peft_cli_overrides={"target_modules": ["linear1", "linear2"], "full_training_modules": ["action_head"], "r": 2}
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    folder = tmp_path / "adapters"
    wrapped.save_pretrained(folder, state_dict=None)
    wrapped.config.save_pretrained(folder)
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(folder)
    return folder, wrapped


def observations():
    generator = torch.Generator().manual_seed(1)
    return {
        small.TOP: torch.rand(2, 3, small.IMAGE, small.IMAGE, generator=generator),
        "observation.state": torch.rand(2, 4, generator=generator),
    }


def test_adapters_are_merged_into_their_policy(adapted):
    folder, wrapped = adapted
    plain = load_policy(str(folder.parent / "base"), "cpu")
    policy = load_policy(str(folder), "cpu")
    assert [name for name, _ in policy.named_modules()] == [name for name, _ in plain.named_modules()]
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }
    assert not policy.training
    with torch.no_grad():
        expected = wrapped.eval().base_model.model.predict_action_chunk(observations())
        found = policy.predict_action_chunk(observations())
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, plain.predict_action_chunk(observations()), atol=0.1)
    assert adapter_for(policy).layers == adapter_for(plain).layers
    assert adapter_for(policy).frozen == adapter_for(plain).frozen


def test_a_merged_policy_is_saved_as_a_whole_one(adapted, tmp_path):
    policy = load_policy(str(adapted[0]), "cpu")
    policy.save_pretrained(tmp_path / "merged")
    again = load_policy(str(tmp_path / "merged"), "cpu")
    with torch.no_grad():
        assert torch.equal(again.predict_action_chunk(observations()), policy.predict_action_chunk(observations()))


def rewrite(file, change):
    read = json.loads(file.read_text())
    change(read)
    file.write_text(json.dumps(read))


def test_adapters_without_a_policy(adapted):
    folder, _ = adapted
    rewrite(folder / "adapter_config.json", lambda config: config.update(base_model_name_or_path=None))
    with pytest.raises(ValueError, match=r"do not say which model they belong to.*base_model_name_or_path"):
        load_policy(str(folder), "cpu")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("change", ["missing", "other", "unused", "shape", "none"])
def test_adapters_that_are_not_the_policys(adapted, change):
    folder, _ = adapted
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "lora_A" in name)
    if change in ("missing", "other"):
        weights.pop(name)
    if change in ("unused", "other"):
        weights[name.replace("layers.0", "layers.9")] = torch.zeros(2, 2)
    if change == "shape":
        weights[name] = weights[name][:, :1].contiguous()
    save_file({} if change == "none" else weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"The adapters in .* do not fit their model \(.*(layers|action_head)"):
        load_policy(str(folder), "cpu")


def test_adapters_that_cannot_be_merged(adapted, monkeypatch):
    monkeypatch.delattr(BaseTuner, "merge_and_unload")
    with pytest.raises(ValueError, match=r"Adapters as in .*\(LoraModel\) cannot be merged.*--factory"):
        load_policy(str(adapted[0]), "cpu")


def test_adapters_need_peft(adapted, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"holds adapters, which need peft.*pip install peft"):
        load_policy(str(adapted[0]), "cpu")


def test_weights_that_are_not_the_policys(adapted):
    base = adapted[0].parent / "base" / "model.safetensors"
    base.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"cannot be read.*copy them anew"):
        load_policy(str(adapted[0]), "cpu")


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder '.*/none', and it is no hub id, such as you/policy"):
        load_config(str(tmp_path / "none"))


def test_a_preprocessor_needs_no_weights(adapted):
    folder, _ = adapted
    (folder.parent / "base" / "model.safetensors").unlink()
    batch = load_preprocessor(load_config(str(folder)), str(folder), "cpu")(observations())
    assert torch.equal(batch["observation.state"], observations()["observation.state"])
