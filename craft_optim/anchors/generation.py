"""Generation by the teacher: its tokens become inputs of a forward that predicts each of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim._numbers import number, whole

from .masks import IGNORED
from .names import unwrapped
from .passes import is_encoder_decoder
from .structure import Inputs

__all__ = ["Generate", "greedy", "right_padded", "sampled", "sampling"]

Generate = Callable[[nn.Module, Any], tuple[Inputs, Tensor]]

# Inputs with one entry per token; `mm_token_type_ids` separate pictures from texts
_WITH_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def greedy(max_new_tokens: int) -> Generate:
    """Greedy decoding (temperature 0, one beam) with `model.generate` of transformers.

    Prompts may be padded on either side. The result is padded on the right: the prompt, then the generated tokens up to
    and including the first end-of-sequence token.

    Args:
        max_new_tokens: Largest number of generated tokens; >= 1.

    Returns:
        `generate(model, batch) -> (inputs, labels)`: the batch with the new `input_ids` and `attention_mask` (and
        `token_type_ids`, 1 where generated, and `mm_token_type_ids`, 0 there), and labels of the logits `[B, T]`: at
        each position the next token, if the model generated it; -100 on the prompt, on padding and after the end.

    Raises:
        ValueError: In use: the model cannot generate, or not from such a batch.
    """
    max_new_tokens = whole("tokens", max_new_tokens)
    return _writing(f"greedy, at most {max_new_tokens}", max_new_tokens, do_sample=False)


def sampled(max_new_tokens: int, temperature: float = 1.0) -> Generate:
    """Sampling from the whole distribution with `model.generate` of transformers; otherwise like `greedy`.

    On one machine the same anchors give the same tokens: `build` restarts the random numbers at each batch.

    Args:
        max_new_tokens: Largest number of generated tokens; >= 1.
        temperature: Divisor of the logits; > 0.

    Raises:
        ValueError: As for `greedy`.
    """
    max_new_tokens = whole("tokens", max_new_tokens)
    how = sampling(temperature)
    return _writing(f"sampled at temperature {how['temperature']:g}, at most {max_new_tokens}", max_new_tokens, **how)


def sampling(temperature: float) -> dict[str, Any]:
    """Settings of `generate` that sample from the whole distribution.

    Raises:
        TypeError, ValueError: The temperature is not a number > 0.
    """
    temperature = number("temperature", temperature, least=0.0, above=True)
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def _writing(name: str, max_new_tokens: int, **how: Any) -> Generate:
    def generate(model: nn.Module, batch: Any) -> tuple[Inputs, Tensor]:
        writer: Any = unwrapped(model)
        if not hasattr(writer, "generate") or is_encoder_decoder(model):
            raise ValueError(
                "`tokens` as a number needs a decoder with `generate`, as transformers' have. Found "
                f"{type(writer).__name__}: pass a function, tokens=generate, see `generation.greedy`."
            )
        if not isinstance(batch, dict) or "input_ids" not in batch:
            raise ValueError("`tokens` as a number needs batches with `input_ids`. Pass a function for others.")
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        strange = [
            name
            for name, x in batch.items()
            if name not in (*_WITH_TOKENS, "labels") and x.shape == ids.shape and not x.is_floating_point()
        ]
        if strange:
            raise ValueError(
                f"`tokens` as a number does not know how to continue the inputs {strange}, which have one entry per "
                "token. Leave them out of the batches, or pass a function."
            )
        prompt = {name: x for name, x in batch.items() if name != "labels"}
        for name in _WITH_TOKENS:
            if name in prompt:
                prompt[name] = left_padded(prompt[name], mask)
        prompt["attention_mask"] = left_padded(mask, mask)
        config = writer.generation_config
        stops = config.eos_token_id
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        pad = config.pad_token_id if config.pad_token_id is not None else (stops or [0])[0]
        written: Tensor = writer.generate(**prompt, max_new_tokens=max_new_tokens, num_beams=1, pad_token_id=pad, **how)
        return right_padded(batch, mask, written[:, ids.shape[1] :], stops)

    generate.__qualname__ = name
    return generate


def left_padded(x: Tensor, mask: Tensor) -> Tensor:
    """Rows `[B, T]` with the positions outside of `mask` moved to the front."""
    order = mask.bool().long().sort(dim=1, stable=True).indices
    return x.gather(1, order)


def right_padded(
    batch: dict[str, Tensor], mask: Tensor, new: Tensor, stops: list[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts followed by the generated tokens, and the labels of their logits; see `greedy`.

    Args:
        batch: Inputs, `input_ids` `[B, T]` among them.
        mask: `[B, T]`, true on the prompt.
        new: Generated tokens `[B, N]`; arbitrary after the first of `stops`.
        stops: End-of-sequence tokens.
    """
    ends = torch.zeros_like(new, dtype=torch.bool)
    for stop in stops:
        ends |= new == stop
    kept = (ends.long().cumsum(1) - ends.long()) == 0  # up to and including the first end
    valid = torch.cat([mask.bool(), kept], dim=1)
    order = (~valid).long().sort(dim=1, stable=True).indices
    valid = valid.gather(1, order)
    length = int(valid.sum(1).max())

    def arranged(prompt: Tensor, generated: Tensor) -> Tensor:
        whole = torch.cat([prompt, generated.to(prompt.dtype)], dim=1).gather(1, order)
        return torch.where(valid, whole, torch.zeros_like(whole))[:, :length]

    inputs = {name: x for name, x in batch.items() if name != "labels"}
    inputs["input_ids"] = arranged(batch["input_ids"], new)
    inputs["attention_mask"] = arranged(mask, torch.ones_like(new))
    if "token_type_ids" in batch:
        inputs["token_type_ids"] = arranged(batch["token_type_ids"], torch.ones_like(new))
    if "mm_token_type_ids" in batch:
        inputs["mm_token_type_ids"] = arranged(batch["mm_token_type_ids"], torch.zeros_like(new))
    targets = arranged(torch.full_like(batch["input_ids"], IGNORED), new)
    targets = torch.where(valid[:, :length], targets, IGNORED)
    labels = torch.full_like(targets, IGNORED)
    labels[:, :-1] = targets[:, 1:]
    return inputs, labels
