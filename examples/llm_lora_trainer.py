"""LoRA in the Hugging Face Trainer: AdamW against CraftOptimizer(AdamW), on a language model made on the spot.

    python examples/llm_lora_trainer.py        # about 40 s on one core, downloads nothing

A small Llama learns to write words backwards ("reverse abcde = edcba"). Then LoRA teaches it to shift their letters
("shift abcde = bcdef"), once with AdamW, once with CraftOptimizer(AdamW): same data, same seeds, same learning rate.
What it must keep is measured on prompts of the old task; the teacher is the model with its adapters switched off.

Needs `pip install craft-optim[transformers] accelerate peft`.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from small_llama import Problems, answers, pretrained, score
from torch import nn
from transformers import Trainer, TrainingArguments

from craft_optim.anchors import OnlineRetention, Reading
from craft_optim.transformers import CraftCallback, craft_optimizer


def train(
    model: nn.Module, problems: Problems, steps: int, learning_rate: float, **craft: Any
) -> list[dict[str, float]]:
    """What anyone's script does; with `craft`, two arguments of the Trainer more. Returns its log."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        extra: dict[str, Any] = {}
        if craft:
            extra["optimizer_cls_and_kwargs"] = craft_optimizer(args, **craft)
            extra["callbacks"] = [CraftCallback()]
        trainer = Trainer(model, args, train_dataset=problems, **extra)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        log: list[dict[str, float]] = trainer.state.log_history
        return log


@dataclass
class Outcome:
    """One line of the table."""

    name: str
    old_loss: float
    old_right: float
    new_loss: float
    new_right: float
    drift: float = 0.0
    held_out: float = 0.0


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Pretrains, fine-tunes twice, prints a table and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.02, help="drift to allow, in nats per token of an answer")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--anchors", type=int, default=512, help="prompts of the old task to measure drift on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    base = pretrained(options.pretraining_steps)
    old, new = Problems("reverse", 500, seed=2), Problems("shift", 500, seed=3)
    anchors, held_out = Problems("reverse", options.anchors, seed=4), Problems("reverse", 500, seed=5)
    outcomes = [Outcome("before", *score(base, old), *score(base, new))]
    for name in ("AdamW", "CraftOptimizer(AdamW)"):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(base), lora)
        retention = OnlineRetention(model, anchors, batch_size=32, reading=Reading(mask=answers))
        craft = {} if name == "AdamW" else {"retention": retention, "epsilon": options.epsilon}
        train(model, Problems("shift", 4096, seed=6), options.steps, learning_rate=5e-3, **craft)
        drifts = retention.drift(batch_size=256), retention.drift(held_out, batch_size=256)
        outcomes.append(Outcome(name, *score(model, old), *score(model, new), *drifts))

    print(f"{'':22} | old task: loss, right | new task: loss, right | drift (epsilon {options.epsilon:g}), held out")
    for o in outcomes:
        print(
            f"{o.name:22} | {o.old_loss:14.4f} {o.old_right:6.3f} | {o.new_loss:14.4f} {o.new_right:6.3f} | "
            f"{o.drift:20.4f} {o.held_out:9.4f}"
        )
    return outcomes


if __name__ == "__main__":
    main()
