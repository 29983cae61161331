"""FAST action tokens: cosine transform, rounding, byte-pair encoding (https://arxiv.org/abs/2501.09747).

A copy of this file lies beside every fitted tokenizer, where `transformers` finds and runs it: it must
not import its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin


class LocalFastTokenizer(ProcessorMixin):  # type: ignore[misc]
    """Chunks of normalised actions to token ids and back, with the attributes that lerobot reads.

    Args:
        bpe_tokenizer: Byte-pair tokenizer over characters, one character per rounded coefficient.
        scale: Coefficients are multiplied by this before rounding.
        vocab_size: Number of action tokens.
        min_token: The smallest coefficient, written as character 0.
        alphabet_size: Number of different coefficients; what lies beyond is clipped.
        action_dim: Numbers per action.
        time_horizon: Actions per chunk.
    """

    attributes = ["bpe_tokenizer"]  # noqa: RUF012 (the base class wants it so)
    bpe_tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        bpe_tokenizer: Any = None,
        scale: float = 10.0,
        vocab_size: int = 256,
        min_token: int = 0,
        alphabet_size: int = 1,
        action_dim: int | None = None,
        time_horizon: int | None = None,
        **kwargs: Any,
    ) -> None:
        del kwargs  # transformers passes every other entry of processor_config.json
        self.scale = scale
        self.vocab_size = vocab_size
        self.min_token = min_token
        self.alphabet_size = alphabet_size
        self.action_dim = action_dim
        self.time_horizon = time_horizon
        super().__init__(bpe_tokenizer)

    def __call__(self, chunks: npt.ArrayLike) -> list[list[int]]:
        """Token ids of each chunk of shape `(n, horizon, action)`, as a list of lists."""
        array = np.asarray(chunks)
        array = array[None] if array.ndim == 2 else array
        coefficients = np.around(dct(array, axis=1, norm="ortho") * self.scale) - self.min_token
        symbols = np.clip(coefficients, 0, self.alphabet_size - 1).astype(int)
        return [self.bpe_tokenizer("".join(map(chr, chunk.flatten())))["input_ids"] for chunk in symbols]

    def decode(
        self, tokens: Sequence[Sequence[int]], time_horizon: int | None = None, action_dim: int | None = None
    ) -> npt.NDArray[np.float64]:
        """Chunks of shape `(n, horizon, action)` from lists of token ids; what is missing counts as zero."""
        horizon, width = time_horizon or self.time_horizon, action_dim or self.action_dim
        if horizon is None or width is None:
            raise ValueError(f"`time_horizon` and `action_dim` must be known. Found {horizon} and {width}. Pass them.")
        chunks = []
        for ids in tokens:
            symbols = self.bpe_tokenizer.decode(ids)
            found = np.array([ord(symbol) for symbol in symbols], dtype=float) + self.min_token
            coefficients = np.zeros(horizon * width)
            coefficients[: len(found)] = found[: horizon * width]
            chunks.append(idct(coefficients.reshape(horizon, width) / self.scale, axis=0, norm="ortho"))
        return np.stack(chunks)

    @classmethod
    def fit(
        cls, chunks: npt.ArrayLike, scale: float = 10.0, vocab_size: int = 256, margin: int = 4
    ) -> "LocalFastTokenizer":
        """Fits the byte-pair merges, and keeps `margin` coefficients beyond the extremes representable."""
        array = np.asarray(chunks)
        coefficients = np.around(dct(array, axis=1, norm="ortho") * scale).astype(int)
        low, high = int(coefficients.min()) - margin, int(coefficients.max()) + margin
        alphabet = [chr(code) for code in range(high - low + 1)]
        if vocab_size <= len(alphabet):
            raise ValueError(
                f"`vocab_size` must exceed the {len(alphabet)} different coefficients. Found {vocab_size}. "
                "Raise it, or lower `scale`."
            )
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=alphabet,
            special_tokens=[],
            max_token_length=10000,
            show_progress=False,
        )
        tokenizer.train_from_iterator(("".join(map(chr, chunk.flatten() - low)) for chunk in coefficients), trainer)
        tokenizer.decoder = decoders.Fuse()  # nothing between tokens: every character is a coefficient
        return cls(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False),
            scale=scale,
            vocab_size=vocab_size,
            min_token=low,
            alphabet_size=len(alphabet),
            action_dim=array.shape[2],
            time_horizon=array.shape[1],
        )
