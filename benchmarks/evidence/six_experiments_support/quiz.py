"""Questions about generated pictures of one coloured shape: knowledge that a robot policy of 0.6 M parameters can have.

Each picture gives three questions, and no two of them can be answered by the same feature: what colour the shape has,
which shape it is, and what colour the ground has.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from metaworld_pi0_fast.demonstrations import ACTION_KEY, CAMERA_KEY, STATE_KEY
from metaworld_pi0_fast.environment import ACTION_NAMES, IMAGE_SIZE, STATE_NAMES
from PIL import Image, ImageDraw

__all__ = ["CHOICES", "Picture", "draw", "pictures", "write_dataset", "write_questions"]

COLOURS = {"red": (210, 50, 45), "green": (60, 170, 70), "blue": (50, 90, 205), "yellow": (225, 200, 60)}
SHAPES = ("circle", "square", "triangle", "bar")
GROUNDS = {"black": (25, 25, 25), "grey": (120, 120, 120), "white": (230, 230, 230), "brown": (115, 75, 40)}
CHOICES: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "shape": SHAPES, "ground": tuple(GROUNDS)}
"""Question -> what may be answered. Questions are one word: a prompt of the small policy has room for 20 tokens."""


@dataclass(frozen=True)
class Picture:
    """A picture and what is right about it.

    Attributes:
        pixels: uint8 `[size, size, 3]`.
        answers: Question -> place of the right one among `CHOICES`.
    """

    pixels: Any
    answers: dict[str, int]


def draw(colour: str, shape: str, ground: str, generator: np.random.Generator) -> Any:
    """One shape on a noisy ground; its place, its size and both tones vary.

    Returns:
        uint8 `[size, size, 3]`.
    """
    noise = generator.normal(0, 6, (IMAGE_SIZE, IMAGE_SIZE, 1)) + generator.normal(0, 10)
    image = Image.fromarray(np.clip(np.asarray(GROUNDS[ground]) + noise, 0, 255).astype(np.uint8))
    x, y = IMAGE_SIZE / 2 + generator.uniform(-12, 12, 2)
    r = generator.uniform(11, 16)
    tone = tuple(int(np.clip(c + generator.normal(0, 12), 0, 255)) for c in COLOURS[colour])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=tone)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=tone)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=tone)
    else:
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=tone)
    return np.asarray(image)


def pictures(count: int, seed: int) -> list[Picture]:
    """Pictures in which colour, shape and ground are independent.

    Args:
        count: How many.
        seed: Of everything in them.
    """
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        answers = {question: int(generator.integers(len(choices))) for question, choices in CHOICES.items()}
        colour, shape, ground = (CHOICES[question][answers[question]] for question in CHOICES)
        made.append(Picture(draw(colour, shape, ground, generator), answers))
    return made


def write_questions(folder: Path, shown: Sequence[Picture]) -> Path:
    """Writes pictures and `questions.jsonl`, as `craft-optim eval-mcq` reads it; the choices are shuffled.

    Args:
        folder: Made if it is not there.
        shown: The pictures.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lines = []
    for number, picture in enumerate(shown):
        name = f"{number:04d}.png"
        Image.fromarray(picture.pixels).save(folder / name)
        for question, choices in CHOICES.items():
            order = generator.permutation(len(choices))
            about = {"id": f"{number}-{question}", "image_path": name, "question": question}
            right = int(np.flatnonzero(order == picture.answers[question])[0])
            lines.append(about | {"choices": [choices[place] for place in order], "answer_index": right})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def write_dataset(folder: Path, shown: Sequence[Picture], state: Any, fps: int) -> None:
    """Writes pictures with questions as a LeRobotDataset, to be read together with demonstrations as anchors.

    Hidden states of image and prompt need no actions; those in the dataset are zeros. An episode is a picture.

    Args:
        folder: Must not exist yet.
        shown: The pictures.
        state: The robot's state in every frame, `[state]`.
        fps: Of the demonstrations.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = {STATE_KEY: list(STATE_NAMES), ACTION_KEY: list(ACTION_NAMES)}
    features: dict[str, Any] = {
        CAMERA_KEY: {
            "dtype": "image",
            "shape": (IMAGE_SIZE, IMAGE_SIZE, 3),
            "names": ["height", "width", "channels"],
        }
    } | {key: {"dtype": "float32", "shape": (len(own),), "names": own} for key, own in names.items()}
    dataset = LeRobotDataset.create("local/quiz", fps=fps, features=features, root=folder, use_videos=False)
    values = {STATE_KEY: np.asarray(state, dtype=np.float32), ACTION_KEY: np.zeros(len(ACTION_NAMES), np.float32)}
    for picture in shown:
        for question in CHOICES:
            dataset.add_frame({CAMERA_KEY: picture.pixels, "task": question, **values})
        dataset.save_episode()
    dataset.finalize()
