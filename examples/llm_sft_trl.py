"""A chat model learns to write orders as JSON, by TRL's SFTTrainer: AdamW against CraftOptimizer(AdamW).

    python examples/llm_sft_trl.py        # seconds with a small model, much longer with SmolLM2-135M

The same as `craft-optim demo chat`, with two arguments of the trainer more than without this package. Chats are the
records that TRL takes, too; it learns from the answers alone. `craft_optim/demo/small_chat.py` says how the real model
is installed.

Needs `pip install craft-optim[transformers] trl`.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # it loads them when they are asked for

from craft_optim.demo.small_chat import Comparison, Outcome, anchors_of, chat_model, chats
from craft_optim.transformers import CraftCallback, craft_optimizer


def as_prompts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chats as TRL wants them, of which the answers alone are to be learnt: prompt and completion."""
    return [{"prompt": record["messages"][:-1], "completion": record["messages"][-1:]} for record in records]


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Fine-tunes twice, prints a table and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.05, help="drift to allow, in nats per token of an answer")
    parser.add_argument("--steps", type=int, help="default: as many as the model takes to learn")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    base, tokenizer, rate, enough = chat_model()
    rows = Dataset.from_list(as_prompts(chats().new))
    with tempfile.TemporaryDirectory() as folder:
        anchors, held_out = anchors_of(base, tokenizer, Path(folder))
        found = Comparison(tokenizer, anchors, held_out)
        for name in ("AdamW", "CraftOptimizer(AdamW)"):
            model = copy.deepcopy(base)
            args = SFTConfig(
                output_dir=f"{folder}/out",
                max_steps=options.steps or enough,
                per_device_train_batch_size=4,
                learning_rate=rate,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            )
            extra: dict[str, Any] = {}
            if name.startswith("Craft"):
                retention = anchors.retention(model)
                extra["optimizer_cls_and_kwargs"] = craft_optimizer(args, retention, epsilon=options.epsilon)
                extra["callbacks"] = [CraftCallback()]
            trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **extra)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            found.add(name, model)
        return found.show(options.epsilon)


if __name__ == "__main__":
    main()
