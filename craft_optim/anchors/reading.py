"""Reading: how a model is run on anchors, and which outputs are compared, in `build` and every retention pass."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from .capture import POOLINGS, Spans
from .generation import Generate, greedy
from .kinds import KINDS
from .masks import Mask
from .names import plain_name
from .outputs import FEATURES, feature
from .passes import Forward
from .shards import AnchorCacheError
from .structure import Lengths

if TYPE_CHECKING:
    from .cache import AnchorCache

__all__ = ["AnchorMismatchError", "Reading", "name_of", "reading_of", "require_functions", "with_fields"]


class AnchorMismatchError(ValueError):
    """The model is not read as its teacher was, or does not reproduce it: drift would mean nothing."""


@dataclass(frozen=True)
class Reading:
    """Way to run a model on anchors, and outputs to compare; `dataclasses.replace` changes a part.

    Pass it, or its fields by keyword, to `build`, and to `AnchorCache.open` in later runs; the closures take it from
    the cache. Without one the model is called on the batch, and the positions of its `attention_mask` count.

    Example:
        reading = Reading(forward=run, mask="answer")
        cache = build(model, batches, "anchors/", reading)      # once
        cache = AnchorCache.open("anchors/", reading)           # later
        retention = cache.retention(model)

    Attributes:
        forward: Function `forward(model, batch) -> output or None` to run instead of the model's call.
        mask: Positions whose logits count: name of an input, or a function `mask(batch) -> bool` of the logits' shape
            without the classes. None: `attention_mask` where its shape fits, else all.
        spans: Function `spans(model, batch) -> {span: bool [B, T]}`. None: "all" (`attention_mask`, else every
            position) and, for Hugging Face's vision-language models, "image" and "text".
        pooling: Span -> "masked_mean", "mean", "first", "last" or "none", for every layer. None: {"all":
            "masked_mean"}.
        batch_dim: Dimension of the anchors in the hidden states: 1 where layers work on [T, B, D], as torch's
            transformer layers do by default.
        frozen: Names of modules that will not train, such as a vision tower: their outputs are kept, and retention
            passes do not run them unless they train after all.
        tokens: Largest number of tokens by which the teacher continues the batches, greedily (transformers'
            `generate`). They are kept for `TokenRetention`, and are inputs of all other outputs. Or a function
            `generate(model, batch) -> (inputs, labels)`, see `generation.greedy`.
        autocast: Dtype of autocast. None: the caller's; for a cache, the dtype that its teacher ran under.
        output: Kind of the output: "classes", logits of one softmax; "labels", a logit for each independent label, as
            of a binary head; "values", numbers such as a regression, a denoiser or an embedding gives. For several
            outputs, name -> kind; names are keys or attributes of the model's result, or places of a tuple. None: no
            output. "auto": detected if a config of transformers, log-probabilities or a vocabulary make it certain,
            else an error requests it.
        class_dim: Dimension of the classes (or of the channels of values), not 0; for several outputs, name ->
            dimension. None: the last of at most three; for values as torch has channels, 1 of four or more dimensions,
            else the last.
        lengths: Function `lengths(batch) -> {name: rows of each anchor}` for ragged inputs, whose first dimension is
            the rows of all anchors, one after another, such as the patches of all pictures. `build` cuts them up by it;
            the cache keeps the numbers and puts the rows of a batch together again. The closures do not need it.

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
    output: str | Mapping[str, str] | None = "auto"
    class_dim: int | Mapping[str, int] | None = None
    lengths: Lengths | None = None

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
        self._check_output()
        also = {"mask": str, "tokens": int}
        for name in ("forward", "spans", "mask", "tokens", "lengths"):
            value = getattr(self, name)
            if not (value is None or callable(value) or isinstance(value, also.get(name, ()))):
                raise TypeError(f"`{name}` must be a function. Found {name}={value!r}.")
        if isinstance(self.frozen, str):
            raise TypeError(f"`frozen` must be names of modules. Found one text, {self.frozen!r}: put it in a list.")
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if isinstance(self.tokens, int):
            greedy(self.tokens)  # raises here if invalid

    def _check_output(self) -> None:
        """Raises ValueError unless `output` and `class_dim` are valid and go together."""
        named = isinstance(self.output, Mapping)
        kinds = dict(self.output) if isinstance(self.output, Mapping) else {"": self.output}
        known = KINDS if named else (*KINDS, "auto", None)
        if not kinds or any(kind not in known for kind in kinds.values()):
            raise ValueError(
                f"`output` must be one of {', '.join(map(repr, known))}, or name -> kind. Found output={self.output!r}."
            )
        if bad := [name for name in kinds if named and (not isinstance(name, str) or not name or name in _NO_NAMES)]:
            raise ValueError(f"Names in `output` must be texts, other than {_NO_NAMES}. Found {bad[0]!r}.")
        dims = dict(self.class_dim) if isinstance(self.class_dim, Mapping) else dict.fromkeys(kinds, self.class_dim)
        for name, dim in dims.items():
            if dim is not None and (type(dim) is not int or dim == 0):
                raise ValueError(
                    "`class_dim` must be a whole number other than 0, the dimension of the anchors. Found "
                    f"class_dim={self.class_dim!r}."
                )
            alone = not named or isinstance(self.class_dim, Mapping)
            if name not in kinds or (alone and dim is not None and kinds[name] == "labels"):
                raise ValueError(
                    "`class_dim` is a dimension of classes, or of values' channels. Found "
                    f"class_dim={self.class_dim!r} with output={self.output!r}."
                )
        if self.tokens is not None and self.output not in ("auto", "classes", None):
            raise ValueError(f"`tokens` need classes. Found output={self.output!r}: leave one of them out.")

    @property
    def generate(self) -> Generate | None:
        """Function that makes the tokens."""
        return greedy(self.tokens) if isinstance(self.tokens, int) else self.tokens

    def in_words(self) -> dict[str, Any]:
        """The fields that are set, as `FeatureSpec` holds them: functions by their names."""
        words = {name: value for name, default in _DEFAULTS.items() if (value := getattr(self, name)) != default}
        words.pop("output", None)  # a manifest has the detected kind
        words.pop("class_dim", None)
        for name in ("forward", "mask", "spans", "lengths"):
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


_NO_NAMES = ("hidden", "tokens", "actions")  # kinds of retention
_DEFAULTS = {field.name: field.default for field in fields(Reading)}


def with_fields(reading: Reading, given: Mapping[str, Any], owner: str) -> Reading:
    """The reading with some of its fields replaced.

    Raises:
        TypeError: The field is unknown, and `owner` has no such argument.
    """
    if unknown := sorted(set(given) - set(_DEFAULTS)):
        raise TypeError(f"`{owner}` and `Reading` have no `{unknown[0]}`.")
    return replace(reading, **given) if given else reading


def name_of(function: Any) -> str:
    """A function's name in a manifest."""
    # Without its module, which is "__main__" or not, depending on how a script is started
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def reading_of(cache: "AnchorCache", given: Reading | None = None) -> Reading:
    """The reading that a cache was built with: functions from `given`, everything else from the manifest.

    Raises:
        AnchorMismatchError: `given` differs from the reading of the teacher.
    """
    features, given = cache.features, Reading() if given is None else given
    for name, here in given.in_words().items():
        there = getattr(features, name)
        if name == "pooling" and not features.layers:
            continue
        # Imported caches do not know. A new forward, as after the vocabulary has grown, must give the teacher's
        # outputs: pass 0 checks that.
        unknown = there is None and (cache.fingerprint is None or name == "forward")
        if here != there and not unknown:
            raise AnchorMismatchError(
                f"The anchors in {cache.path} were built with {name}={there!r}. Found {name}={here!r}: pass the "
                "`Reading` that they were built with, or build them again with this one."
            )
    own: dict[str, Any] = _output_of(cache, given)
    own |= {name: getattr(features, name) for name in ("batch_dim", "frozen", "autocast")}
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


def _output_of(cache: "AnchorCache", given: Reading) -> dict[str, Any]:
    """`output` and `class_dim` from the manifest.

    Raises:
        AnchorMismatchError: `given` differs from them.
    """
    held = cache.features.outputs
    kinds: Any = {name: output.kind for name, output in held.items()}
    dims: Any = {name: output.dim for name, output in held.items() if output.kind != "labels"}
    if not held or "" in held:
        kinds, dims = kinds.get(""), dims.get("")
    asked = "classes" if given.output == "auto" and given.class_dim is not None else given.output
    if asked not in ("auto", kinds) and not (cache.features.tokens and not held and asked == "classes"):
        raise AnchorMismatchError(
            f"The anchors in {cache.path} were built with output={kinds!r}. Found output={asked!r}: pass the `Reading` "
            "that they were built with, or build them again with this one."
        )
    told = given.class_dim if isinstance(given.class_dim, Mapping) else dict.fromkeys(held, given.class_dim)
    for name, dim in told.items():
        if name not in held or dim is None or held[name].kind == "labels":
            continue
        if (dim if dim > 0 else dim + _ndim(cache, name)) != held[name].dim:
            raise AnchorMismatchError(
                f"The anchors in {cache.path} were built with class_dim={held[name].dim}. Found class_dim={dim}."
            )
    return {"output": kinds, "class_dim": dims or None}


def _ndim(cache: "AnchorCache", name: str) -> int:
    """Number of dimensions that the output had."""
    output = cache.features.outputs[name]
    keys = [feature(key, name) for key in FEATURES[output.kind]]
    key = next(key for key in keys if f"features.{key}" in cache.shards[0].entries)
    joined = key in cache.joined_features  # the mask has their shape without the classes
    return cache.shards[0].form("features.mask" if joined else f"features.{key}")[1] + joined


def require_functions(cache: "AnchorCache", reading: Reading, *names: str) -> None:
    """Raises AnchorMismatchError if the reading lacks one of these functions that the cache was built with."""
    for name in names:
        there = getattr(cache.features, name)
        if there is not None and getattr(reading, name) is None:
            raise AnchorMismatchError(
                f"The anchors in {cache.path} were built with {name}={there}, a function that is not in the cache. "
                f"Pass it: AnchorCache.open(path, Reading({name}={there.rpartition('.')[2]}))."
            )
