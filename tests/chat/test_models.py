"""Language models from GGUF files, with the tokenizer that the file says."""

import pytest
import torch

from craft_optim.chat import load_language_model

gguf = pytest.importorskip("gguf")

TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }} {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant {% endif %}"
)
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"} | {
    f"model.layers.0.{name}": f"blk.0.{short}" for name, short in PARTS.items()
}


@pytest.fixture
def file(tmp_path):
    """A Llama of one layer with a tokenizer of bytes, two merges and a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<unk>", "<start>", "<end>", *bytes_to_unicode().values(), "Ġi", "Ġis"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), tie_word_embeddings=True, **sizes))
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ i", "Ġi s"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(f"{NAMES[name.removesuffix('.weight')]}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_special_tokens_are_those_of_the_file(file):
    _, tokenizer = load_language_model(str(file))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")


def test_a_saved_model_and_its_tokenizer_are_loaded_as_they_were(file, tmp_path):
    model, tokenizer = load_language_model(str(file))
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    again, of_again = load_language_model(str(saved))
    text = "What is it, a café?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert of_again(text)["input_ids"] == ids
    assert of_again.decode(ids, skip_special_tokens=True) == text
    chat = [{"role": "user", "content": text}]
    assert of_again.apply_chat_template(chat, tokenize=False) == f"<start>user {text}<end>"
    with torch.no_grad():
        logits, of_saved = (m(torch.tensor([ids])).logits for m in (model, again))
    assert torch.equal(logits, of_saved)
