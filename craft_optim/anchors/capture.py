"""Hidden states of an unmodified model, tapped during its forward, and pooled over spans of positions.

A tap is either a number or a module's name. Number k is the residual stream that enters decoder layer k, k = 0..L; L,
also written -1, is the residual before the final norm. It is read where the layer's first norm receives it, because
some models call a layer's parts and never the layer. A name is that module's output. A forward that stops at the last
tap runs neither later layers nor the vocabulary head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .fsdp2 import fsdp2_around
from .names import class_names, modules_by_name, plain_name
from .passes import Forward, call, eager
from .structure import Inputs

__all__ = [
    "POOLINGS",
    "Decoder",
    "Layer",
    "Spans",
    "default_spans",
    "find_decoder",
    "pool",
    "resolve_layers",
    "run",
    "taps",
    "tied",
]

Layer = int | str
Spans = Callable[[nn.Module, Any], Mapping[str, Tensor]]

POOLINGS = ("mean", "masked_mean", "first", "last", "none")

# (list of layers, final norm) as attributes of a decoder, and names of a layer's first norm
_DECODERS = (("layers", "norm"), ("h", "ln_f"), ("layers", "final_layer_norm"), ("layers", "final_layernorm"))
_FIRST_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_TEXT = ("language_model", "text_model")


class Decoder(NamedTuple):
    """Parts of a decoder that taps need.

    Attributes:
        name: Name of the decoder within the model, "" for the model itself.
        layers: The decoder's layers, in order.
        norm: The norm after the last layer.
    """

    name: str
    layers: nn.ModuleList
    norm: nn.Module


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder whose layers are numbered.

    That is the one module with a list of layers and a final norm beside it (`layers` and `norm` as in Llama, `h` and
    `ln_f` as in GPT-2, ...). If several match, as in vision-language models, it is the one named language or text
    model.

    Raises:
        ValueError: There is none, or more than one candidate.
    """
    found: list[Decoder] = []
    seen: set[int] = set()  # wrappers forward attributes: the same list under several names
    for name, module in model.named_modules():
        for layers_name, norm_name in _DECODERS:
            layers, norm = getattr(module, layers_name, None), getattr(module, norm_name, None)
            if isinstance(layers, nn.ModuleList) and len(layers) and isinstance(norm, nn.Module):
                if id(layers) not in seen:
                    found.append(Decoder(name, layers, norm))
                    seen.add(id(layers))
                break
    if len(found) > 1:
        text = [d for d in found if any(part in _TEXT for part in d.name.split("."))]
        found = text or found
    if len(found) != 1:
        names = ", ".join(repr(d.name) for d in found) or "none"
        raise ValueError(
            f"Numbered `layers` need exactly one decoder in the model; found {names} in {type(model).__name__}. "
            "Give the names of modules instead: their outputs are taken."
        )
    return found[0]


def resolve_layers(model: nn.Module, layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Layers as they are recorded: numbers made non-negative, names checked and plain, repetitions refused.

    Raises:
        ValueError: A number is out of range, a name names no module, or a layer comes twice.
    """
    resolved: list[Layer] = []
    modules = modules_by_name(model)
    for layer in layers:
        if isinstance(layer, str):
            if layer not in modules:
                raise ValueError(f"`layers` must be layer numbers or names of modules. There is no module {layer!r}.")
            layer = plain_name(layer)
        elif isinstance(layer, int) and not isinstance(layer, bool):
            decoder = find_decoder(model)
            last = len(decoder.layers)
            if not -last - 1 <= layer <= last:
                raise ValueError(
                    f"`layers` must be in [{-last - 1}, {last}]: {decoder.name or 'the model'} has {last} layers, "
                    f"and {last} is the residual after the last of them. Found {layer}."
                )
            layer %= last + 1
        else:
            raise TypeError(f"`layers` must be layer numbers or names of modules. Found {layer!r}.")
        if layer in resolved:
            raise ValueError(f"`layers` must be different. {layer!r} comes twice, counted from the front.")
        resolved.append(layer)
    return tuple(resolved)


class _EnoughError(BaseException):
    """Ends a forward whose taps are all filled. Not an Exception: models may catch those."""


def _first_tensor(value: Any) -> Any:
    """The hidden states in a module's input or output: the value itself, or the first of several."""
    while not isinstance(value, Tensor) and isinstance(value, tuple | list | Mapping) and len(value):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def _tapped(model: nn.Module, layers: tuple[Layer, ...]) -> dict[Layer, nn.Module]:
    """Layer -> the module that returns its hidden states; for a number, the module that receives them."""
    named = modules_by_name(model) if any(isinstance(layer, str) for layer in layers) else {}
    found: dict[Layer, nn.Module] = {}
    for layer in layers:
        if isinstance(layer, str):
            found[layer] = named[layer]
            continue
        decoder = find_decoder(model)
        found[layer] = decoder.norm
        if layer < len(decoder.layers):
            block = decoder.layers[layer]
            norms = (getattr(block, name, None) for name in _FIRST_NORMS)
            found[layer] = next((norm for norm in norms if isinstance(norm, nn.Module)), block)
    return found


@contextmanager
def taps(model: nn.Module, layers: Iterable[Layer], *, stop: bool = False) -> Iterator[dict[Layer, Tensor]]:
    """Makes forwards within the block fill the yielded dict with the hidden states of `layers`.

    Hooks keep references and compute nothing; the first firing counts, because activation checkpointing repeats
    forwards. They are removed at the end, whatever happens. With `stop`, the forward is left as soon as the last tap is
    filled; the block then ends there.

    Args:
        model: The unmodified model; it is not modified. Compiled code fires hooks only under `passes.eager`.
        layers: Layers from `resolve_layers`.
        stop: True to leave the forward early.

    Raises:
        ValueError: In the forward: a tap is computed without gradients while the caller has them enabled.
    """
    wanted = tuple(layers)
    gradients = torch.is_grad_enabled()
    out: dict[Layer, Tensor] = {}
    handles = []

    def keep(layer: Layer, value: Any) -> None:
        if layer in out:
            return
        tensor = _first_tensor(value)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Layer {layer!r} gives {type(tensor).__name__}, not a tensor: tap another module.")
        if gradients and not (torch.is_grad_enabled() or tensor.requires_grad):
            raise ValueError(
                f"Layer {layer!r} is computed without gradients, so that nothing could hold its drift: the model runs "
                "it under torch.no_grad(), or within a reentrant activation checkpoint. Use non-reentrant "
                "checkpointing ({'use_reentrant': False} where it is turned on), or tap another layer."
            )
        out[layer] = tensor
        if stop and len(out) == len(wanted):
            raise _EnoughError

    try:
        for layer, module in _tapped(model, wanted).items():
            if isinstance(layer, str):
                after = module.register_forward_hook
                handles.append(after(lambda _, args, output, layer=layer: keep(layer, output)))
                continue
            before = module.register_forward_pre_hook
            handles.append(before(lambda _, args, kwargs, layer=layer: keep(layer, args or kwargs), with_kwargs=True))
        yield out
    except _EnoughError as enough:
        # The frames of the forward hang on the traceback. Drop them now: a suspended checkpoint in there keeps its
        # saved-tensor hooks on the stack until it goes.
        enough.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()


def tied(tensor: Tensor, output: Tensor) -> Tensor:
    """Returns the tensor with a backward that also goes through `output`, where FSDP's own begins."""
    return cast(Tensor, _Tied.apply(tensor, output)) if output.requires_grad else tensor  # type: ignore[no-untyped-call]


class _Tied(torch.autograd.Function):
    """Returns the first tensor; the backward also sends zeros through the second, and so through the whole model."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, output: Tensor) -> Tensor:
        ctx.zeros = output.detach().new_zeros(()).expand(output.shape)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, ctx.zeros


def _begin_at(model: nn.Module, hidden: Mapping[Layer, Tensor]) -> None:
    """Has FSDP2 begin its backward at the hidden states, too, as if the model returned them.

    FSDP2 gathers a module's weights, and arranges that gradients are reduced, when the backward reaches the module's
    output. The loss of a hidden state bypasses the outputs of the modules around it. Tying it to them (`tied`) would
    run the backward of all later layers and of the head on zeros.
    """
    for layer, module in _tapped(model, tuple(hidden)).items():
        for around in fsdp2_around(model, module):
            # Private: a group, `fully_shard([norm, head])`, has no hook of its own at what the first of it returns
            around._get_fsdp_state()._register_pre_backward_hook(hidden[layer])


def run(
    model: nn.Module,
    inputs: Inputs,
    *,
    forward: Forward | None = None,
    layers: tuple[Layer, ...] = (),
    output: bool = True,
) -> tuple[Any, dict[Layer, Tensor]]:
    """Runs one forward; returns its output and the hidden states of `layers`.

    Without `output` the forward ends at the deepest tap and None is returned: neither later layers nor the vocabulary
    head run. Under FSDP it runs to its end, because hooks after the forward prepare the backward; FSDP1's backward,
    too, must begin at the output. FSDP2's begins at the hidden states. With `layers` a compiled model runs as it is
    written.

    Raises:
        ValueError: A tap was not reached, or is computed without gradients.
    """
    if not layers:
        return call(model, inputs, forward), {}
    result: Any = None
    classes = class_names(model)
    fsdp1, fsdp2 = "FullyShardedDataParallel" in classes, "FSDPModule" in classes
    with eager(), taps(model, layers, stop=not (output or fsdp1 or fsdp2)) as hidden:
        result = call(model, inputs, forward)
    end = _first_tensor(result)
    if fsdp1 and isinstance(end, Tensor):
        hidden = {layer: tied(tensor, end) for layer, tensor in hidden.items()}
    if fsdp2:
        _begin_at(model, hidden)
    if missing := [layer for layer in layers if layer not in hidden]:
        raise ValueError(
            f"The forward of {type(model).__name__} never reached layers {missing}: it does not call these "
            "modules. Tap others (`layers=`), by name if need be."
        )
    return (result if output else None), hidden


def default_spans(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Spans of a batch by Hugging Face's conventions.

    "all": `attention_mask` of a mapping batch; without one the span is absent, which means every position. For models
    whose config names an image token, also "image": positions of that token in `input_ids`, and "text": the other
    attended ones.
    """
    if not isinstance(inputs, dict):
        return {}
    spans: dict[str, Tensor] = {}
    attended, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if attended is not None and attended.ndim == 2:
        spans["all"] = attended.bool()
    config = getattr(model, "config", None)
    token = getattr(config, "image_token_id", None)
    if token is None:
        token = getattr(config, "image_token_index", None)
    if ids is not None and token is not None:
        image = ids == token
        spans["image"] = image & spans["all"] if "all" in spans else image
        spans["text"] = ~image & spans["all"] if "all" in spans else ~image
    return spans


def pool(hidden: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    """Hidden states of a span as one vector per anchor.

    - "masked_mean": the mean over the span's positions.
    - "mean": the mean over all T positions, padding included; the span is ignored.
    - "first", "last": the state at the span's first or last position.
    - "none": all of them, `[B, T, D]`.

    Means are taken in float32; positions outside of the span have no influence and get no gradient, whatever they hold.

    Args:
        hidden: `[B, T, D]`.
        mask: `[B, T]`, true on the span; at least one per row. None: every position.
        mode: Pooling mode, one of `POOLINGS`.

    Returns:
        `[B, D]`, float32 for means; `hidden` itself for "none".
    """
    if mode not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {POOLINGS}. Found {mode!r}.")
    if hidden.ndim != 3 or (mask is not None and mask.shape != hidden.shape[:2]):
        found = "no mask" if mask is None else f"mask {tuple(mask.shape)}"
        raise ValueError(
            f"Pooling needs hidden states [B, T, D] and a mask [B, T]. Found {tuple(hidden.shape)}, {found}."
        )
    if mode == "none":
        return hidden
    if mode == "mean" or (mode == "masked_mean" and mask is None):
        return hidden.mean(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if mode == "masked_mean":
        assert mask is not None
        within = torch.where(mask.unsqueeze(-1), hidden, 0.0)
        total = within.sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return total / mask.sum(1, keepdim=True).clamp_min(1)
    if mask is None:
        return hidden[:, 0 if mode == "first" else -1]
    valid = mask.int()
    place = valid.argmax(1) if mode == "first" else mask.shape[1] - 1 - valid.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def positions(hidden: Tensor, batch_dim: int = 0) -> Tensor:
    """Hidden states as `[B, T, D]`, or `[B, D]` where there are no positions.

    Feature maps `[B, C, H, W]` have H * W positions. With `batch_dim` 1 the input is `[T, B, D]`, as in
    `nn.Transformer`.
    """
    if batch_dim == 1 and hidden.ndim == 3:
        return hidden.transpose(0, 1)
    if batch_dim == 0 and hidden.ndim == 4:
        return hidden.flatten(2).transpose(1, 2)
    if batch_dim != 0 or hidden.ndim not in (2, 3):
        raise ValueError(
            "Hidden states must be [B, D], [B, T, D] or [B, C, H, W], or [T, B, D] with batch_dim=1. Found "
            f"{tuple(hidden.shape)} with batch_dim={batch_dim!r}."
        )
    return hidden
