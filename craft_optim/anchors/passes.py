"""Passes over anchors, alike for the teacher and every retention loss: the model as it is, without noise.

Drift must be the distance between two functions, not noise: dropout is off and normalisation statistics are fixed.
Training must not notice: flags, random numbers and autocast are restored afterwards.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim._conditions import Setting, eager, with_settings

from .names import unwrapped
from .structure import Inputs, map_tensors

__all__ = [
    "autocast_dtype",
    "autocast_to",
    "call",
    "checkpoints_activations",
    "device_of",
    "eager",
    "is_compiled",
    "is_encoder_decoder",
    "is_noisy",
    "isolated_rng",
    "logits_of",
    "saving_hooks",
    "steady",
    "to_device",
]

Forward = Callable[[nn.Module, Any], Any]

_KINDS = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,  # batch and instance norm
    nn.MultiheadAttention,  # drops attention weights by a functional call
)
_NAMES = ("Dropout", "DropPath", "StochasticDepth", "BatchNorm", "SpectralNorm")
_NUMBERS = (
    "drop",
    "jitter",
    "mask_time_prob",
    "mask_feature_prob",
)  # in names of probabilities; 0 is no noise


def is_noisy(module: nn.Module) -> bool:
    """True if the module's own forward depends on `training`: dropout, normalisation statistics, functional dropout."""
    if _is_noisy_kind(type(module)):  # type: ignore[arg-type]  # nn.Module hides that types are hashable
        return True
    own = vars(module)
    names = " ".join(own)  # every pass asks this of every module: most have no such name, and no children
    # A module that checkpoints its activations does so only while `training`: eval mode would cost the memory it saves.
    if "checkpoint" in names and checkpoints_activations(module):
        return False
    # GPT-2's attention reads the probability off its dropout child and its own `training`.
    if any(isinstance(child, nn.modules.dropout._DropoutNd) for child in module._modules.values()):
        return True
    return bool(_probabilities(module))


def _probabilities(owner: Any) -> list[str]:
    """Names of the owner's numbers that make noise in a module in train mode."""
    own = vars(owner)
    text = " ".join(own)
    if not any(part in text for part in _NUMBERS):
        return []
    return [
        name
        for name, value in own.items()
        if isinstance(value, float | int) and 0 < value <= 1 and value is not True and any(x in name for x in _NUMBERS)
    ]


def _steady_settings(model: nn.Module) -> Iterator[Setting]:
    """Settings of a steady pass: eval mode for noisy modules, probability 0 elsewhere.

    Probabilities are set to 0 in modules that checkpoint their activations, which must stay in train mode, and in
    configs that a forward reads.
    """
    configs = {}
    for module in model.modules():
        if is_noisy(module):
            yield Setting(module, "training", False)
        elif "checkpoint" in " ".join(vars(module)) and checkpoints_activations(module):
            yield from (Setting(module, name, 0.0) for name in _probabilities(module))
            drops = (child for child in module._modules.values() if isinstance(child, nn.modules.dropout._DropoutNd))
            yield from (Setting(drop, "p", 0.0) for drop in drops)
        if module.training and hasattr(config := vars(module).get("config"), "__dict__"):
            configs[id(config)] = config
    for config in configs.values():
        yield from (Setting(config, name, 0.0) for name in _probabilities(config))


def checkpoints_activations(module: nn.Module) -> bool:
    """True if the module itself repeats its forward in the backward, by the flags that libraries set."""
    return any("checkpoint" in name and value is True for name, value in vars(module).items())


@lru_cache(maxsize=1024)
def _is_noisy_kind(kind: type[nn.Module]) -> bool:
    return issubclass(kind, _KINDS) or any(name in kind.__name__ for name in _NAMES)


@contextmanager
def steady(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Turns randomness off and fixes normalisation within the block; afterwards everything is what it was.

    Noisy modules are in eval mode. Others keep their mode: `model.eval()` would switch gradient checkpointing off.
    Probabilities in modules that checkpoint, and in configs, are 0. Yields a function that makes a loss remember this
    for its backward; it changes nothing without activation checkpointing. A compiled model is compiled once more for
    this mode and keeps both.
    """
    with with_settings([*_steady_settings(model)]) as remember:
        yield remember


def saving_hooks() -> Any:
    """The current saved-tensor hooks of autograd; a non-reentrant activation checkpoint has its own.

    Always None in torch 2.6, which does not expose them.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


@contextmanager
def isolated_rng(device: torch.device, seed: int | None) -> Iterator[None]:
    """Starts the CPU's and `device`'s random numbers from `seed` within the block (None: from their current state).

    Afterwards both generators are as before.
    """
    accelerator: Any = None if device.type in ("cpu", "meta") else getattr(torch, device.type)
    here = accelerator.device(device) if hasattr(accelerator, "device") else nullcontext()
    with here:
        states = torch.get_rng_state(), accelerator.get_rng_state() if accelerator else None
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed every accelerator
            if accelerator:
                with here:
                    accelerator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        if accelerator:
            with here:
                accelerator.set_rng_state(states[1])


def autocast_dtype(device: torch.device, wanted: torch.dtype | None) -> torch.dtype | None:
    """Autocast dtype of a pass with `autocast=wanted` now; None if autocast is off."""
    if wanted is not None:
        return wanted
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_to(device: torch.device, wanted: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `wanted`; None leaves autocast as it is."""
    if wanted is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=wanted)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The batch on `device`; tensors already there are not copied."""

    def move(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x.to(device)

    moved: Inputs = map_tensors(move, inputs)
    return moved


def call(model: nn.Module, inputs: Inputs, forward: Forward | None) -> Any:
    """Calls `forward(model, inputs)`, or the model on the tensor, tuple or mapping.

    `labels` are not passed to models of transformers: their loss is not needed.
    """
    if forward is not None:
        return forward(model, inputs)
    if isinstance(inputs, dict) and "labels" in inputs and _labels_are_targets(model, inputs):
        inputs = {name: x for name, x in inputs.items() if name != "labels"}
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(unwrapped(model).forward).bind(*args, **kwargs)
        except TypeError as reason:
            found = f"entries {[*kwargs]}" if kwargs else f"{len(args)} tensor{'s' * (len(args) != 1)}"
            raise TypeError(
                f"{type(unwrapped(model)).__name__} cannot be called with this batch of {found}: {reason}. Anchors "
                "need the model's inputs alone, without labels: leave others out of the batches, or pass "
                f"forward=lambda model, batch: model(batch[{next(iter(kwargs), 0)!r}])."
            ) from error
        except ValueError:  # its arguments are unknown
            pass
        raise


def is_compiled(model: nn.Module) -> bool:
    """True if the model, or a module in it, is compiled by torch.compile."""
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """True if the model's transformers config says that it is an encoder-decoder model."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def _labels_are_targets(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """True if `labels` would only make a model of transformers compute its loss."""
    if getattr(unwrapped(model), "config", None) is None:
        return False
    derived = "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs
    return not (is_encoder_decoder(model) and derived)


def logits_of(output: Any) -> Tensor | None:
    """The logits in the output of a model or `forward`: the tensor itself, `.logits`, or `["logits"]`."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None
