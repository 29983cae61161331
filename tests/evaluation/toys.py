"""Language models and vision-language models of transformers at toy size, their tokenizers and processors made here."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

CHAT = (
    "{% for m in messages %}{{ m.role | upper }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ '<eos>' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
CORPUS = [
    "Question: what colour is the sky?\nAnswer: blue",
    "Question: is ice hot?\nAnswer: no, it is cold",
    "answer en what is this\na red drawer",
    "USER: what is this ASSISTANT: a green button",
]


def tokenizer(bos=True, eos=False, corpus=CORPUS, words=True, **settings):
    """Byte pairs with a blank at a word's beginning; with BOS, and EOS, around every text.

    Without `words` tokens go across words.
    """
    specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, min_frequency=1, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    template = " ".join((["<bos>"] if bos else []) + ["$A"] + (["<eos>"] if eos else []))
    made.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        **{"pad_token": "<pad>"} | settings,
    )


def metaspace_tokenizer():
    """As those of SentencePiece, with bytes for unknown characters; BOS before every text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    specials = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, min_frequency=1, special_tokens=specials[:4], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    description = json.loads(made.to_str())
    vocabulary = description["model"]["vocab"]
    for name in specials[4:]:
        vocabulary[name] = len(vocabulary)
    made = Tokenizer.from_str(json.dumps(description))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def _text(vocabulary):
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
    }


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _made(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that every token matters
                torch.nn.init.normal_(parameter, std=2.0 * parameter[0].numel() ** -0.5)
    return model.eval()


def llama(words, **settings):
    return _made(LlamaForCausalLM, LlamaConfig(**_text(len(words)) | settings))


def llava(chat=True):
    words = tokenizer(extra_special_tokens={"image_token": "<image>"})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_text(len(words))),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(pictures, words, chat_template=CHAT if chat else None, **settings)
    return _made(LlavaForConditionalGeneration, config), processor


def paligemma():
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 makes a PaliGemmaProcessor with Gemma's own tokenizer alone")
    pictures = SiglipImageProcessor(size={"height": 16, "width": 16}, image_seq_length=4)
    processor = PaliGemmaProcessor(pictures, tokenizer(extra_special_tokens={"image_token": "<image>"}))
    words = processor.tokenizer
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_VISION),
        text_config=GemmaConfig(**_text(len(words))),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return _made(PaliGemmaForConditionalGeneration, config), processor


def idefics3():
    words = tokenizer(extra_special_tokens={"image_token": "<image>"})
    config = Idefics3Config(
        vision_config=_VISION | {"num_channels": 3},
        text_config={"model_type": "llama"} | _text(len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        scale_factor=2,
    )
    pictures = Idefics3ImageProcessor(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    processor = Idefics3Processor(pictures, words, image_seq_len=1, chat_template=CHAT)
    return _made(Idefics3ForConditionalGeneration, config), processor


def picture(path, seed):
    """A file with a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


transformers.logging.set_verbosity_error()
