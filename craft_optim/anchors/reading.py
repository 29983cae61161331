"""Reading: how a model is run on anchors, and what of it is compared. `build` and every retention pass share one."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from .capture import POOLINGS, Spans
from .generation import Generate, greedy
from .masks import Mask
from .names import plain_name
from .passes import Forward
from .shards import AnchorCacheError

if TYPE_CHECKING:
    from .cache import AnchorCache

__all__ = ["AnchorMismatchError", "Reading", "name_of", "reading_of", "require_functions"]


class AnchorMismatchError(ValueError):
    """The model is not read as its teacher was, or does not reproduce it: drift against it would mean nothing."""


@dataclass(frozen=True)
class Reading:
    """The way in which a model is run on anchors, and what is compared; `dataclasses.replace` changes a part.

    Give it to `build`, and to `AnchorCache.open` in later runs; the closures take it from the cache. Without one the
    model is called on the batch, and what counts is what its `attention_mask` covers.

    Example:
        reading = Reading(forward=run, mask="answer")
        cache = build(model, batches, "anchors/", reading)      # once
        cache = AnchorCache.open("anchors/", reading)           # later
        retention = cache.retention(model)

    Attributes:
        forward: `forward(model, batch) -> logits or None`, instead of the model's call.
        mask: Positions whose logits count: name of an input, or `mask(batch) -> bool` of the logits' shape without the
            classes. None: `attention_mask` where its shape fits, else all.
        spans: `spans(model, batch) -> {span: bool [B, T]}`. None: "all" (`attention_mask`, else every position) and,
            for Hugging Face's vision-language models, "image" and "text".
        pooling: Span -> "masked_mean", "mean", "first", "last" or "none", for every layer. None: {"all":
            "masked_mean"}.
        batch_dim: Dimension of the anchors in the hidden states: 1 where layers work on [T, B, D], as torch's
            transformer layers do by default.
        frozen: Names of modules that will not train, such as a vision tower: their outputs are kept, and retention
            passes leave them out. As long as they do not train; otherwise they run.
        tokens: Let the teacher continue the batches, greedily, by at most this many tokens (transformers' `generate`),
            and keep what it wrote: for `TokenRetention`, and as inputs of everything else that is kept. Or a function
            `generate(model, batch) -> (inputs, labels)`, see `generation.greedy`.
        autocast: Dtype of autocast. None: as the caller has it; for a cache, what its teacher ran under.

    Raises:
        TypeError, ValueError: A value is of another type, out of range, or excludes another.
    """

    forward: Forward | None = None
    mask: Mask | None = None
    spans: Spans | None = None
    pooling: Mapping[str, str] | None = None
    batch_dim: int = 0
    frozen: tuple[str, ...] = ()
    tokens: int | Generate | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.batch_dim not in (0, 1):
            raise ValueError(f"`batch_dim` must be 0 or 1. Found batch_dim={self.batch_dim}.")
        if self.tokens is not None and self.mask is not None:
            raise ValueError(
                "`mask` and `tokens` exclude each other: the positions that count are those of the tokens."
            )
        if self.pooling is not None and (not self.pooling or any(x not in POOLINGS for x in self.pooling.values())):
            raise ValueError(f"`pooling` must give each span one of {POOLINGS}. Found {dict(self.pooling)}.")
        if not (self.autocast is None or isinstance(self.autocast, torch.dtype)):
            raise TypeError(f"`autocast` must be a torch.dtype, or None. Found autocast={self.autocast!r}.")
        for name, also in (("forward", ()), ("spans", ()), ("mask", (str,)), ("tokens", (int,))):
            value = getattr(self, name)
            if not (value is None or callable(value) or isinstance(value, also)):
                raise TypeError(f"`{name}` must be a function. Found {name}={value!r}.")
        if isinstance(self.frozen, str):
            raise TypeError(f"`frozen` must be names of modules. Found one text, {self.frozen!r}: put it in a list.")
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if isinstance(self.tokens, int):
            greedy(self.tokens)  # raises now

    @property
    def generate(self) -> Generate | None:
        """The function that makes the tokens."""
        return greedy(self.tokens) if isinstance(self.tokens, int) else self.tokens

    def in_words(self) -> dict[str, Any]:
        """All that it sets, as `FeatureSpec` holds it: functions by their names."""
        words = {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}
        for name in ("forward", "mask", "spans"):
            if callable(words.get(name)):
                words[name] = name_of(words[name])
        if self.generate is not None:
            words["tokens"] = name_of(self.generate)
        if self.pooling is not None:
            words["pooling"] = dict(self.pooling)
        if self.frozen:
            words["frozen"] = tuple(map(plain_name, self.frozen))
        if self.autocast is not None:
            words["autocast"] = str(self.autocast).removeprefix("torch.")
        return words


_DEFAULTS = {field.name: field.default for field in fields(Reading)}


def name_of(function: Any) -> str:
    """A function's name in a manifest."""
    # Without its module: that is "__main__" or not, depending on how a script is started
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def reading_of(cache: "AnchorCache", given: Reading | None = None) -> Reading:
    """The reading that a cache was built with: the functions of `given`, and all else as its manifest says.

    Raises:
        AnchorMismatchError: `given` sets something that the teacher was not read with.
    """
    features, given = cache.features, Reading() if given is None else given
    for name, here in given.in_words().items():
        there = getattr(features, name)
        if name == "pooling" and not features.layers:
            continue
        if here != there and not (there is None and cache.fingerprint is None):  # imported caches do not know
            raise AnchorMismatchError(
                f"The anchors in {cache.path} were built with {name}={there!r}. Found {name}={here!r}: pass the "
                "`Reading` that they were built with, or build them again with this one."
            )
    own: dict[str, Any] = {name: getattr(features, name) for name in ("batch_dim", "frozen", "autocast")}
    own["pooling"] = features.pooling or given.pooling
    own["mask"] = features.mask if given.mask is None and features.mask in cache.structure.names else given.mask
    if features.autocast is not None:
        own["autocast"] = getattr(torch, features.autocast, features.autocast)
    try:
        return replace(given, **own)
    except (TypeError, ValueError) as error:
        raise AnchorCacheError(
            f"{cache.path} cannot be used: its manifest has an impossible reading. {error}"
        ) from error


def require_functions(cache: "AnchorCache", reading: Reading, *names: str) -> None:
    """Raises AnchorMismatchError if the cache was built with a function of these names that the reading lacks."""
    for name in names:
        there = getattr(cache.features, name)
        if there is not None and getattr(reading, name) is None:
            raise AnchorMismatchError(
                f"The anchors in {cache.path} were built with {name}={there}, a function that is not in the cache. "
                f"Pass it: AnchorCache.open(path, Reading({name}={there.rpartition('.')[2]}))."
            )
