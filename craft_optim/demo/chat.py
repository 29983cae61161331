"""A chat model learns to write orders as JSON: what does it answer afterwards to all else?

Anchors are its own answers, from before, to questions that have nothing to do with orders.
"""

import copy
from pathlib import Path

import torch

from craft_optim import CraftOptimizer
from craft_optim.chat import answered
from craft_optim.demo.small_chat import Comparison, Outcome, anchors_of, chat_model, chats, loss_of
from craft_optim.metrics import JSONLWriter

__all__ = ["main"]


def main(out: Path, epsilon: float = 0.05, steps: int | None = None, model_path: str | None = None) -> list[Outcome]:
    """Fine-tunes twice, prints a table and returns it.

    Args:
        out: Folder of the anchors and of a log of the constrained run, for `craft-optim report`; what is there of an
            earlier run is replaced.
        epsilon: Drift to allow, nats per token of an answer.
        steps: Number of steps of fine-tuning, with four chats each. None: as many as the model takes to learn.
        model_path: A model of transformers: folder or hub id. None: as `small_chat.chat_model` finds one.
    """
    torch.manual_seed(0)
    base, tokenizer, rate, enough = chat_model(model_path)
    train = [answered(record, tokenizer) for record in chats().new]
    print("The model answers the questions that it shall keep ...")
    anchors, held_out = anchors_of(base, tokenizer, out)
    found = Comparison(tokenizer, anchors, held_out)
    found.add("before", base)
    for name in ("AdamW", "CraftOptimizer(AdamW)"):
        print(f"It learns to write orders, by {name} ...")
        model = copy.deepcopy(base)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        if name.startswith("Craft"):
            log = out / "metrics.jsonl"
            log.unlink(missing_ok=True)
            retention = anchors.retention(model)
            optimizer = CraftOptimizer(optimizer, retention, epsilon=epsilon, on_metrics=JSONLWriter(log))
        order = torch.Generator().manual_seed(0)
        for _ in range(steps or enough):
            rows = torch.randint(len(train), (4,), generator=order).tolist()
            loss_of(model, [train[row] for row in rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        found.add(name, model)
    return found.show(epsilon)
