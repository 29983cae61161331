"""A chat model learns to write orders as JSON, in a loop of one's own: AdamW against CraftOptimizer(AdamW).

    python examples/llm_chat_loop.py        # seconds with a small model, much longer with SmolLM2-135M

Afterwards it is asked for something else. Anchors are its own answers, from before, to questions that have nothing to
do with orders. `small_chat.py` says how the real model is installed; nothing is downloaded.

Needs `pip install craft-optim[transformers]`.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from small_chat import answers, chat_model, chats, loss_of

from craft_optim import CraftOptimizer
from craft_optim.chat import answered
from craft_optim.transformers import chat_anchors

ASKED = ("What is the capital of France?", "What is honey?", "I would like two coffee, please.")


@dataclass
class Outcome:
    """One line of the table."""

    name: str
    new_loss: float
    drift: float = 0.0
    held_out: float = 0.0
    answers: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Fine-tunes twice, prints a table and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.05, help="drift to allow, in nats per token of an answer")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, help="learning rate; default: one that suits the model")
    parser.add_argument("--tokens", type=int, default=24, help="of an anchor's answer, at most")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    base, tokenizer, rate = chat_model()
    data = chats()
    train, test = ([answered(record, tokenizer) for record in records] for records in (data.new, data.new_held_out))
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        caches = [
            chat_anchors(base, tokenizer, records, f"{folder}/{name}", answers="sampled", max_new_tokens=options.tokens)
            for name, records in (("anchors", data.old), ("held-out", data.held_out))
        ]
        for name in ("before", "AdamW", "CraftOptimizer(AdamW)"):
            model = copy.deepcopy(base)
            retention = caches[0].retention(model)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr or rate)
            if name.startswith("Craft"):
                optimizer = CraftOptimizer(optimizer, retention, epsilon=options.epsilon)
            order = torch.Generator().manual_seed(0)
            for _ in range(options.steps if name != "before" else 0):
                rows = torch.randint(len(train), (4,), generator=order).tolist()
                loss_of(model, [train[row] for row in rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                new_loss = float(loss_of(model, test))
            drifts = retention.drift(), retention.drift(caches[1])
            outcomes.append(Outcome(name, new_loss, *drifts, answers(model, tokenizer, ASKED)))

    print(f"{'':22} | loss on orders | drift (epsilon {options.epsilon:g}), held out")
    for o in outcomes:
        print(f"{o.name:22} | {o.new_loss:14.3f} | {o.drift:20.4f} {o.held_out:9.4f}")
    for place, question in enumerate(ASKED):
        print(f"\n{question}")
        for o in outcomes:
            print(f"  {o.name:22} {o.answers[place]!r}")
    return outcomes


if __name__ == "__main__":
    main()
