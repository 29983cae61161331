"""A chat model learns to write orders as JSON, in a loop of one's own: AdamW against CraftOptimizer(AdamW).

    python examples/llm_chat_loop.py        # seconds with a small model, much longer with SmolLM2-135M

Afterwards it is asked for something else. Anchors are its own answers, from before, to questions that have nothing to
do with orders. `small_chat.py` says how the real model is installed; nothing is downloaded.

Needs `pip install craft-optim[transformers]`.
"""

import copy
import tempfile
from collections.abc import Sequence

import torch
from small_chat import Comparison, Outcome, anchors_of, chat_model, chats, loss_of, parsed

from craft_optim import CraftOptimizer
from craft_optim.chat import answered


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Fine-tunes twice, prints a table and returns it."""
    options = parsed(__doc__, arguments)
    torch.set_num_threads(1)
    base, tokenizer, rate = chat_model()
    train = [answered(record, tokenizer) for record in chats().new]
    with tempfile.TemporaryDirectory() as folder:
        anchors, held_out = anchors_of(base, tokenizer, folder, options.tokens)
        found = Comparison(tokenizer, anchors, held_out)
        found.add("before", base)
        for name in ("AdamW", "CraftOptimizer(AdamW)"):
            model = copy.deepcopy(base)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr or rate)
            if name.startswith("Craft"):
                optimizer = CraftOptimizer(optimizer, anchors.retention(model), epsilon=options.epsilon)
            order = torch.Generator().manual_seed(0)
            for _ in range(options.steps):
                rows = torch.randint(len(train), (4,), generator=order).tolist()
                loss_of(model, [train[row] for row in rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            found.add(name, model)
        return found.show(options.epsilon)


if __name__ == "__main__":
    main()
