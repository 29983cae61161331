"""How a question is put to a model: the text before a choice."""

from dataclasses import dataclass

__all__ = ["ANSWER_EN", "CHAT", "QUESTION_ANSWER", "Template", "parse_template"]

QUESTION_ANSWER = "Question: {question}\nAnswer: {choice}"
"""The usual one for language models"""

ANSWER_EN = "answer en {question}\n{choice}"
"""How PaliGemma, and so the backbone of pi0_fast, was taught to answer questions about pictures in English"""

CHAT = "chat"
"""The word for the chat template of the model's own processor or tokenizer, in the place of a template"""


@dataclass(frozen=True)
class Template:
    """A template in parts: the text before the question, and that between it and the choice."""

    before: str
    after: str

    def head(self, question: str) -> str:
        """Everything before the choice."""
        return f"{self.before}{question}{self.after}"


def parse_template(text: str) -> Template:
    r"""A template from text.

    Args:
        text: With "{question}", and "{choice}" at its end; without the latter, a blank and the choice follow. A
            backslash and an n, as a shell hands them over, are a new line. Other braces are what they are.

    Raises:
        ValueError: It has no question, more than one of either, or something after the choice, which would not be
            scored.

    Example:
        >>> parse_template("Q: {question} A:").head("Is ice hot?")
        'Q: Is ice hot? A: '
        >>> parse_template(r"answer en {question}\n{choice}").after == "\n"
        True
    """
    whole = text.replace("\\n", "\n")
    whole = whole if "{choice}" in whole else f"{whole} {{choice}}"
    if whole.count("{question}") != 1 or whole.count("{choice}") != 1 or not whole.endswith("{choice}"):
        raise ValueError(
            "`template` must have {question} once, and {choice} once, at its end, or not at all. "
            f"Found {text!r}: try {QUESTION_ANSWER!r}."
        )
    before, after = whole.removesuffix("{choice}").split("{question}")
    return Template(before, after)
