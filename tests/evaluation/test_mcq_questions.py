"""The file of questions, and the pictures that it names."""

import json

import numpy as np
import pytest

from craft_optim.evaluation import Question, read_questions
from craft_optim.evaluation.questions import open_picture

Image = pytest.importorskip("PIL.Image", reason="pip install 'craft-optim[evaluation]'")

GOOD = {"question": "Is ice hot?", "choices": ["yes", "no"], "answer_index": 1}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_lines_become_questions(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "q.jsonl"
    rows = [
        {**GOOD, "question": " Is ice hot? ", "choices": [" yes", "no\n"]},
        "",
        {**GOOD, "image_path": "img/ice.png", "id": 7},
        {**GOOD, "image_path": str(tmp_path / "else.png")},
        {**GOOD, "image_path": None, "question": "é?"},
    ]
    file.write_bytes(b"\xef\xbb\xbf" + write(file, *rows).read_bytes())
    found = read_questions(file)
    assert found[0] == Question("Is ice hot?", ("yes", "no"), 1)
    assert found[1] == Question("Is ice hot?", ("yes", "no"), 1, tmp_path / "data" / "img" / "ice.png", "7")
    assert found[2].image == tmp_path / "else.png"
    assert found[3] == Question("é?", ("yes", "no"), 1)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "Expecting"),
        ("[1]", "a line must be a JSON object. Found list"),
        ({"question": "a", "choices": ["b", "c"]}, "'answer_index' is missing"),
        ({**GOOD, "image": "a.png"}, "'image' is not known"),
        ({**GOOD, "question": 3}, "'question' must be a text. Found 3"),
        ({**GOOD, "question": "  "}, "must have words"),
        ({**GOOD, "choices": "yes"}, "'choices' must be a list of texts"),
        ({**GOOD, "choices": ["yes", 2]}, "'choices' must be a list of texts"),
        ({**GOOD, "choices": ["yes"], "answer_index": 0}, "at least two choices"),
        ({**GOOD, "choices": ["yes", " "]}, "choices must have words"),
        ({**GOOD, "choices": ["no", "yes", "no "]}, "Found 'no' twice"),
        ({**GOOD, "answer_index": 2}, r"in \[0, 1\]. Found 2"),
        ({**GOOD, "answer_index": -1}, r"in \[0, 1\]. Found -1"),
        ({**GOOD, "answer_index": True}, "whole number. Found True"),
        ({**GOOD, "answer_index": "1"}, "whole number. Found '1'"),
        ({**GOOD, "image_path": ""}, "'image_path' must be a path"),
        ({**GOOD, "id": [1]}, "'id' must be"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, row, complaint):
    file = write(tmp_path / "q.jsonl", GOOD, "", row)
    with pytest.raises(ValueError, match=rf"q\.jsonl:3: .*{complaint}"):
        read_questions(file)


def test_what_is_no_text_and_what_is_empty(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"q\.jsonl:2"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(write(tmp_path / "none.jsonl", "", " "))
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "nowhere.jsonl")


def test_pictures_are_upright_and_have_three_colours(tmp_path):
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(open_picture(tmp_path / "a.png")), pixels)
    assert np.array_equal(np.array(open_picture(tmp_path / "grey.png")), pixels)
    assert open_picture(tmp_path / "turned.png").size == (4, 8)


def test_pictures_that_cannot_be_read(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:3000])
    Image.fromarray(np.full((4, 4), 60000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, complaint in (
        ("text.png", "cannot be read"),
        ("half.png", "cannot be read"),
        ("deep.png", "8 bits per colour"),
        ("none.png", "There is no picture"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){complaint}.*{name}|{name} {complaint}"):
            open_picture(tmp_path / name)
