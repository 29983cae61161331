"""TRL's trainers with CraftOptimizer: they train, log, stop and resume as without."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same
from torch import nn

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
import toys  # noqa: E402

from craft_optim import CraftOptimizer  # noqa: E402
from craft_optim.anchors import AnchorCache, OnlineRetention, Reading  # noqa: E402
from craft_optim.dual import DualAscent  # noqa: E402
from craft_optim.transformers import CraftCallback, chat_anchors, craft_optimizer  # noqa: E402

INACTIVE = {"epsilon": 1e6, "dual": DualAscent(0.0), "projection": "never", "retention_every": 1}
WORDS = ["no", "no, it is cold", "blue", "a green button", "a red drawer", "it is a drawer", "cold", "the sky"]
# As `toys.CHAT`, and it says which tokens are the assistant's
TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ '<eos>' }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def words(question: str, answers: list[str]) -> list[dict[str, Any]]:
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": word}] for word in answers]
    return [{"messages": messages} for messages in turns]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = toys.tokenizer(bos=False)
    made.chat_template = TEMPLATE
    return made


def model(tokenizer: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.1, **sizes, **special)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def cache(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> AnchorCache:
    """What the model says to another question."""
    folder = tmp_path_factory.mktemp("anchors")
    return chat_anchors(model(tokenizer), tokenizer, words("is ice hot?", WORDS), folder, dtype=torch.float32)


def trained(
    tokenizer: Any,
    folder: Path,
    retention: Any = None,
    craft: dict[str, Any] | None = None,
    *,
    resume: bool = False,
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    """An SFTTrainer after its run; without `craft` a plain one."""
    given = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3,
        "logging_steps": 1, "save_steps": 3, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "max_length": 64,
    }  # fmt: skip
    args = trl.SFTConfig(**given | settings)
    more: dict[str, Any] = {}
    if craft is not None:
        more["optimizer_cls_and_kwargs"] = craft_optimizer(args, retention, **craft)
        more["callbacks"] = [CraftCallback()]
    trainer = trl.SFTTrainer(
        model(tokenizer),
        args,
        train_dataset=datasets.Dataset.from_list(words("what is this", WORDS)),
        processing_class=tokenizer,
        peft_config=peft_config,
        **more,
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


WAYS = {
    "as it is": {},
    "packed": {"packing": True, "max_length": 32},
    "the assistant's tokens alone": {"assistant_only_loss": True},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("way", WAYS)
def test_without_a_constraint_it_is_the_plain_run(way: str, tokenizer: Any, cache: AnchorCache, tmp_path: Path) -> None:
    plain = trained(tokenizer, tmp_path / "plain", **WAYS[way])

    def retention(its: nn.Module) -> Any:
        return cache.retention(its, batch_size=4, workers=0)

    craft = trained(tokenizer, tmp_path / "craft", retention, INACTIVE, **WAYS[way])
    assert_same(weights(plain), weights(craft))
    logged = [row for row in craft.state.log_history if "loss" in row and "craft/drift" in row]
    assert len(logged) == 6
    assert logged[0]["craft/retention_loss"] == pytest.approx(0.0, abs=1e-5)
    assert logged[-1]["craft/retention_loss"] > 1e-3


def test_drift_is_held_and_a_resumed_run_is_the_run_that_never_stopped(
    tokenizer: Any, cache: AnchorCache, tmp_path: Path
) -> None:
    def retention(its: nn.Module) -> Any:
        return cache.retention(its, batch_size=4, workers=0)

    whole = trained(tokenizer, tmp_path, retention, {"epsilon": 0.01})
    plain = trained(tokenizer, tmp_path / "plain")
    drift = {name: retention(trainer.model).drift() for name, trainer in (("craft", whole), ("plain", plain))}
    assert drift["craft"] < 0.5 * drift["plain"]
    again = trained(tokenizer, tmp_path, retention, {"epsilon": 0.01}, resume=True)
    assert_same(weights(whole), weights(again))
    assert whole.optimizer.optimizer.metrics == again.optimizer.optimizer.metrics


def test_lora_with_the_model_itself_as_teacher(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in words("is ice hot?", WORDS)
    ]
    collate = transformers.DataCollatorWithPadding(tokenizer)

    def retention(its: nn.Module) -> Any:
        return OnlineRetention(its, rows, batch_size=4, collate=collate, reading=Reading(class_dim=-1))

    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8, task_type="CAUSAL_LM")
    how = {"peft_config": lora, "gradient_checkpointing": True}
    trainer = trained(tokenizer, tmp_path, retention, {"epsilon": 0.01}, **how)
    logged = [row for row in trainer.state.log_history if "loss" in row and "craft/drift" in row]
    assert len(logged) == 6
    assert logged[0]["craft/retention_loss"] == pytest.approx(0.0, abs=1e-5)
    assert 0.0 < logged[-1]["craft/retention_loss"] < 0.1
    assert json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())["r"] == 4


def test_dpo_takes_the_optimizer_itself(tokenizer: Any, cache: AnchorCache, tmp_path: Path) -> None:
    pairs = [
        {"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": other["messages"][1:]}
        for row, other in zip(words("what is this", WORDS), words("what is this", WORDS[::-1]), strict=True)
    ]
    args = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip

    its = model(tokenizer)
    base = torch.optim.AdamW(its.parameters(), lr=1e-2)
    retention = cache.retention(its, batch_size=4, workers=0)
    trainer = trl.DPOTrainer(
        its,
        ref_model=model(tokenizer),
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        optimizers=(CraftOptimizer(base, retention, epsilon=0.01), None),
        callbacks=[CraftCallback()],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row and "craft/drift" in row]
    assert len(logged) == 4
    assert logged[0]["craft/retention_loss"] == pytest.approx(0.0, abs=1e-5)
    assert logged[-1]["craft/retention_loss"] > 0.0
