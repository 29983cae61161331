"""Passes of models that drop by functional calls, whole layers, or by their config, with and without checkpointing."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim import CraftOptimizer
from craft_optim.anchors import LogitRetention, build, passes

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24, "layerdrop": 0.5}.items()
}
BART = {"vocab_size": 40, "d_model": 16, "dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3} | SIDES
SPEECH = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_mel_bins": 4}
MASKED = {"mask_time_prob": 0.5, "mask_time_length": 2, "mask_feature_prob": 0.5, "mask_feature_length": 2}
OPT = {"word_embed_proj_dim": 16, "ffn_dim": 24, "dropout": 0.3, "layerdrop": 0.5, "max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT": ("OPTForCausalLM", SMALL | OPT),
    "Bart": ("BartForConditionalGeneration", BART | {"max_position_embeddings": 32}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        BART | SPEECH | MASKED | {"apply_spec_augment": True, "max_source_positions": 8, "max_target_positions": 16},
    ),
    "T5": ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2,
           "num_heads": 2, "dropout_rate": 0.3, "decoder_start_token_id": 0}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "Llama": ("LlamaForCausalLM", SMALL | {"attention_dropout": 0.3}),
    "Falcon": ("FalconForCausalLM", SMALL | {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "Mixtral": ("MixtralForCausalLM", SMALL | {"router_jitter_noise": 0.3, "attention_dropout": 0.3,
                "num_key_value_heads": 2, "num_local_experts": 2}),
}  # fmt: skip


def model_and_anchors(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes)).train()
    ids = torch.randint(3, 40, (8, 6))
    if name == "Whisper":
        return model, {"input_features": torch.randn(8, 4, 16), "decoder_input_ids": ids}
    if model.config.is_encoder_decoder:
        return model, {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def everything(model: nn.Module) -> list[Any]:
    """Modes, numbers and configs, as they are to be again."""
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, bool | int | float)} for m in model.modules()]
    return [numbers, copy.deepcopy(vars(model).get("config"))]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_is_the_model_without_noise(name: str, checkpointing: bool | None, tmp_path: Path) -> None:
    model, anchors = model_and_anchors(name)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    before = everything(model)
    call = {**anchors, "use_cache": False}
    assert not torch.equal(model(**call).logits, model(**call).logits), "without noise this shows nothing"
    with passes.steady(model) as remember:
        logits = model(**call).logits
        loss = remember(logits.square().mean())
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert everything(model) == before
    model.zero_grad()
    expected = model.eval()(**call).logits
    assert torch.equal(logits, expected)
    expected.square().mean().backward()
    assert found.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for n, p in model.named_parameters():
        if n in found:
            torch.testing.assert_close(found[n], p.grad)

    model.zero_grad()
    model.train()
    cache = build(model, [anchors], tmp_path)
    retention = LogitRetention(model, cache, 4, strict=False)
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), retention)
    for place in (0, 5):  # the first step, and one of a run that is taken up there
        state = optimizer.state_dict()
        state["param_groups"][0]["craft_anchor_position"] = float(place)
        optimizer.load_state_dict(state)
        model(**call).logits.square().mean().backward()
        optimizer.step()
        assert abs(optimizer.metrics["retention_loss"]) < 1e-5
    assert everything(model) == before


class Reads(nn.Module):
    """Drops as its config says, in a frozen namespace or not."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), self.config.hidden_dropout, self.training)


def test_what_is_read_of_a_config(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Frozen:
        hidden_dropout: float = 0.5
        drop_last: bool = True
        drop_n_last_frames: int = 7

    x = torch.ones(3, 4)
    for config in (Frozen(), SimpleNamespace(hidden_dropout=0.5, drop_last=True, drop_n_last_frames=7)):
        model = Reads(config)
        expected = copy.deepcopy(model).eval()(x)
        with passes.steady(model):
            assert torch.equal(model(x), expected)
            assert (config.hidden_dropout, config.drop_last, config.drop_n_last_frames) == (0.0, True, 7)
        assert (config.hidden_dropout, config.drop_last, config.drop_n_last_frames) == (0.5, True, 7)
        with pytest.raises(RuntimeError, match="stop"), passes.steady(model):
            raise RuntimeError("stop")
        assert config.hidden_dropout == 0.5
        model.eval()
        with passes.steady(model) as remember:
            assert config.hidden_dropout == 0.5
            loss = model(x).sum()
            assert remember(loss) is loss
