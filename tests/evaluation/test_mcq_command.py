"""craft-optim eval-mcq: with scorers of a script, and with checkpoints of transformers."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from craft_optim.cli import main
from craft_optim.evaluation.statistics import wilson

pytest.importorskip("scipy", reason="pip install 'craft-optim[evaluation]'")

SCRIPT = """
from craft_optim.evaluation import ChoiceScore

def good():
    return lambda q: [ChoiceScore(-1.0 if place == q.answer else -2.0, 1) for place in range(len(q.choices))]

def forgetful():
    def score(q):
        if q.text == "question 3":
            raise ValueError("too long")
        right = int(q.text.split()[-1]) % 2
        return [ChoiceScore(-2.0 + right * (place == q.answer) - 0.5, 2) for place in range(len(q.choices))]
    return score

def broken():
    def score(q):
        raise ValueError(f"nothing works on {q.text}")
    return score

def wrong():
    return 3
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ten questions and a script with scorers, in the working directory."""
    rows = [
        {"question": f"question {i}", "choices": ["a", "b", "c"], "answer_index": i % 3, "id": f"q{i}"}
        for i in range(10)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ["eval-mcq", "q.jsonl"]


def row(said, label):
    return re.search(rf"^  {re.escape(label)} +(.*)$", said, re.MULTILINE)[1]


def test_one_model(asked, capsys):
    assert main([*asked, "--model=mine.py:good"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("\nq.jsonl: 10 questions, chance would get 0.333")
    low, high = wilson(10, 10)
    assert row(said.out, "Accuracy, by the mean over the tokens") == f"1.000 [{low:.3f}, {high:.3f}]"
    assert row(said.out, "Margin, nats per token") == "+1.000 [+1.000, +1.000]"
    assert row(said.out, "Could not be scored") == "0 of 10"
    assert "McNemar" not in said.out
    assert said.err == ""


def test_two_models_side_by_side_and_all_of_it_as_json(asked, capsys):
    assert main([*asked, "--policy.path=mine.py:good", "--versus=mine.py:forgetful", "--json=r.json"]) == 0
    said = capsys.readouterr()
    assert row(said.out, "Model").split() == ["mine.py:good", "mine.py:forgetful"]
    assert row(said.out, "Could not be scored").split("  ")[-1] == "1 of 10"
    accuracies = row(said.out, "Accuracy, by the mean over the tokens")
    assert re.findall(r"(?:^| )(\d\.\d{3}) \[", accuracies) == ["1.000", "0.400"], "5 odd ones, one of which failed"
    assert row(said.out, "  of those that could be scored").split() == ["1.000", "0.444"]
    assert row(said.out, "Ties, which count as wrong").split() == ["0", "5"]
    assert row(said.out, "Right before, wrong now") == "6 of 10"
    assert row(said.out, "Wrong before, right now") == "0 of 0"
    assert row(said.out, "McNemar's test, exact") == "p = 0.031"
    assert row(said.out, "Scored by one of them only") == "1"
    assert "mine.py:forgetful: 1 of 10 questions could not be scored" in said.err
    assert "1 x too long" in said.err
    assert "above chance" not in said.err, "that the second is not is what was to be found out"
    assert "preserved" not in said.out + said.err

    report = json.loads(Path("r.json").read_text())
    good, forgetful = (model["summary"] for model in report["models"])
    assert (good["failed"], forgetful["failed"], forgetful["questions"]) == (0, 1, 10)
    assert forgetful["normalized"]["accuracy"] == 0.4
    assert f"[{forgetful['normalized']['accuracy_interval'][0]:.3f}" in accuracies
    assert (report["comparison"]["lost"], report["comparison"]["failed_in_one"]) == (6, 1)
    assert len(report["questions"]) == 10
    assert (report["file"], report["template"]) == ("q.jsonl", None)
    third = report["questions"][3]
    assert (third["id"], third["answer_index"], third["choices"]) == ("q3", 0, ["a", "b", "c"])
    assert third["results"][0] == {
        "right": True,
        "margin": 1.0,
        "log_likelihoods": [-1.0, -2.0, -2.0],
        "tokens": [1, 1, 1],
        "failure": None,
    }
    assert third["results"][1]["failure"] == "too long"
    assert third["results"][1]["right"] is False
    assert sum(each["results"][1]["right"] for each in report["questions"]) == 4
    assert [file.name for file in Path().glob("r.json*")] == ["r.json"]


def test_the_sum_can_decide(asked, capsys):
    assert main([*asked, "--model=mine.py:forgetful", "--score=sum", "--json=r.json"]) == 0
    said = capsys.readouterr().out
    assert row(said, "Margin, nats").startswith("+0.444 [")
    assert row(said, "Accuracy, by the sum over the tokens").startswith("0.400 [")
    report = json.loads(Path("r.json").read_text())
    assert report["score"] == "sum"
    assert report["questions"][1]["results"][0]["margin"] == 1.0


def test_a_limit_spreads_over_the_file(asked):
    assert main([*asked, "--model=mine.py:good", "--limit=2", "--json=r.json"]) == 0
    assert [each["id"] for each in json.loads(Path("r.json").read_text())["questions"]] == ["q2", "q7"]


def test_a_first_model_that_guesses_is_told(asked, capsys):
    assert main([*asked, "--model=mine.py:forgetful"]) == 0
    assert "mine.py:forgetful is not above chance (0.33)" in capsys.readouterr().err


def test_if_all_fail_the_status_says_so(asked, capsys):
    assert main([*asked, "--model=mine.py:good", "--versus=mine.py:broken", "--json=r.json"]) == 1
    said = capsys.readouterr()
    assert row(said.out, "Accuracy, by the mean over the tokens").split()[-3] == "0.000"
    assert "1 x nothing works on question 0" in said.err
    assert "and 5 other reasons" in said.err
    assert "mine.py:broken could not score a single question" in said.err
    assert Path("r.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["q.jsonl"], "--model"),
        (["none.jsonl", "--model=mine.py:good"], "there is no file 'none.jsonl'"),
        (["q.jsonl", "--model=none.py:good"], "there is no file 'none.py'"),
        (["q.jsonl", "--model=mine.py:none"], "there is no function 'none'"),
        (["q.jsonl", "--model=mine.py:wrong"], "must return a scorer"),
        (["q.jsonl", "--model=mine.py:good", "--json=no/r.json"], "no/r.json cannot be written: there is no folder no"),
        (["q.jsonl", "--model=mine.py:good", "--json=."], "--json=. cannot be written: it is a folder"),
        (["q.jsonl", "--model=mine.py:good", "--template={question}"], "--template goes with a checkpoint"),
        (["q.jsonl", "--model=mine.py:good", "--batch-size=2"], "--batch-size goes with a checkpoint"),
        (["q.jsonl", "--model=mine.py:good", "--device=cpu"], "--device goes with a checkpoint"),
        (["q.jsonl", "--model=.", "--template=Q"], "must have {question} once"),
        (["q.jsonl", "--model=mine.py:good", "--score=mean"], "normalized"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(asked, capsys, arguments, remedy):
    with pytest.raises(SystemExit) as stopped:
        main(["eval-mcq", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert remedy in said
    assert said.count("\n") == 1


def test_a_second_model_that_is_none_is_found_before_the_first_works(asked, capsys):
    Path("mine.py").write_text(SCRIPT + "\ndef never():\n    raise AssertionError\n")
    Path("empty").mkdir()
    assert main([*asked, "--model=mine.py:never", "--versus=empty"]) == 1
    assert "empty is no checkpoint: it has neither config.json nor adapter_config.json" in capsys.readouterr().err


def test_names_that_are_neither_folders_nor_on_the_hub(asked, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    for name, complaint in (("not/there", "the hub cannot be reached"), ("a/b/c", "no name on the hub")):
        assert main([*asked, f"--model={name}"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"craft-optim eval-mcq: {name} is no folder, and ")
        assert complaint in said


THINGS = ["sky", "sea", "sun", "ice", "fire", "leaf", "coal", "milk", "rose", "gold", "rust", "sand", "moss", "plum"]
COLOURS = ("blue", "red", "green", "black")


@pytest.fixture(scope="module")
def toys():
    pytest.importorskip("transformers")
    import toys

    return toys


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """Questions to each of which chance has made an answer; for models that cannot know them."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "question": f"{size} {thing}?",
            "choices": COLOURS,
            "answer_index": int(torch.randint(4, (), generator=generator)),
        }
        for size in ("small", "large")
        for thing in THINGS
    ]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def made(toys, rows):
    words = toys.tokenizer(eos=True, corpus=[f"Question: {r['question']}\nAnswer: {c}" for r in rows for c in COLOURS])
    return toys.llama(words), words


def learn(model, words, rows, steps=60):
    """Fine-tunes on the answers alone."""
    batch = words(
        [f"Question: {row['question']}\nAnswer: {row['choices'][row['answer_index']]}" for row in rows],
        return_tensors="pt",
        padding=True,
    )
    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100)
    last = batch["attention_mask"].sum(1) - 2  # before EOS: colours are one token
    labels[torch.arange(len(ids)), last] = ids[torch.arange(len(ids)), last]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(model, words, folder):
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_what_a_model_learns_is_won_and_what_it_forgets_is_lost(toys, colours, capsys):
    half = len(colours) // 2
    model, words = made(toys, colours)
    before = save(model, words, "before")
    after = save(learn(model, words, colours[:half]), words, "after")

    assert main(["eval-mcq", "colours.jsonl", f"--model={before}", f"--versus={after}", "--json=r.json"]) == 0
    assert "not above chance" in capsys.readouterr().err, "of the untrained one"
    report = json.loads(Path("r.json").read_text())
    right = [[each["results"][which]["right"] for each in report["questions"]] for which in (0, 1)]
    assert all(right[1][:half]), "all that it was taught"
    assert sum(right[0][:half]) < half // 2
    assert sum(right[1][half:]) < 0.75 * half, "and not what it was not taught"
    change = report["comparison"]
    assert change["p_value"] < 0.05
    assert change["won"] > change["lost"]
    assert change["accuracy_interval"][0] > 0.0
    taught = [json.dumps(row) for row in colours[:half]]
    Path("taught.jsonl").write_text("\n".join(taught))

    assert main(["eval-mcq", "taught.jsonl", f"--model={after}", f"--versus={before}", "--json=r.json"]) == 0
    change = json.loads(Path("r.json").read_text())["comparison"]
    assert change["won"] == 0
    assert change["lost"] == half - sum(right[0][:half])
    assert change["p_value"] < 0.01
    assert change["margin_interval"][1] < 0.0


def test_adapters_are_scored_with_their_model(toys, colours, capsys):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    model, words = made(toys, colours)
    base = save(model, words, "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    adapted.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained("adapters")
    bare = json.loads(Path("adapters/adapter_config.json").read_text())
    save(adapted.merge_and_unload(), words, "merged")
    scores = {}
    for name in ("base", "adapters", "merged"):
        assert main(["eval-mcq", "colours.jsonl", f"--model={name}", "--limit=3", "--json=r.json"]) == 0
        rows = json.loads(Path("r.json").read_text())["questions"]
        scores[name] = [x for each in rows for x in each["results"][0]["log_likelihoods"]]
    assert scores["adapters"] == pytest.approx(scores["merged"], abs=1e-3)
    assert scores["adapters"] != pytest.approx(scores["base"], abs=1e-1)

    prompt = peft.get_peft_model(
        toys.llama(words), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prompt.peft_config["default"].base_model_name_or_path = base
    prompt.save_pretrained("prompt")
    assert main(["eval-mcq", "colours.jsonl", "--model=prompt"]) == 1
    assert "holds a learned prompt (PROMPT_TUNING)" in capsys.readouterr().err

    weights = load_file("adapters/adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), "adapters/adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["eval-mcq", "colours.jsonl", "--model=adapters"]) == 1
    assert "The adapters in adapters do not fit their model" in capsys.readouterr().err
    Path("adapters/adapter_config.json").write_text(json.dumps({**bare, "base_model_name_or_path": None}))
    assert main(["eval-mcq", "colours.jsonl", "--model=adapters"]) == 1
    assert "do not say which model they belong to" in capsys.readouterr().err


def test_vision_language_models_by_their_folders(toys, tmp_path, monkeypatch):
    from craft_optim.evaluation import load_scorer, read_questions
    from craft_optim.evaluation.language_models import VisionLanguageScorer

    monkeypatch.chdir(tmp_path)
    toys.picture(tmp_path / "a.png", 0)
    row = {"question": "what is this", "choices": ["a red drawer", "ice"], "answer_index": 1, "image_path": "a.png"}
    Path("q.jsonl").write_text(json.dumps(row))
    for name, (model, processor) in {"llava": toys.llava(), "paligemma": toys.paligemma()}.items():
        save(model, processor, name)
        assert main(["eval-mcq", "q.jsonl", f"--model={name}", "--json=r.json"]) == 0
        (each,) = json.loads(Path("r.json").read_text())["questions"]
        (question,) = read_questions("q.jsonl")
        expected = [score.log_likelihood for score in VisionLanguageScorer(model, processor)(question)]
        assert each["results"][0]["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
    assert isinstance(load_scorer("llava", template="Q: {question} A:"), VisionLanguageScorer)


def test_checkpoints_that_cannot_be_scored(toys, colours, capsys):
    from safetensors.torch import load_file, save_file
    from transformers import T5Config, T5ForConditionalGeneration

    model, words = made(toys, colours)
    save(model, words, "llama")
    weights = load_file("llama/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, "llama/model.safetensors", metadata={"format": "pt"})
    save(
        T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)),
        words,
        "t5",
    )
    Path("policy").mkdir()
    Path("policy/config.json").write_text("{")
    for name, complaint in (
        ("llama", "lack 1 tensors of LlamaForCausalLM, such as 'lm_head.weight'"),
        ("t5", "must be a causal language model"),
        ("policy", "cannot be read"),
    ):
        capsys.readouterr()
        assert main(["eval-mcq", "colours.jsonl", f"--model={name}"]) == 1
        assert complaint in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval-mcq", "--help"])
    assert stopped.value.code == 0
    assert '"answer_index": 0}' in capsys.readouterr().out
