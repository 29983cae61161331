"""The recipe at a tiny scale: every command runs, every number is there, and a second call does nothing."""

import json
import os
import runpy
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="pip install --group example, Python >= 3.12")

import six_experiments as recipe
import torch
from lerobot.scripts import lerobot_train  # noqa: F401  (once, for all forks)
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK, rollouts
from metaworld_pi0_fast.policy import load_policy, make_processors
from metaworld_pi0_fast.rollouts import Rollouts
from safetensors.torch import load_file
from six_experiments_support import commands, comparison, quiz, teaching
from transformers import AutoTokenizer

import craft_optim.cli
import craft_optim.lerobot.pretrained  # noqa: F401  (as lerobot_train above)
from craft_optim.anchors import AnchorCache
from craft_optim.evaluation import read_questions
from craft_optim.lerobot.answers import PI0FastScorer

TINY = ["--steps=2", "--rollouts=2", "--questions=6", "--anchors=6", "--teaching-steps=2", "--loaders=0"]


def in_a_fork(self, name, command):
    """As `Steps._run`, but in a copy of this process: nothing is to be imported again."""
    words = [str(word) for word in command]
    assert Path(words[0]).exists()
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, (self._folder / "logs" / f"{name}.log").read_text()[-3000:]
        return
    status = 1
    try:
        with (self._folder / "logs" / f"{name}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("craft_optim.lerobot.plugin", "small_pi0_fast"):  # what they replace, they replace when imported
            sys.modules.pop(name, None)
        sys.argv = [words[0], *words[1 if words[1] != "-m" else 3 :]]
        try:
            if words[1] == "-m":
                runpy.run_module(words[2], run_name="__main__")
            else:
                runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Pool:
    """In the place of a `RolloutPool`, which simulates: one goal of two of the old task, both of the new one."""

    def __init__(self, workers):
        self.seen = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        assert len(self.seen) == 2 * 5
        assert len(set(self.seen)) == 5, "every policy has its own weights"

    def run(self, policy, processors, task, episodes):
        self.seen.append(float(policy.model.paligemma_with_expert.paligemma.lm_head.weight.double().sum()))
        return Rollouts([True, task == NEW_TASK], [1] * episodes)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a tiny run, and the names of the steps that it did."""
    folder = tmp_path_factory.mktemp("six") / "out"
    # A process of its own: where autograd has used threads, as other tests make it do, its forks could not train
    paths = os.pathsep.join(map(str, [Path(recipe.__file__).parent, os.environ.get("PYTHONPATH", "")]))
    ran = subprocess.run(
        [sys.executable, __file__, str(folder)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    return folder, json.loads((folder / "done.json").read_text())


def run_once(folder):
    genuine = teaching.load_frames
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.Steps, "_run", in_a_fork)
        patch.setattr(rollouts, "RolloutPool", Pool)
        patch.setattr(rollouts, "gl_backend", lambda: "egl")
        patch.setattr(teaching, "load_frames", partial(genuine, episodes=[0, 1, 2, 3, 4]))
        done = recipe.main([*TINY, f"--out={folder}"])
    (folder / "done.json").write_text(json.dumps(done))


def test_every_experiment_leaves_its_files(out):
    folder, done = out
    numbers = {name.partition("-")[0] for name in done}
    assert numbers == set("0123456")
    for run in ("1-adamw", "3-logits", "4-hidden", "4-hidden-both"):
        assert f"{run}-seed0" in done
        assert (folder / "runs" / f"{run}-seed0/checkpoints/last/pretrained_model/model.safetensors").is_file()
    for name in ("mcq", "drift", "layers", "success"):
        assert 5_000 < (folder / f"{name}.png").stat().st_size < 100_000
    assert "| hidden CRaFT (drawer) | 0.50 [0.09, 0.91] | 1.00 [0.34, 1.00] |" in (folder / "table.md").read_text()


@pytest.mark.evidence
def test_the_numbers_are_those_of_the_commands(out):
    folder, _ = out
    record = json.loads((folder / "summary.json").read_text())
    assert list(record["methods"]) == ["pretrained", "adamw", "logits", "hidden", "hidden-both"]
    assert record["settings"]["steps"] == 2
    for name, row in record["methods"].items():
        assert row["mcq"]["questions"] == 6
        assert (row["success"]["old"]["rate"], row["success"]["new"]["rate"]) == (0.5, 1.0)
        if name != "pretrained":
            assert row["drift"]["logits"] > 1e-4
            assert row["forgetting"]["mean"] == 0.0
            assert len(row["layers"]) == 2 * len(recipe.LAYERS)
            assert row["drift"]["hidden"] == pytest.approx(np.mean(list(row["layers"].values())), rel=0.05)
    (adamw,), (logits,) = (record["methods"][name]["curves"] for name in ("adamw", "logits"))
    assert adamw["steps"] == logits["steps"] == [1, 2]
    assert len(adamw["heldout"]["hidden"]) == 2
    assert adamw["heldout"]["logits"][-1] == record["methods"]["adamw"]["drift"]["logits"]
    # Training measures what the command drift does, on the same held-out frames
    assert logits["heldout"]["logits"][-1] == pytest.approx(record["methods"]["logits"]["drift"]["logits"], rel=1e-2)


@pytest.mark.evidence
def test_all_methods_begin_alike_and_have_the_normalisation_of_the_pretrained(out):
    folder, _ = out
    states = []
    for path in [folder / "pretrained", *sorted((folder / "runs").glob("*/checkpoints/last/pretrained_model"))]:
        (file,) = path.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
        states.append(load_file(file))
    assert len(states) == 5
    for found in states[1:]:
        for name in ("observation.state.min", "action.max"):
            torch.testing.assert_close(found[name], states[0][name], rtol=1e-5, atol=1e-6)
    losses = []
    for name in ("3-logits-seed0", "4-hidden-seed0", "4-hidden-both-seed0"):
        lines = (folder / "runs" / name / "craft" / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["loss"])
    assert losses == pytest.approx([losses[0]] * 3), "the same first batch"


@pytest.mark.evidence
def test_anchors_have_questions_as_the_evaluation_asks_them(out):
    folder, _ = out
    tokenizer = AutoTokenizer.from_pretrained(load_policy(ASSETS / "pretrained").config.text_tokenizer_name)
    template = (folder / "quiz" / "template.txt").read_text().removesuffix("{choice}")
    asked = {tuple(tokenizer(template.replace("{question}", question))["input_ids"]) for question in quiz.CHOICES}
    cache = AnchorCache.open(folder / "anchors" / "hidden-both")
    inputs = cache.read(range(len(cache))).inputs
    tokens, masks = inputs[teaching.TOKENS], inputs[teaching.TOKENS_MASK].bool()
    prompts = [tuple(row[mask].tolist()) for row, mask in zip(tokens, masks, strict=True)]
    assert len(prompts) == 12
    assert sum(prompt in asked for prompt in prompts) == 6
    assert asked <= set(prompts)


@pytest.mark.evidence
def test_a_second_call_does_nothing_and_other_settings_are_refused(out, monkeypatch):
    folder, done = out
    assert len(done) > 15
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    del before[folder / "settings.json"]
    monkeypatch.setattr(commands.Steps, "_run", None)
    assert recipe.main([*TINY, f"--out={folder}"]) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(ValueError, match=r"other settings \(steps=2\)"):
        recipe.main([*TINY[1:], "--steps=5", f"--out={folder}"])


@pytest.mark.evidence
def test_a_failed_command_is_told_and_not_marked(tmp_path):
    steps = commands.Steps(tmp_path, {})
    fails = [sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"]
    with pytest.raises(RuntimeError, match=r"(?s)status 3.*no such thing"):
        steps.command("one", fails)
    steps.command("one", [sys.executable, "-c", "print('fine')"])
    assert steps.done_now == ["one"]
    assert (tmp_path / "logs" / "one.log").read_text() == "fine\n"


@pytest.mark.evidence
def test_pictures_show_what_is_asked(tmp_path):
    shown = quiz.pictures(60, 5)
    for question, choices in quiz.CHOICES.items():
        assert {picture.answers[question] for picture in shown} == set(range(len(choices)))
    for picture in shown:
        ground = list(quiz.GROUNDS.values())[picture.answers["ground"]]
        assert np.abs(picture.pixels[:3, :3].mean((0, 1)) - ground).max() < 45
        colour = list(quiz.COLOURS.values())[picture.answers["colour"]]
        near = np.abs(picture.pixels.astype(int) - colour).max(-1) < 45
        assert near.sum() > 60, "the shape is there"
    assert np.array_equal(quiz.pictures(60, 5)[7].pixels, shown[7].pixels)
    questions = read_questions(quiz.write_questions(tmp_path, shown))
    assert len(questions) == 180
    for number, asked in enumerate(questions):
        answer = quiz.CHOICES[asked.text].index(asked.choices[asked.answer])
        assert answer == shown[number // 3].answers[asked.text]
    assert len({asked.answer for asked in questions}) == 4


@pytest.mark.evidence
def test_lessons_have_the_likelihoods_of_the_evaluation(tmp_path):
    # Teaching shifts, pads and masks by itself; eval-mcq does all that in its own way
    policy = load_policy(ASSETS / "pretrained")
    preprocessor = make_processors(policy, path=ASSETS / "pretrained")[0]
    shown = quiz.pictures(1, 0)
    lessons = teaching._Lessons(shown, preprocessor, 24, seed=0)
    with torch.no_grad():
        found = float(lessons.loss(policy))
    generator = torch.Generator().manual_seed(0)
    torch.randint(1, (24,), generator=generator)
    kinds = torch.randint(len(quiz.CHOICES), (24,), generator=generator).tolist()
    scorer = PI0FastScorer(policy, preprocessor, template=teaching.template_of(preprocessor))
    questions = read_questions(quiz.write_questions(tmp_path, shown))
    right = [scorer(asked)[asked.answer] for asked in questions]
    total = sum(right[kind].log_likelihood for kind in kinds)
    assert found == pytest.approx(-total / sum(right[kind].tokens for kind in kinds), rel=1e-4)


def test_success_is_pooled_over_seeds(tmp_path):
    for name, old in (("a", [True] * 4), ("b", [True, False, False, False])):
        (tmp_path / f"success-{name}.json").write_text(json.dumps({OLD_TASK: old, NEW_TASK: [False] * 4}))
    found = comparison._success(tmp_path, ["a", "b"])
    assert (found["old"]["rate"], found["old"]["rollouts"], found["new"]["rate"]) == (5 / 8, 8, 0.0)
    low, high = found["old"]["interval"]
    assert low < 5 / 8 < high
    assert comparison._success(tmp_path, ["a", "c"]) is None


@pytest.mark.evidence
@pytest.mark.parametrize(("given", "said"), [("--rollouts=51", "[0, 50]"), ("--questions=4", "multiple of 3")])
def test_wrong_options(given, said, capsys):
    with pytest.raises(SystemExit):
        recipe.parse([given])
    assert said in capsys.readouterr().err


if __name__ == "__main__":
    run_once(Path(sys.argv[1]))
