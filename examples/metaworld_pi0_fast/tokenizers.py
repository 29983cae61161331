"""The two tokenizers of a pi0-FAST policy, in small and local form.

lerobot takes them by name from the hub: PaliGemma's (a gated model) for text,
`lerobot/fast-action-tokenizer` for actions. A policy of less than a million parameters has no use for
257,000 words; these two have a thousand, are fitted to the demonstrations, and are read from a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import fast_tokenizer

FAST_SKIP_TOKENS = 128
"""Ids kept free at the top of the vocabulary, as in PaliGemma (there they are segmentation tokens)."""


def fit_text_tokenizer(path: Path, instructions: Iterable[str], action_vocab_size: int) -> Any:
    """Builds a byte-pair tokenizer for prompts such as `"Task: Open a drawer, State: 12 200 97 255;"`.

    lerobot writes action token `a` as text id `vocab_size - 1 - 128 - a`, so the vocabulary must end with
    that many ids which no text uses. They are put into the vocabulary proper: added tokens do not count
    in `vocab_size`.

    Args:
        path: Folder to write to.
        instructions: Sentences whose words get tokens of their own. Other words are spelt in pieces.
        action_vocab_size: Number of action tokens.

    Returns:
        The tokenizer, a `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    numbers = " ".join(str(value) for value in range(256))  # lerobot discretises the state into 256 bins
    corpus = [f"Task: {sentence}, State: {numbers};\nAction: |" for sentence in sorted(set(instructions))]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    description = json.loads(tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    for name in [f"<loc{i:04d}>" for i in range(action_vocab_size)] + [
        f"<seg{i:03d}>" for i in range(FAST_SKIP_TOKENS + 1)
    ]:
        vocabulary[name] = len(vocabulary)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    wrapped.save_pretrained(str(path))
    return wrapped


def fit_fast_tokenizer(
    path: Path, chunks: npt.NDArray[np.float32], scale: float = 6.0, vocab_size: int = 256
) -> fast_tokenizer.LocalFastTokenizer:
    """Fits the FAST action tokenizer to normalised action chunks.

    Args:
        path: Folder to write to. It gets a copy of the tokenizer's code, which is how lerobot loads such
            a tokenizer.
        chunks: Normalised actions, shape `(n, horizon, action)`.
        scale: Precision: coefficients are rounded to multiples of `1 / scale`.
        vocab_size: Size of the vocabulary.

    Returns:
        The tokenizer.
    """
    processor = fast_tokenizer.LocalFastTokenizer.fit(chunks, scale=scale, vocab_size=vocab_size)
    path.mkdir(parents=True, exist_ok=True)
    processor.bpe_tokenizer.save_pretrained(str(path / "bpe_tokenizer"))
    shutil.copyfile(fast_tokenizer.__file__, path / "fast_tokenizer.py")
    config = {
        "processor_class": "LocalFastTokenizer",
        "auto_map": {"AutoProcessor": "fast_tokenizer.LocalFastTokenizer"},
        "scale": processor.scale,
        "vocab_size": processor.vocab_size,
        "min_token": processor.min_token,
        "alphabet_size": processor.alphabet_size,
        "action_dim": processor.action_dim,
        "time_horizon": processor.time_horizon,
    }
    (path / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return processor
