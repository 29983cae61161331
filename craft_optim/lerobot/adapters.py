"""Adapters: one interface to anchor any of lerobot's policies that are known here.

    adapter = adapter_for(policy)
    batches = anchor_batches(dataset, preprocessor, adapter, count=256)
    cache = adapter.build(policy, batches, "anchors/")  # before fine-tuning
    retention = adapter.retention(policy, cache, batch_size=16)

Outputs of a policy that can be kept:

    "logits"   pi0_fast          distributions of action tokens: the whole policy
    "actions"  all others        predicted velocities (pi0, pi05, smolvla) or noise (diffusion), at stored noise and
                                 time, or actions (act): the whole policy
    "tokens"   pi0_fast          the action tokens that it would give; needs no demonstrated actions
    "prefix"   all pi, smolvla   hidden states of images and prompt in the vision-language model, no actions needed;
                                 the action expert and the vocabulary head are free to move
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from craft_optim import anchors
from craft_optim.anchors import Reading
from craft_optim.anchors.capture import Layer, find_decoder
from craft_optim.anchors.names import plain_name
from craft_optim.lerobot import _statistics, act, diffusion, pi0, pi0_fast, smolvla
from craft_optim.lerobot._shared import find_policy, policy_of

__all__ = ["Adapter", "adapter_for", "adapter_of", "kept_of"]

_log = logging.getLogger("craft_optim")


class _Known(NamedTuple):
    """Known policy: its module here, outputs that can be kept (the default first), and names of modules within it.

    `head` is the module whose output is the actions, `backbone` the vision-language model.
    """

    source: Any
    choices: tuple[str, ...]
    head: str = ""
    backbone: str = ""


_PALIGEMMA = "model.paligemma_with_expert.paligemma"
_POLICIES = {
    "pi0_fast": _Known(pi0_fast, ("logits", "tokens", "prefix"), backbone=_PALIGEMMA),
    "pi0": _Known(pi0, ("actions", "prefix"), "model.action_out_proj", _PALIGEMMA),
    "pi05": _Known(pi0, ("actions", "prefix"), "model.action_out_proj", _PALIGEMMA),
    "smolvla": _Known(smolvla, ("actions", "prefix"), "model.action_out_proj", "model.vlm_with_expert.vlm"),
    "diffusion": _Known(diffusion, ("actions",), "diffusion.unet"),
    "act": _Known(act, ("actions",), "model.action_head"),
}


@dataclass(frozen=True)
class Adapter:
    """Way to anchor a policy. `dataclasses.replace` changes a part.

    Attributes:
        policy: Name of the policy in lerobot.
        keep: Output to keep: "logits", "tokens", "actions" or "prefix".
        kind: Kind of retention that measures it: "logits", "tokens" or "hidden".
        inputs: Function preprocessed batch -> the tensors that `reading.forward` reads, which are stored.
        reading: The `Reading` for `anchors.build`. Spans of a prefix: "image.<key>" for each camera, "image", "text",
            "all", and for smolvla "state".
        layers: Layers for `anchors.build`; none for logits.
        frozen: Names of the outermost modules without trained parameters, such as the vision tower.
    """

    policy: str
    keep: str
    kind: str
    inputs: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    reading: Reading
    layers: tuple[Layer, ...] = ()
    frozen: tuple[str, ...] = ()

    def build(
        self, model: nn.Module, batches: Iterable[Any], path: str | os.PathLike[str], **settings: Any
    ) -> anchors.AnchorCache:
        """Calls `anchors.build` for this policy; `settings` are further arguments, or replace the adapter's own.

        Args:
            model: The policy, before it is fine-tuned.
            batches: Results of `inputs`; `anchor_batches` makes them.
            path: The cache's folder.
            **settings: Arguments of `anchors.build`.
        """
        own = {"reading": self.reading, "output": "classes" if self.kind == "logits" else None, "layers": self.layers}
        return anchors.build(model, batches, path, **{**own, **settings})

    def retention(
        self, model: nn.Module, cache: anchors.AnchorCache, *, freeze_statistics: bool = True, **settings: Any
    ) -> anchors.AnchorRetention:
        """The retention closure on a cache of this adapter; `settings` are arguments of its class.

        Args:
            model: The policy in training.
            cache: Cache from `build`.
            freeze_statistics: True to fix the running statistics of batch normalisation (in lerobot: diffusion's,
                unless `use_group_norm`) from now on, see `craft_optim.lerobot.freeze_statistics`.
            **settings: Arguments of `LogitRetention`, `TokenRetention` or `HiddenRetention`.
        """
        if freeze_statistics and (frozen := _statistics.freeze_statistics(model)):
            _log.info("Running statistics of %d normalisations stay as they are from now on.", len(frozen))
        return cache.retention(model, self.kind, **{"reading": self.reading, **settings})


def adapter_for(model: nn.Module, keep: str | None = None) -> Adapter:
    """The adapter of a lerobot policy.

    Args:
        model: pi0_fast, pi0, pi05, smolvla, diffusion or act; wrapped (DDP, torch.compile, PEFT) or not. Names of
            layers are those within the wrapper: build and train with the same.
        keep: Output to keep: "logits", "tokens", "actions" or "prefix". None: the policy's first.

    Raises:
        ValueError: The policy is unknown or has no such output, or the output cannot move, as its vision-language model
            is frozen.
    """
    found = find_policy(model)
    name = getattr(found[1], "name", None) if found else None
    if found is None or name not in _POLICIES:
        raise ValueError(
            f"`model` must be one of lerobot's policies {sorted(_POLICIES)}. Found {type(model).__name__}"
            f"{f' ({name})' if name else ''}: for any other, call `anchors.build` with `layers=`, the names of modules "
            "whose outputs [B, ...] are kept, and `forward=`, a function of policy and batch that runs them without "
            "noise of its own."
        )
    place, policy = found
    source, choices, head, backbone = _POLICIES[name]
    keep = kept_of(name, keep)
    if keep == "prefix" and not any(p.requires_grad for p in policy.get_submodule(backbone).parameters()):
        raise ValueError(
            f"keep='prefix' holds hidden states of {backbone}, all of which is frozen: nothing that is trained could "
            f"move them. Use keep={choices[0]!r}, or train it (train_expert_only=False)."
        )
    about = {"policy": name, "keep": keep, "frozen": _frozen(model)}
    if keep == "prefix":
        pooling = {"image": "masked_mean", "text": "masked_mean"}
        return Adapter(
            **about,
            kind="hidden",
            inputs=partial(source.prefix_inputs, policy),
            reading=Reading(source.run_prefix, spans=source.prefix_spans, pooling=pooling),
            layers=(len(find_decoder(policy).layers) // 2, -1),
        )
    if keep == "tokens":
        reading = Reading(source.action_logits, tokens=source.generated_actions)
        return Adapter(**about, kind="tokens", inputs=partial(source.prefix_inputs, policy), reading=reading)
    inputs = partial(source.action_inputs, policy)
    if keep == "logits":
        reading = Reading(source.action_logits, mask=source.action_mask)
        return Adapter(**about, kind="logits", inputs=inputs, reading=reading)
    return Adapter(
        **about,
        kind="hidden",
        inputs=inputs,
        reading=Reading(source.run_actions, spans=source.action_spans, pooling={"all": "none"}),
        layers=(".".join(filter(None, (plain_name(place), head))),),
    )


def kept_of(policy: str, keep: str | None = None) -> str:
    """Name of the output to keep of a lerobot policy, by the policy's name.

    Args:
        keep: Requested output. None: the policy's first.

    Raises:
        ValueError: The policy is unknown, or has no such output.
    """
    if policy not in _POLICIES:
        raise ValueError(
            f"craft knows lerobot's policies {', '.join(_POLICIES)}. Found {policy}: for another, "
            "build anchors with craft_optim.anchors.build, and wrap its optimizer in a loop of your own."
        )
    choices = _POLICIES[policy].choices
    if keep not in (None, *choices):
        raise ValueError(f"`keep` must be one of {choices} for {policy}. Found {keep!r}.")
    return keep or choices[0]


def adapter_of(model: nn.Module, cache: anchors.AnchorCache) -> Adapter:
    """The adapter that a cache was built with.

    Args:
        model: The policy, as for `adapter_for`.
        cache: Cache from `Adapter.build` for a policy of the same type.

    Raises:
        ValueError: The cache was not built with an adapter of this policy.
    """
    for keep in ("logits", "tokens", "actions", "prefix"):
        try:
            adapter = adapter_for(model, keep)
        except ValueError:
            continue
        if adapter.reading.in_words()["forward"] == cache.features.forward and adapter.kind in cache.kinds:
            return adapter
    name = getattr(policy_of(model), "name", "this policy")
    raise ValueError(
        f"The cache {cache.path} was built with forward={cache.features.forward}, which is not one of "
        f"craft_optim.lerobot for {name}: build it with `craft-optim build-anchors --policy.path=...`. To inspect or "
        "measure it, --factory takes a function that returns the model and its `reading`."
    )


def _frozen(model: nn.Module) -> tuple[str, ...]:
    """Names of the outermost modules that have parameters, none of them trained."""
    names: list[str] = []
    for name, module in model.named_modules():
        flags = [p.requires_grad for p in module.parameters()]
        if flags and not any(flags) and not any(name.startswith(f"{outer}.") for outer in names if outer):
            names.append(name)
    return tuple(plain_name(name) for name in names)
