"""lm-evaluation-harness, with the task that the page has, finds the likelihoods that we find."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import lm_eval
import toys
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from craft_optim.evaluation import evaluate, read_questions, summarise
from craft_optim.evaluation.language_models import LanguageModelScorer

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
QUESTIONS = [
    {
        "question": "is ice hot?",
        "choices": ["no, it is cold", "no", "blue, green", "it is a red button"],
        "answer_index": 0,
    },
    {"question": "what colour is the sky?", "choices": ["red", "blue"], "answer_index": 1},
    {"question": "what is this", "choices": ["a red drawer", "a drawer", "ice"], "answer_index": 2},
]


def test_likelihoods_and_accuracy_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS), encoding="utf-8")
    (task,) = re.findall(r"```yaml\n(task: .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "my_questions.yaml").write_text(task, encoding="utf-8")
    tokenizer = toys.tokenizer()
    model = toys.llama(tokenizer)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, add_bos_token=True),
        tasks=["my_questions"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=True,
        bootstrap_iters=0,
    )
    ours = evaluate(read_questions(file), LanguageModelScorer(model, tokenizer))
    samples = sorted(theirs["samples"]["my_questions"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours) == len(QUESTIONS)
    for sample, result in zip(samples, ours, strict=True):
        found = [likelihood for likelihood, _ in sample["filtered_resps"]]
        assert found == pytest.approx([choice.log_likelihood for choice in result.scores], abs=1e-4)
    assert theirs["results"]["my_questions"]["acc,none"] == summarise(ours).sum.accuracy
