"""Scorers for models of transformers, against loops that run the model once per token on nothing but what is before."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import toys
from PIL import Image

from craft_optim.evaluation import Question
from craft_optim.evaluation.language_models import LanguageModelScorer, VisionLanguageScorer

SKY = Question("what colour is the sky?", ("blue", "no, it is cold", "a green button", "é☃"), 0)


@pytest.fixture
def drawer(tmp_path):
    return Question("what is this", ("a red drawer", "ice", "a green button"), 0, toys.picture(tmp_path / "a.png", 0))


def slowly(logits_of, context, answer):
    """Sum over the answer's tokens, the model given no more than what is before each."""
    total = 0.0
    for place, token in enumerate(answer):
        total += float(logits_of([*context, *answer[:place]]).double().log_softmax(-1)[token])
    return total


def check(found, expected):
    assert [score.tokens for score in found] == [tokens for _, tokens in expected]
    assert [score.log_likelihood for score in found] == pytest.approx([total for total, _ in expected], rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, True), (False, False)])
def test_a_language_model_token_by_token(bos, eos, batch_size):
    words = toys.tokenizer(bos, eos)
    model = toys.llama(words).double()
    expected = []
    for choice in SKY.choices:
        prompt = words(f"Question: {SKY.text}\nAnswer:", add_special_tokens=False)["input_ids"]
        answer = words(f" {choice}", add_special_tokens=False)["input_ids"]
        context = [1] * bos + prompt
        total = slowly(lambda ids: model(torch.tensor([ids])).logits[0, -1].detach(), context, answer)
        expected.append((total, len(answer)))
    check(LanguageModelScorer(model, words, batch_size=batch_size)(SKY), expected)


def test_a_merge_across_the_boundary_is_scored_as_likelihood_of_the_text():
    # Of "?blue" this tokenizer makes a token that holds the question's last character, of "?red" it does not.
    words = toys.tokenizer(corpus=["what?blue", "what?blue", "why?", "red"], words=False)
    question = Question("what?", ("blue", "red"), 0)
    rows = [words(f"what?{choice}")["input_ids"] for choice in question.choices]
    assert rows[0][1:] == words.convert_tokens_to_ids(["what?blue"])
    assert len(rows[1]) > 2
    model = toys.llama(words).double()
    expected = [
        (slowly(lambda ids: model(torch.tensor([ids])).logits[0, -1].detach(), [1], row[1:]), len(row) - 1)
        for row in rows
    ]
    check(LanguageModelScorer(model, words, template="{question}{choice}")(question), expected)


def test_a_tokenizer_without_padding_and_a_model_without_a_limit():
    bare = toys.tokenizer(pad_token=None)
    assert bare.pad_token is None
    model = toys.llama(bare)
    scores = LanguageModelScorer(model, bare)(SKY)
    assert scores == LanguageModelScorer(model, toys.tokenizer())(SKY)


def test_only_the_logits_that_count_are_computed():
    words = toys.tokenizer()
    model, sizes = toys.llama(words), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    longest = max(score.tokens for score in LanguageModelScorer(model, words)(SKY))
    assert sizes == [longest + 1]


def test_the_models_flags_stay_and_dropout_is_off():
    words = toys.tokenizer()
    model = toys.llama(words, attention_dropout=0.5)
    expected = LanguageModelScorer(model, words)(SKY)
    model.train()
    assert LanguageModelScorer(model, words)(SKY) == expected
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_chat_template_writes_bos_itself_and_its_end_is_not_scored():
    words = toys.tokenizer(chat_template="<bos>" + toys.CHAT)
    model = toys.llama(words).double()
    expected = []
    for choice in SKY.choices:
        context = words(f"<bos>USER: {SKY.text} ASSISTANT:", add_special_tokens=False)["input_ids"]
        answer = words(f" {choice}", add_special_tokens=False)["input_ids"]
        total = slowly(lambda ids: model(torch.tensor([ids])).logits[0, -1].detach(), context, answer)
        expected.append((total, len(answer)))
    check(LanguageModelScorer(model, words, template="chat")(SKY), expected)


def test_bytes_in_the_place_of_unknown_characters():
    # As Llama's first tokenizers: "_" for blanks, one in front, and bytes for what is not in the vocabulary
    words = toys.metaspace_tokenizer()
    question = Question("what?", ("blue", "a green é"), 0)
    model = toys.llama(words).double()
    expected = []
    for choice in question.choices:
        row = words(f"Question: what?\nAnswer: {choice}")["input_ids"]
        count = len(words.tokenize(f" {choice}"))
        context, answer = row[:-count], row[-count:]
        assert words.decode(answer).strip() == choice
        total = slowly(lambda ids: model(torch.tensor([ids])).logits[0, -1].detach(), context, answer)
        expected.append((total, count))
    assert words.convert_tokens_to_ids("<0xC3>") in answer
    check(LanguageModelScorer(model, words)(question), expected)


@pytest.mark.parametrize("make", [toys.llava, toys.idefics3])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_vision_language_model_token_by_token(make, batch_size, drawer):
    model, processor = make()
    model = model.double()
    image = [[Image.open(drawer.image)]]
    expected = []
    for choice in drawer.choices:
        prompt = f"USER: <image>{drawer.text} ASSISTANT:"
        context = processor(text=[prompt], images=image, return_tensors="pt")
        answer = processor.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        pixels = {name: x for name, x in context.items() if name.startswith("pixel")}

        def logits_of(ids, pixels=pixels):
            return model(input_ids=torch.tensor([ids]), **pixels).logits[0, -1].detach()

        expected.append((slowly(logits_of, context["input_ids"][0].tolist(), answer), len(answer)))
    check(VisionLanguageScorer(model, processor, batch_size=batch_size)(drawer), expected)


def test_a_vision_language_model_without_a_chat_template(drawer):
    model, processor = toys.llava(chat=False)
    model = model.double()
    plain = VisionLanguageScorer(model, processor)(drawer)
    for template in ("<image>Question: {question}\nAnswer:", "Question: {question}\nAnswer:"):
        assert VisionLanguageScorer(model, processor, template=template)(drawer) == plain
    late = VisionLanguageScorer(model, processor, template="Question: {question}<image>\nAnswer:")(drawer)
    assert late != plain


def test_a_processors_chat_template_that_writes_bos_itself(drawer):
    model, processor = toys.llava()
    plain = VisionLanguageScorer(model, processor)(drawer)
    processor.chat_template = "<bos>" + toys.CHAT
    assert VisionLanguageScorer(model, processor)(drawer) == plain


def test_a_processor_that_cannot_pad(drawer):
    model, processor = toys.llava()
    plain = VisionLanguageScorer(model, processor, batch_size=1)(drawer)
    processor.tokenizer.pad_token = None
    assert VisionLanguageScorer(model, processor)(drawer) == plain


def test_questions_without_pictures_and_the_difference_that_pictures_make(drawer, tmp_path):
    model, processor = toys.llava()
    scorer = VisionLanguageScorer(model.double(), processor)
    other = Question(drawer.text, drawer.choices, drawer.answer, toys.picture(tmp_path / "b.png", 1))
    without = Question(drawer.text, drawer.choices, drawer.answer)
    assert scorer(drawer)[0].log_likelihood != pytest.approx(scorer(other)[0].log_likelihood, abs=1e-3)
    words = processor.tokenizer
    expected = []
    for choice in without.choices:
        context = words(f"USER: {without.text} ASSISTANT:")["input_ids"]
        answer = words(f" {choice}", add_special_tokens=False)["input_ids"]
        total = slowly(lambda ids: model(input_ids=torch.tensor([ids])).logits[0, -1].detach(), context, answer)
        expected.append((total, len(answer)))
    check(scorer(without), expected)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_paligemma_attends_its_prompt_in_both_directions_and_the_choice_causally(batch_size, drawer):
    model, processor = toys.paligemma()
    model = model.double()
    context = processor(text=["<image>answer en what is this"], images=[Image.open(drawer.image)], return_tensors="pt")
    prefix = context["input_ids"][0].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(prefix[-1]) == "Ċ"

    def logits_of(ids, kinds=None):
        kinds = [0] * len(prefix) + [1] * (len(ids) - len(prefix)) if kinds is None else kinds
        types = torch.tensor([kinds])
        pixels = context["pixel_values"]
        return model(input_ids=torch.tensor([ids]), token_type_ids=types, pixel_values=pixels).logits[0, -1].detach()

    expected = []
    for choice in drawer.choices:
        answer = processor.tokenizer(choice, add_special_tokens=False)["input_ids"]
        expected.append((slowly(logits_of, prefix, answer), len(answer)))
    check(VisionLanguageScorer(model, processor, batch_size=batch_size)(drawer), expected)
    causal = logits_of(prefix, [1] * len(prefix))
    assert not torch.allclose(logits_of(prefix), causal, atol=1e-3), "the prompt's direction matters"


def test_pictures_are_as_the_processor_makes_them(drawer):
    model, processor = toys.paligemma()
    seen = []
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    VisionLanguageScorer(model, processor)(drawer)
    expected = processor.image_processor(Image.open(drawer.image), return_tensors="pt")["pixel_values"][0]
    assert expected.min() < -0.9
    assert all(torch.equal(row, expected) for row in seen[0])


def test_pictures_have_the_models_precision(drawer):
    model, processor = toys.llava()
    single = VisionLanguageScorer(model, processor)(drawer)
    seen = []
    model.register_forward_pre_hook(lambda m, args, inputs: seen.append(inputs["pixel_values"].dtype), with_kwargs=True)
    half = VisionLanguageScorer(model.bfloat16(), processor)(drawer)
    assert seen == [torch.bfloat16]
    assert [x.log_likelihood for x in half] == pytest.approx([x.log_likelihood for x in single], rel=0.05)


class LooksAhead(nn.Module):
    """Every position sees all tokens."""

    def __init__(self, vocabulary):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return type("Output", (), {"logits": self.head(x + 4.0 * x.mean(1, keepdim=True))})


def test_a_model_that_sees_the_answer_is_refused():
    words = toys.tokenizer()
    with pytest.raises(ValueError, match="sees the choice that it is asked about"):
        LanguageModelScorer(LooksAhead(len(words)), words)(SKY)


def test_questions_that_cannot_be_asked(drawer, tmp_path):
    words = toys.tokenizer()
    model = toys.llama(words)
    scorer = LanguageModelScorer(model, words)
    with pytest.raises(ValueError, match="LlamaForCausalLM reads text only"):
        scorer(drawer)
    with pytest.raises(ValueError, match=r"has \d+ tokens, of which the model takes 256"):
        scorer(Question("why " * 300, ("a", "b"), 0))
    vision = VisionLanguageScorer(*toys.paligemma())
    with pytest.raises(ValueError, match="needs a picture"):
        vision(SKY)
    with pytest.raises(ValueError, match="There is no picture"):
        vision(Question("what", ("a", "b"), 0, tmp_path / "none.png"))


def test_characters_that_a_processor_drops_are_told(drawer):
    model, processor = toys.llava()
    from tokenizers.normalizers import Replace

    processor.tokenizer.backend_tokenizer.normalizer = Replace("☃", "")
    scorer = VisionLanguageScorer(model, processor)
    for choices in (("a", "b☃"), ("☃", "☃☃")):
        with pytest.raises(ValueError, match=r"does not know|same tokens|nothing of choice"):
            scorer(Question("what", choices, 0, drawer.image))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: LanguageModelScorer(toys.llama(toys.tokenizer()), toys.tokenizer(), template="chat"), "chat template"),
        (lambda: LanguageModelScorer(toys.llama(toys.tokenizer()), toys.tokenizer(), template="Q"), "{question} once"),
        (lambda: LanguageModelScorer(toys.llama(toys.tokenizer()), toys.tokenizer(), batch_size=0), "batch_size=0"),
        (lambda: LanguageModelScorer(toys.llama(toys.tokenizer()), object()), "which characters"),
        (lambda: VisionLanguageScorer(*toys.llava(chat=False), template="chat"), "chat template"),
        (lambda: VisionLanguageScorer(*toys.paligemma(), template="{question} {choice}"), "new line"),
    ],
)
def test_what_a_scorer_refuses(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


def test_encoders_with_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    with pytest.raises(ValueError, match="an encoder"):
        LanguageModelScorer(model, toys.tokenizer())
