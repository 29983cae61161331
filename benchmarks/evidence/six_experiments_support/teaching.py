"""The small pi0_fast learns to answer questions about pictures, and goes on opening its drawer.

Every step has frames of the drawer's demonstrations with lerobot's own loss, and questions with the likelihood of the
right answer after the prompt. A policy of this size was made with no knowledge beyond its task; this gives it some, so
that fine-tuning has something to destroy. It stands for the pretraining of a vision-language model, not for a method.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metaworld_pi0_fast import OLD_TASK
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import CAMERA_KEY, STATE_KEY, load_frames
from metaworld_pi0_fast.make_assets import cosine
from metaworld_pi0_fast.policy import load_policy, make_processors
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from craft_optim.lerobot.pi0_fast import last_hidden

from .quiz import CHOICES, Picture, pictures

__all__ = ["MIDDLE", "teach", "template_of"]

TOKENS, TOKENS_MASK = "observation.language.tokens", "observation.language.attention_mask"
MIDDLE = 1 / 256
"""The robot's state in questions, normalised: the middle of what demonstrations show, and of one of the 256 steps"""
_TRAINING_SEED = 1


def middle_state(preprocessor: Any) -> Tensor:
    """The state in the middle of the statistics of a preprocessor, `[state]`."""
    for step in preprocessor.steps:
        stats = (getattr(step, "stats", None) or {}).get(STATE_KEY)
        if stats:
            low, high = (torch.as_tensor(stats[name], dtype=torch.float32) for name in ("min", "max"))
            return low + (MIDDLE + 1.0) / 2.0 * (high - low)
    raise ValueError(f"`preprocessor` must have statistics of {STATE_KEY!r}. Found none.")


def template_of(preprocessor: Any) -> str:
    """How the policy's own preprocessor asks, as a template of `craft-optim eval-mcq`.

    Anchors that are made of a question go through that preprocessor, so they are the very prompts of the evaluation.
    """
    marker = "question"
    prompt = preprocessor({STATE_KEY: middle_state(preprocessor), "task": marker})["task"]
    text = prompt if isinstance(prompt, str) else prompt[0]
    if text.count(marker) != 1:
        raise ValueError(f"`preprocessor` must put the instruction into the prompt once. Found {text!r}.")
    return text.replace(marker, "{question}") + "{choice}"


class _Lessons:
    """Batches of pictures, prompts and right answers."""

    def __init__(self, shown: Sequence[Picture], preprocessor: Any, size: int, seed: int) -> None:
        self._pixels = torch.from_numpy(np.stack([picture.pixels for picture in shown])).permute(0, 3, 1, 2)
        self._right = torch.tensor([[picture.answers[question] for question in CHOICES] for picture in shown])
        tokenizer = next(step.input_tokenizer for step in preprocessor.steps if hasattr(step, "input_tokenizer"))
        state = middle_state(preprocessor)
        asked = preprocessor({STATE_KEY: state.expand(len(CHOICES), -1), "task": list(CHOICES)})
        self._prompts, self._masks = asked[TOKENS], asked[TOKENS_MASK].bool()
        answers = [torch.tensor(tokenizer(text)["input_ids"]) for choices in CHOICES.values() for text in choices]
        self._starts = torch.tensor([0, *np.cumsum([len(choices) for choices in CHOICES.values()])[:-1]])
        self._answers = pad_sequence(answers, batch_first=True, padding_value=-100)
        self._size, self._generator = size, torch.Generator().manual_seed(seed)

    def loss(self, policy: Any) -> Tensor:
        """Cross-entropy per token of the right answers to the next questions."""
        rows = torch.randint(len(self._pixels), (self._size,), generator=self._generator)
        kinds = torch.randint(len(CHOICES), (self._size,), generator=self._generator)
        answers = self._answers[self._starts[kinds] + self._right[rows, kinds]]
        batch = {
            CAMERA_KEY: self._pixels[rows].float() / 255.0,
            TOKENS: self._prompts[kinds],
            TOKENS_MASK: self._masks[kinds],
        }
        hidden = last_hidden(policy, batch, answers.clamp(min=0), answers >= 0)
        # The first token of an answer is predicted where the prompt ends, before what pads it
        length, padded = answers.shape[1], self._prompts.shape[1]
        ends = hidden.shape[1] - length - padded + self._masks[kinds].sum(1) - 1
        first = hidden[torch.arange(len(rows)), ends]
        states = torch.cat([first[:, None], hidden[:, -length:-1]], dim=1)
        logits = policy.model.paligemma_with_expert.paligemma.lm_head(states)
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=-100)


def teach(source: Path, demonstrations: Path, weights: Path, *, steps: int, shown: int, seed: int = 0) -> None:
    """Trains the policy on its own task and on questions, and writes its weights.

    Args:
        source: Folder of the shipped policy.
        demonstrations: Of the task that it knows.
        weights: The file of a checkpoint to replace.
        steps: How many; each has 16 frames and 32 questions.
        shown: How many pictures there are to learn from.
        seed: Of the batches.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    policy = load_policy(source)
    preprocessor = make_processors(policy, path=source)[0]
    frames = PreparedFrames(load_frames(demonstrations, policy.config.chunk_size), preprocessor)
    lessons = _Lessons(pictures(shown, _TRAINING_SEED), preprocessor, 32, seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    generator = torch.Generator().manual_seed(seed)
    policy.train()
    bar = tqdm(range(steps), desc=f"teaching questions beside {OLD_TASK}", unit="step")
    for step in bar:
        drawn = torch.randint(len(frames.train_indices), (16,), generator=generator)
        task, _ = policy.forward(frames.train_batch(frames.train_indices[drawn]))
        answers = lessons.loss(policy)
        (task + answers).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(task=f"{task.item():.3f}", answers=f"{answers.item():.3f}")
    aside = weights.with_name(f"{weights.name}.part")
    save_file({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}, aside)
    aside.replace(weights)
