"""Multiple-choice questions to lerobot's PI0FastPolicy: they test the knowledge of its vision-language model.

The question takes the instruction's place after the picture: attention in both is bidirectional. A choice takes the
action tokens' place, with causal attention. The last token of the prompt predicts the choice's first, as in PaliGemma's
training; pi0_fast's training puts a BOS before action tokens, which has never preceded an answer in words.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from craft_optim.anchors.passes import device_of, steady
from craft_optim.evaluation.answer_tokens import answer_tokens, log_likelihoods
from craft_optim.evaluation.mcq import ChoiceScore
from craft_optim.evaluation.questions import Question, open_picture
from craft_optim.evaluation.templates import ANSWER_EN, parse_template
from craft_optim.lerobot._shared import STATE, TOKENS, TOKENS_MASK, policy_of
from craft_optim.lerobot.pi0_fast import last_hidden

__all__ = ["PI0FastScorer"]


class PI0FastScorer:
    """Scores the choices of questions about pictures by a pi0_fast policy.

    A picture is processed like a camera's, by the policy's preprocessor and `_preprocess_images`. The preprocessor's
    own tokenizer tokenises the text, without padding and limit of length. Other cameras are absent and masked, as in
    lerobot. Dropout is off; the policy's flags are restored afterwards.

    Args:
        template: Text for `parse_template`. The default is the form in which PaliGemma was trained to answer, and in
            which its knowledge shows. The form of robot tasks is "Task: {question}, State: 128 128;\\n{choice}".
        camera: Key of the camera that shows the picture; None: the policy's first.

    Raises:
        ValueError: The model is not a pi0_fast, the preprocessor has no tokenizer, or another argument is unusable.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessor: Any,
        *,
        template: str = ANSWER_EN,
        camera: str | None = None,
        batch_size: int = 16,
    ) -> None:
        policy = policy_of(model)
        if policy.name != "pi0_fast":
            raise ValueError(f"`model` must be a pi0_fast, which has a head for words. Found {policy.name}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1. Found batch_size={batch_size}.")
        cameras = [key for key in policy.config.image_features if ".empty_camera_" not in key]
        if not cameras or (camera is not None and camera not in cameras):
            raise ValueError(f"`camera` must be one of the policy's, {cameras}. Found {camera!r}.")
        tokenizers = [step.input_tokenizer for step in preprocessor.steps if hasattr(step, "input_tokenizer")]
        if not tokenizers:
            raise ValueError("`preprocessor` must have a step with the tokenizer of the prompts. Found none.")
        self._policy, self._preprocessor, self._tokenizer = policy, preprocessor, tokenizers[0]
        self._template = parse_template(template)
        self._camera = camera or cameras[0]
        self._batch_size = batch_size

    def __call__(self, question: Question) -> list[ChoiceScore]:
        """Scores the choices, at most a batch of them in one forward."""
        picture = self._picture(question)
        prompt, answers = self._tokens(question)
        scores: list[ChoiceScore] = []
        for at in range(0, len(answers), self._batch_size):
            scores += self._score(picture, prompt, answers[at : at + self._batch_size])
        return scores

    def _picture(self, question: Question) -> Tensor:
        """Picture `[1, 3, H, W]` from the preprocessor."""
        if question.image is None:
            raise ValueError("pi0_fast needs a picture. Found a question without one.")
        pixels = torch.from_numpy(np.array(open_picture(question.image))).permute(2, 0, 1)
        sample = {self._camera: pixels / 255.0, "task": ""}  # like a dataset's frames
        if (state := self._policy.config.robot_state_feature) is not None:
            sample[STATE] = torch.zeros(state.shape)  # it becomes text of the instruction, which is not used
        picture: Tensor = self._preprocessor(sample)[self._camera]
        return picture

    def _tokens(self, question: Question) -> tuple[Tensor, list[Tensor]]:
        """The prompt's token ids, and each choice's."""
        head = self._template.head(question.text)
        found = self._tokenizer([head + choice for choice in question.choices], return_offsets_mapping=True)
        rows = found["input_ids"]
        ends = [[end for _, end in row] for row in found["offset_mapping"]]
        start, stops = answer_tokens(rows, ends, [len(head)] * len(rows))
        answers = [torch.tensor(row[start:stop]) for row, stop in zip(rows, stops, strict=True)]
        return torch.tensor(rows[0][:start]), answers

    @torch.no_grad()
    def _score(self, picture: Tensor, prompt: Tensor, answers: list[Tensor]) -> list[ChoiceScore]:
        device, count = device_of(self._policy), len(answers)
        # Padding comes after a choice, which cannot see it
        suffix = pad_sequence(answers, batch_first=True).to(device)
        tokens = prompt.to(device).expand(count, -1)
        batch = {
            self._camera: picture.to(device).expand(count, -1, -1, -1),
            TOKENS: tokens,
            TOKENS_MASK: torch.ones_like(tokens, dtype=torch.bool),
        }
        with steady(self._policy):
            hidden = last_hidden(self._policy, batch, suffix, torch.ones_like(suffix, dtype=torch.bool))
            head = self._policy.model.paligemma_with_expert.paligemma.lm_head
            logits = head(hidden[:, -suffix.shape[1] - 1 : -1])
        return log_likelihoods(logits, suffix, [len(row) for row in answers])
