"""Multiple-choice questions to the real PI0FastPolicy, against a loop over tokens on lerobot's own prefix and masks."""

import json
import shutil

import numpy as np
import pytest
import small
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from metaworld_pi0_fast import ASSETS
from metaworld_pi0_fast.policy import make_processors
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from craft_optim.cli import main
from craft_optim.evaluation import Question, evaluate, read_questions
from craft_optim.lerobot.answers import PI0FastScorer
from craft_optim.lerobot.pi0_fast import last_hidden

CHOICES = ("a drawer", "button", "the red button on top")
PADDED = 48


def write_picture(path, seed, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def question(tmp_path):
    return Question("what is on the table", CHOICES, 1, write_picture(tmp_path / "a.png", 0))


@pytest.fixture
def preprocessor(policy):
    return make_processors(policy, path=ASSETS / "pretrained")[0]


def tokenizer_of(preprocessor):
    return next(step.input_tokenizer for step in preprocessor.steps if hasattr(step, "input_tokenizer"))


def slowly(policy, pixels, prompt, answer, cameras=("observation.image",)):
    """Sum over the answer's tokens: the prompt padded as lerobot pads it, nothing after the token that is asked for."""
    model, total = policy.model, 0.0
    images, present = policy._preprocess_images(dict.fromkeys(cameras, pixels[None]))
    tokens = F.pad(torch.tensor([prompt]), (0, PADDED - len(prompt)))
    mask = torch.arange(PADDED)[None] < len(prompt)
    for place, token in enumerate(answer):
        before = torch.tensor([answer[:place]], dtype=torch.long) if place else None
        embedded, valid, attention, pictures, _ = model.embed_prefix_fast(
            images, present, tokens, mask, before, None if before is None else torch.ones_like(before, dtype=torch.bool)
        )
        (hidden, _), _ = model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(attention),
            position_ids=torch.cumsum(valid, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=False,
        )
        last = pictures + PADDED + place - 1 if place else pictures + len(prompt) - 1
        logits = model.paligemma_with_expert.paligemma.lm_head(hidden[0, last])
        total += float(logits.double().log_softmax(-1)[token])
    return total


def expected_scores(policy, tokenizer, question, head, cameras=("observation.image",), bos=()):
    pixels = torch.tensor(np.array(Image.open(question.image))).permute(2, 0, 1).float() / 255.0
    prompt = [*bos, *tokenizer(head, add_special_tokens=False)["input_ids"]]
    answers = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in question.choices]
    with torch.no_grad():
        return [(slowly(policy, pixels, prompt, answer, cameras), len(answer)) for answer in answers]


def check(found, expected):
    assert [score.tokens for score in found] == [tokens for _, tokens in expected]
    assert [score.log_likelihood for score in found] == pytest.approx([total for total, _ in expected], rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_choices_token_by_token(policy, preprocessor, question, batch_size):
    expected = expected_scores(policy, tokenizer_of(preprocessor), question, "answer en what is on the table\n")
    assert len({tokens for _, tokens in expected}) > 1
    check(PI0FastScorer(policy, preprocessor, batch_size=batch_size)(question), expected)


def test_pictures_of_another_shape_go_the_policys_way(policy, preprocessor, tmp_path):
    question = Question("what", CHOICES, 0, write_picture(tmp_path / "wide.png", 1, size=(40, 90)))
    expected = expected_scores(policy, tokenizer_of(preprocessor), question, "answer en what\n")
    seen = []
    tower = policy.model.paligemma_with_expert.paligemma.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    check(PI0FastScorer(policy, preprocessor)(question), expected)
    hook.remove()
    assert seen[0].min() < -0.9, "from -1 to 1"
    assert seen[0].max() > 0.9


def test_bos_and_eos_of_the_preprocessors_tokenizer(policy, preprocessor, question):
    tokenizer = tokenizer_of(preprocessor)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = expected_scores(policy, tokenizer, question, "answer en what is on the table\n", bos=[bos])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    assert tokenizer("a")["input_ids"][-1] == eos
    check(PI0FastScorer(policy, preprocessor)(question), expected)


def test_templates_and_texts_longer_than_lerobots_limit(policy, preprocessor, question):
    template = "Task: {question}, State: " + "128 " * 18 + ";\nAction:{choice}"
    head = template.replace("{question}", question.text).removesuffix("{choice}")
    tokenizer = tokenizer_of(preprocessor)
    assert policy.config.tokenizer_max_length < len(tokenizer(head)["input_ids"]) < PADDED
    expected = expected_scores(policy, tokenizer, question, head)
    check(PI0FastScorer(policy, preprocessor, template=template)(question), expected)


def test_one_camera_shows_the_picture_the_others_are_absent(policy, preprocessor, question, monkeypatch):
    alone = PI0FastScorer(policy, preprocessor)(question)
    wrist = {"observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
    monkeypatch.setattr(policy.config, "input_features", policy.config.input_features | wrist)
    seen, genuine = [], policy._preprocess_images
    monkeypatch.setattr(policy, "_preprocess_images", lambda batch: seen.append(next(iter(batch))) or genuine(batch))
    both = PI0FastScorer(policy, preprocessor)(question)
    other = PI0FastScorer(policy, preprocessor, camera="observation.images.wrist")(question)
    assert seen == ["observation.image", "observation.images.wrist"]
    for found in (both, other):
        check(found, [(score.log_likelihood, score.tokens) for score in alone])
    with pytest.raises(ValueError, match=r"observation\.images\.wrist'\]. Found 'top'"):
        PI0FastScorer(policy, preprocessor, camera="top")


def test_the_policys_flags_stay_and_dropout_is_off(policy, preprocessor, question, monkeypatch):
    expected = PI0FastScorer(policy, preprocessor)(question)
    policy.train()
    for layer in policy.model.paligemma_with_expert.paligemma.model.language_model.layers:
        monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.5)
    assert PI0FastScorer(policy, preprocessor)(question) == expected
    assert all(module.training for module in policy.modules())


def test_questions_that_cannot_be_asked_are_failures(policy, preprocessor, question, tmp_path):
    scorer = PI0FastScorer(policy, preprocessor)
    results = evaluate(
        [
            Question("what", ("a", "b"), 0),
            Question("what", ("a", "b"), 0, tmp_path / "none.png"),
            question,
        ],
        scorer,
    )
    assert [bool(result.failure) for result in results] == [True, True, False]
    assert "needs a picture" in results[0].failure
    assert "There is no picture" in results[1].failure


def test_what_cannot_score(policy, preprocessor, tmp_path):
    act = small.build("act", tmp_path)
    with pytest.raises(ValueError, match="must be a pi0_fast"):
        PI0FastScorer(act, preprocessor)
    with pytest.raises(ValueError, match="batch_size=0"):
        PI0FastScorer(policy, preprocessor, batch_size=0)
    without = small.SimpleNamespace(steps=[])
    with pytest.raises(ValueError, match="a step with the tokenizer"):
        PI0FastScorer(policy, without)


def teach(policy, preprocessor, questions, steps=40):
    """Fine-tunes all of it on the answers."""
    tokenizer = tokenizer_of(preprocessor)
    pixels = [np.array(Image.open(question.image)) for question in questions]
    prompt = torch.tensor(tokenizer(f"answer en {questions[0].text}\n")["input_ids"]).expand(len(questions), -1)
    answers = torch.tensor([tokenizer(q.choices[q.answer])["input_ids"] for q in questions])
    batch = {
        "observation.image": torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255.0,
        "observation.language.tokens": prompt,
        "observation.language.attention_mask": torch.ones_like(prompt, dtype=torch.bool),
    }
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(steps):
        hidden = last_hidden(policy, batch, answers, torch.ones_like(answers, dtype=torch.bool))
        logits = policy.model.paligemma_with_expert.paligemma.lm_head(hidden[:, -2:-1])
        F.cross_entropy(logits[:, 0], answers[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_command_tells_what_a_policy_was_taught(pi0_fast, policy, preprocessor, tmp_path, capsys):
    """Which noise is a drawer and which a button: taught to a copy of the checkpoint, which meets the original."""
    count = 12
    rows = [
        {"question": "what", "choices": ["drawer", "button"], "answer_index": i % 2, "image_path": f"{i}.png"}
        for i in range(count)
    ]
    for i in range(count):
        write_picture(tmp_path / f"{i}.png", i)
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = read_questions(tmp_path / "q.jsonl")
    taught = tmp_path / "taught"
    shutil.copytree(pi0_fast, taught)
    before = evaluate(questions, PI0FastScorer(policy, preprocessor))
    teach(policy, preprocessor, questions)
    save_file({name: x.contiguous() for name, x in policy.state_dict().items()}, taught / "model.safetensors")

    report = tmp_path / "r.json"
    ask = ["eval-mcq", str(tmp_path / "q.jsonl"), f"--policy.path={pi0_fast}", f"--versus={taught}"]
    assert main([*ask, f"--json={report}"]) == 0
    found = json.loads(report.read_text())
    for result, row in zip(before, found["questions"], strict=True):
        expected = [score.log_likelihood for score in result.scores]
        assert row["results"][0]["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
    known = sum(result.is_right("normalized") for result in before)
    assert 0 < known < count
    change = found["comparison"]
    assert (change["both"], change["lost"], change["won"]) == (known, 0, count - known)
    assert change["margin_interval"][0] > 0.0
    assert "is not above chance" in capsys.readouterr().err


def test_policies_that_have_no_words_are_refused_by_the_command(tmp_path, capsys):
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    act = small.build("act", tmp_path, **small.features(small.TOP))
    stats = LeRobotDatasetMetadata(f"local/{small.OLD_TASK}", root=ASSETS / "demonstrations" / small.OLD_TASK).stats
    act.save_pretrained(tmp_path / "act")
    for processor in small.make_pre_post_processors(act.config, dataset_stats=stats):
        processor.save_pretrained(tmp_path / "act")
    (tmp_path / "q.jsonl").write_text('{"question": "what", "choices": ["a", "b"], "answer_index": 0}')
    assert main(["eval-mcq", str(tmp_path / "q.jsonl"), f"--model={tmp_path / 'act'}"]) == 1
    assert "must be a pi0_fast" in capsys.readouterr().err
