#!/usr/bin/env bash
# transformers 5.5.4: after `resize_token_embeddings`, the head of a model with tied embeddings has the new weight and the
# old `out_features`.
#
# Expected: `lm_head.out_features` is the number of rows of `lm_head.weight`, as it is without tied embeddings, and as
#     `embed_tokens.num_embeddings` is in both cases.
# Seen: of the tied model it stays the old vocabulary. The forward uses the weight and is right; whoever reads the size of
#     a linear module off its attributes, as its repr does, is told the old one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.11.0 transformers==5.5.4
"$folder/env/bin/python" -W ignore - <<'PYTHON' | tee "$folder/seen"
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
for tied in (False, True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.resize_token_embeddings(100, mean_resizing=False)
    head, embedding = model.lm_head, model.model.embed_tokens
    logits = model(torch.tensor([[1, 2, 3]])).logits
    print(
        f"tied={tied}: embedding {embedding.num_embeddings}, weight {len(head.weight)}, logits {logits.shape[-1]}, "
        f"out_features {head.out_features}"
    )
PYTHON
diff "$folder/seen" - <<'SEEN'
tied=False: embedding 100, weight 100, logits 100, out_features 100
tied=True: embedding 100, weight 100, logits 100, out_features 60
SEEN
