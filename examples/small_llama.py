"""What the examples for language models share: a small Llama made on the spot, and two tasks for it.

"reverse abcde = edcba" is what it can do; "shift abcde = bcdef" is what it is taught.
"""

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

LETTERS, LENGTH = "abcdefghij", 5
VOCABULARY = ["reverse", "shift", "=", *LETTERS]


class Problems(Dataset[dict[str, Tensor]]):
    """Prompts with answers: `input_ids`, and `labels` that are -100 on the prompt. Longs `[2 + 2 * LENGTH]` each.

    Args:
        task: "reverse" or "shift".
        count: Number of problems.
        seed: Of their words.
    """

    def __init__(self, task: str, count: int, seed: int) -> None:
        offset = len(VOCABULARY) - len(LETTERS)
        words = torch.randint(len(LETTERS), (count, LENGTH), generator=torch.Generator().manual_seed(seed))
        results = words.flip(1) if task == "reverse" else (words + 1) % len(LETTERS)
        operator, equals = (torch.full((count, 1), VOCABULARY.index(token)) for token in (task, "="))
        self.input_ids = torch.cat([operator, words + offset, equals, results + offset], dim=1)
        self.labels = self.input_ids.clone()
        self.labels[:, : LENGTH + 2] = -100

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def answers(inputs: dict[str, Tensor]) -> Tensor:
    """The positions whose logits predict the answer, as a mask `[batch, positions]`."""
    ids = inputs["input_ids"]
    places = torch.arange(ids.shape[1], device=ids.device)
    return ((places > LENGTH) & (places < ids.shape[1] - 1)).expand(ids.shape)


def pretrained(steps: int) -> nn.Module:
    """67 thousand parameters that can reverse words, the same in every process."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    model: nn.Module = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for batch in DataLoader(Problems("reverse", 32 * steps, seed=1), batch_size=32):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def score(model: nn.Module, problems: Problems) -> tuple[float, float]:
    """Cross-entropy on the answers, and the share of answers that are right to the last letter."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    labels = problems.labels.to(device)
    output = model(input_ids=problems.input_ids.to(device), labels=labels)
    model.train(training)
    predicted = output.logits[:, LENGTH + 1 : -1].argmax(-1)
    return float(output.loss), float((predicted == labels[:, LENGTH + 2 :]).all(1).float().mean())
