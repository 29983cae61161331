import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install 'craft-optim[transformers]'")
pytest.importorskip("datasets")

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "evaluation"), str(TESTS / "common")]  # for `toys`


@pytest.fixture(scope="session")
def tokenizer():
    """With a chat template that writes roles in capitals, and <eos> after what the assistant says."""
    import toys

    made = toys.tokenizer(bos=True)
    made.chat_template = toys.CHAT
    return made


@pytest.fixture
def llama(tokenizer):
    """An untrained language model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special)).eval()
