"""Multiple-choice questions, about a picture or not, and the file that holds them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_optim._paths import expanded, local

__all__ = ["Question", "open_picture", "read_questions"]

_KEYS = {"image_path", "question", "choices", "answer_index", "id"}


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the right one.

    Attributes:
        text: The question, without its choices.
        choices: At least two answers, all different, without blanks around them.
        answer: Place of the right one.
        image: File of the question's picture; None without one.

    Raises:
        ValueError: A value is invalid.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    image: Path | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"the question must have words. Found {self.text!r}.")
        if len(self.choices) < 2:
            raise ValueError(f"there must be at least two choices. Found {list(self.choices)}.")
        for place, choice in enumerate(self.choices):
            if not choice or choice != choice.strip():
                raise ValueError(
                    f"choices must have words, and no blanks around them: a template puts them in. Found {choice!r} at "
                    f"{place}."
                )
            if choice in self.choices[:place]:
                raise ValueError(f"choices must differ. Found {choice!r} twice.")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer must be a place in [0, {len(self.choices) - 1}]. Found {self.answer}.")


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file in UTF-8; blank lines are skipped.

    Each line is an object with "question", "choices" (a list of texts) and "answer_index" (from 0), and may have
    "image_path" (relative to the file; null for none) and "id". Blanks around texts are removed.

    Args:
        path: The file. Pictures are opened when needed, not here.

    Raises:
        ValueError: A line has another form, or there are no lines; the message has the file and the line.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> line = '{"question": "Is ice hot?", "choices": ["yes", "no"], "answer_index": 1, "image_path": "ice.png"}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "questions.jsonl"
        ...     _ = file.write_text(line)
        ...     (question,) = read_questions(file)
        >>> question.choices[question.answer], question.image.name
        ('no', 'ice.png')
    """
    path = local(path)
    questions = list(_questions(path))
    if not questions:
        raise ValueError(f"{path} has no questions: write one JSON object per line.")
    return questions


def _questions(path: Path) -> Iterator[Question]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig")  # Windows programs put a mark at the beginning
            if text.strip():
                yield _question(json.loads(text), path.parent)
        except ValueError as error:  # JSON's and Unicode's own among them
            raise ValueError(f"{path}:{number}: {error}") from error


def _question(row: Any, folder: Path) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"a line must be a JSON object. Found {type(row).__name__}.")
    missing = sorted({"question", "choices", "answer_index"} - row.keys())
    if missing:
        raise ValueError(f"{missing[0]!r} is missing. Found keys {sorted(row)}.")
    unknown = sorted(row.keys() - _KEYS)
    if unknown:  # else a misnamed picture would make a question without one
        raise ValueError(f"{unknown[0]!r} is not known. Keys are {sorted(_KEYS)}: rename it, or take it out.")
    text, choices, answer = row["question"], row["choices"], row["answer_index"]
    image, name = row.get("image_path"), row.get("id")
    if not isinstance(text, str):
        raise ValueError(f"'question' must be a text. Found {text!r}.")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"'choices' must be a list of texts. Found {choices!r}.")
    if type(answer) is not int:
        raise ValueError(f"'answer_index' must be a whole number. Found {answer!r}.")
    if image is not None and (not isinstance(image, str) or not image):
        raise ValueError(f"'image_path' must be a path, or null. Found {image!r}.")
    if name is not None and not isinstance(name, str | int):
        raise ValueError(f"'id' must be a text or a whole number. Found {name!r}.")
    return Question(
        text.strip(),
        tuple(choice.strip() for choice in choices),
        answer,
        None if image is None else folder / expanded(image),
        None if name is None else str(name),
    )


def open_picture(path: Path) -> Any:
    """The picture in a file, upright and in RGB, as PIL has it.

    Raises:
        ValueError: There is no such file, PIL cannot read it, or its colours have more than 8 bits.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f"Pictures need Pillow ({error}): pip install 'craft-optim[evaluation]'.") from error
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # PIL would clip them at 255
                raise ValueError(f"Pictures must have 8 bits per colour. Found mode {picture.mode!r} in {path}.")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"There is no picture {path}.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's errors for broken files
        raise ValueError(f"The picture {path} cannot be read: {error}.") from error
