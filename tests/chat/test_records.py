"""Records of files, folders and lists."""

import json

import pytest

from craft_optim.chat.records import read_records

CHAT = [{"role": "user", "content": "is ice hot?"}, {"role": "assistant", "content": "no"}]
ROWS = [{"messages": CHAT, "source": str(i)} for i in range(6)]


def jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_chats_and_the_same_in_other_forms(tmp_path):
    import datasets

    expected = [{"messages": CHAT}] * 6
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for source in (
        jsonl(tmp_path / "a.jsonl", ROWS), str(tmp_path / "a.parquet"), tmp_path / "saved", tmp_path / "splits", ROWS,
    ):  # fmt: skip
        assert read_records(source) == expected
    assert read_records(tmp_path / "a.jsonl", 2) == expected[:2]


def test_paragraphs_of_a_text_are_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n three \r\n\r\nfour", encoding="utf-8")
    assert read_records(tmp_path / "a.txt") == [{"text": "one\ntwo"}, {"text": "three"}, {"text": "four"}]


def test_a_part_of_them_is_evenly_apart():
    rows = [{"text": str(i)} for i in range(10)]
    assert [row["text"] for row in read_records(rows, 3)] == ["1", "5", "8"]


def test_prompts_texts_and_tools():
    rows = [
        {"prompt": "a", "completion": "b", "text": None},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": "a"},
        {"messages": CHAT, "tools": [{"type": "function"}]},
    ]
    assert read_records(rows) == [{"prompt": "a", "completion": "b"}, *rows[1:]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"conversations": CHAT}], "Record 0 of `data` must have `messages`.*Found conversations"),
        ([{"text": "a"}, {"messages": []}], "Record 1 of"),
        ([{"messages": "a"}], "none of them empty"),
        ([{"text": ["a"]}], "none of them empty"),
        (["a"], "must be a mapping. Found str"),
        ([], "at least one record"),
    ],
)
def test_other_records_are_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        read_records(rows)


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"must be one of \.jsonl.*Found .*a\.csv"):
        read_records(tmp_path / "a.csv")
    (tmp_path / "b.jsonl").write_text("no json")
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read as records"):
        read_records(tmp_path / "b.jsonl")
    for missing in (tmp_path / "nowhere", "nowhere.jsonl", "./nowhere", "nowhere/"):
        with pytest.raises(ValueError, match=r"must be a file \(\.jsonl.* Found nothing there"):
            read_records(missing)


@pytest.mark.parametrize(("given", "found"), [("code", "code"), (3, "3"), (0, "0"), (1.5, "1.5"), (None, None)])
def test_a_category_is_a_text(given, found):
    (record,) = read_records([{"text": "a", "category": given, "other": 1}])
    assert record == {"text": "a"} | ({} if found is None else {"category": found})


@pytest.mark.parametrize("given", [["code"], {"a": 1}])
def test_other_categories_are_refused(given):
    with pytest.raises(ValueError, match=r"Record 0 of `data`: `category` must be a text or a number\. Found .*rename"):
        read_records([{"text": "a", "category": given}])


def test_class_labels_are_their_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "category": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "category": [1, 0, -1]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    expected = [{"text": "x", "category": "b"}, {"text": "y", "category": "a"}, {"text": "z"}]
    assert read_records(made) == read_records(tmp_path / "saved") == expected
