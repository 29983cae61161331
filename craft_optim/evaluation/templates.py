"""Templates of a question to a model: the text before a choice."""

from dataclasses import dataclass

__all__ = ["ANSWER_EN", "CHAT", "QUESTION_ANSWER", "Template", "parse_template"]

QUESTION_ANSWER = "Question: {question}\nAnswer: {choice}"
"""The usual template for language models"""

ANSWER_EN = "answer en {question}\n{choice}"
"""Template of PaliGemma's training, and so of pi0_fast's backbone, for English questions about pictures"""

CHAT = "chat"
"""Stands for the chat template of the model's own processor or tokenizer, instead of a template"""


@dataclass(frozen=True)
class Template:
    """Template in parts: the text before the question, and the text between it and the choice."""

    before: str
    after: str

    def head(self, question: str) -> str:
        """Text before the choice."""
        return f"{self.before}{question}{self.after}"


def parse_template(text: str) -> Template:
    r"""Parses a template.

    Args:
        text: Text with "{question}", and "{choice}" at its end; without the latter, a blank and the choice follow. A
            backslash and an n, as from a shell, are a new line. Other braces are plain text.

    Raises:
        ValueError: The text has no question, more than one of either, or text after the choice, which would not be
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
