"""A chat model learns to write orders as JSON, by TRL's SFTTrainer: AdamW against CraftOptimizer(AdamW).

    python examples/llm_sft_trl.py        # seconds with a small model, much longer with SmolLM2-135M

The same as `llm_chat_loop.py`, with two arguments of the trainer more than without this package. Chats are the records
that TRL takes, too; it learns from the answers alone. `small_chat.py` says how the real model is installed.

Needs `pip install craft-optim[transformers] trl`.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset
from llm_chat_loop import ASKED, Outcome
from small_chat import answers, chat_model, chats, loss_of
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # it loads them when they are asked for

from craft_optim.chat import answered
from craft_optim.transformers import CraftCallback, chat_anchors, craft_optimizer


def as_prompts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chats as TRL wants them, of which the answers alone are to be learnt: prompt and completion."""
    return [{"prompt": record["messages"][:-1], "completion": record["messages"][-1:]} for record in records]


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Fine-tunes twice, prints a table and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.05, help="drift to allow, in nats per token of an answer")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, help="learning rate; default: one that suits the model")
    parser.add_argument("--tokens", type=int, default=24, help="of an anchor's answer, at most")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    base, tokenizer, rate = chat_model()
    data = chats()
    test = [answered(record, tokenizer) for record in data.new_held_out]
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        caches = [
            chat_anchors(base, tokenizer, records, f"{folder}/{name}", answers="sampled", max_new_tokens=options.tokens)
            for name, records in (("anchors", data.old), ("held-out", data.held_out))
        ]
        for name in ("AdamW", "CraftOptimizer(AdamW)"):
            model = copy.deepcopy(base)
            retention = caches[0].retention(model)
            args = SFTConfig(
                output_dir=f"{folder}/out",
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=options.lr or rate,
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
                extra["optimizer_cls_and_kwargs"] = craft_optimizer(args, retention, epsilon=options.epsilon)
                extra["callbacks"] = [CraftCallback()]
            rows = Dataset.from_list(as_prompts(data.new))
            trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **extra)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            with torch.no_grad():
                new_loss = float(loss_of(model.eval(), test))
            drifts = retention.drift(), retention.drift(caches[1])
            outcomes.append(Outcome(name, new_loss, *drifts, answers(model, tokenizer, ASKED)))

    print(f"{'':22} | loss on orders | drift (epsilon {options.epsilon:g}), held out")
    for o in outcomes:
        print(f"{o.name:22} | {o.new_loss:14.3f} | {o.drift:20.4f} {o.held_out:9.4f}")
        print("\n".join(f"  {question} {answer!r}" for question, answer in zip(ASKED, o.answers, strict=True)))
    return outcomes


if __name__ == "__main__":
    main()
