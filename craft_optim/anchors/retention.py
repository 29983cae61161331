"""Retention closures: how far the model has drifted from its own snapshot, on the next anchors.

Made once (`retention = LogitRetention(model, cache)`), then

    loss = retention()          # on the next batch of anchors, with a graph
    retention.drift()           # on all of them, without

`CraftOptimizer` calls it; so may any other loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import losses
from .build import Mask
from .cache import AnchorBatch, AnchorCache, tap_key
from .capture import Layer, Spans, pool, positions, resolve_layers, run
from .fingerprint import compare_fingerprints, fingerprint
from .passes import Forward, autocast_dtype, autocast_to, device_of, isolated_rng, logits_of, steady, to_device
from .sampling import AnchorSampler, mixed_seed
from .structure import Inputs

__all__ = [
    "AnchorMismatchError",
    "AnchorRetention",
    "Anchors",
    "HiddenRetention",
    "LogitRetention",
    "kl_term",
    "masked",
]

# Largest drift that counts as rounding, by the coarsest precision involved. Measured on small models on a CPU, rounding
# to storage alone: float32 1e-7, float16 1e-6, bfloat16 6e-5. The margin is for accelerators, which compute in other
# orders.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}

_NOTHING_VALID = (
    "No position of these anchors is valid: `mask` (or `spans`) selects none of them. Leave such anchors out."
)

_DISTANCES = ("mse", "cosine", "l1")


class AnchorMismatchError(ValueError):
    """The model does not reproduce its teacher at the start: drift measured against it would mean nothing."""


class Anchors(Protocol):
    """Where batches come from: `AnchorCache`, or anything of its kind."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | Tensor) -> AnchorBatch:
        """The anchors of these numbers, in that order."""
        ...


class AnchorRetention(ABC):
    """What all retention closures share; see `LogitRetention`, `HiddenRetention` and `OnlineRetention`.

    Attributes:
        position: Number of batches drawn so far, by all processes together; setting it determines which anchors come
            next. It is all the state there is. On another number of processes a batch has another number of anchors,
            so that a run resumed there sees other anchors, all of them valid.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: Anchors,
        batch_size: int = 16,
        *,
        forward: Forward | None = None,
        seed: int = 0,
        strict: bool = True,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tolerance: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if tolerance is not None and not tolerance >= 0.0:
            raise ValueError(f"`tolerance` must be >= 0. Found tolerance={tolerance!r}.")
        if (rank is None) != (world_size is None):
            raise ValueError(
                f"`rank` and `world_size` belong together: pass both, or neither. Found rank={rank}, "
                f"world_size={world_size}."
            )
        self.model, self.batch_size = model, batch_size
        self.forward, self.seed, self.strict = forward, seed, strict
        self.autocast, self.tolerance = autocast, tolerance
        self._anchors = anchors
        self._device = None if device is None else torch.device(device)
        self._placed = rank is not None
        self._sampler = AnchorSampler(
            len(anchors), batch_size, seed, rank or 0, 1 if world_size is None else world_size
        )
        self._mean: Callable[[Tensor], Tensor] | None = None
        self._position = 0

    @property
    def device(self) -> torch.device:
        """Where inputs go. Asked anew at every pass: frameworks move a model after its optimizer is made."""
        return device_of(self.model) if self._device is None else self._device

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if int(value) != value or value < 0:
            raise ValueError(f"`position` must be a whole number >= 0. Found position={value!r}.")
        self._position = int(value)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the backward may reach, whoever owns them."""
        return list(self.model.parameters())

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Makes this process one of several that share the anchors; `CraftOptimizer` calls it where there are several.

        Each draws `batch_size` anchors of its own. With `mean`, losses are weighted by their numbers of valid
        positions, n_r / mean(n), so that the mean over processes of loss and gradient is what one process with the
        whole batch would have. `position` is untouched.

        Args:
            rank: Place of this process among them. Ignored, like the next, if the constructor was given them.
            world_size: Their number.
            mean: Averages a small tensor over all processes and returns it, on each the same. Every process must make
                the same calls: one per pass, and one more at the first if `strict`.

        Raises:
            ValueError: There are fewer anchors than all processes' batches take together, or `rank` is out of range.
        """
        if not self._placed:
            self._sampler = AnchorSampler(len(self._anchors), self.batch_size, self.seed, rank, world_size)
        self._mean = mean

    def __call__(self) -> Tensor:
        """The loss on the next batch of anchors: a float32 scalar with a graph. Advances `position` if it succeeds.

        The first call (`position` 0) checks that the model agrees with its teacher, unless `strict` is False. The loss
        needs a backward of its own: until that is done, activation checkpointing would repeat other passes without
        dropout.

        Raises:
            AnchorMismatchError: The model's outputs have other shapes than the teacher's; or, at the first call, other
                values.
            ValueError: No position of the batch is valid; with the `mean` of `shard`, the loss is NaN if that is so on
                every process.
        """
        several = self._sampler.world_size > 1
        seed = mixed_seed(self.seed, self._position, *([self._sampler.rank] if several else []))
        batch = self._read(self._anchors, self._sampler.indices(self._position), seed)
        with torch.enable_grad():
            batch = self._taught(batch, seed)
            with self._pass(seed) as remember:
                loss = remember(self._combine(self._weighted(self._terms(batch))))
        if self.strict and self._position == 0:
            drift = loss.detach()
            self._check(float(drift if self._mean is None else self._mean(drift)), batch)
        self._position += 1
        return loss

    def _weighted(self, terms: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Of each term what its mean over all processes needs from this one."""
        if self._mean is None:
            if not all(weight for _, weight in terms.values()):
                raise ValueError(_NOTHING_VALID)
            return {name: value for name, (value, _) in terms.items()}
        mine = torch.tensor([float(weight) for _, weight in terms.values()]).to(self.device, non_blocking=True)
        shares = mine / self._mean(mine)
        return {
            name: value * share.to(value.device)
            for (name, (value, _)), share in zip(terms.items(), shares.unbind(), strict=True)
        }

    def _drift(self, source: Anchors | Iterable[AnchorBatch], batch_size: int | None) -> float:
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"`batch_size` must be >= 1. Found batch_size={size}.")
        totals: dict[str, Tensor] = {}
        weights: dict[str, int] = {}
        for batch, seed in self._all_of(source, size):
            with torch.no_grad():
                batch = self._taught(batch, seed)
                with self._pass(seed):
                    for name, (value, weight) in self._terms(batch).items():
                        totals[name] = totals.get(name, 0.0) + value.double() * weight
                        weights[name] = weights.get(name, 0) + weight
        if not totals:
            raise ValueError("There must be at least one batch of anchors to measure a drift on. Found none.")
        if not all(weights.values()):
            raise ValueError(_NOTHING_VALID)
        return float(self._combine({name: total / weights[name] for name, total in totals.items()}))

    def _all_of(self, source: Anchors | Iterable[AnchorBatch], size: int) -> Iterator[tuple[AnchorBatch, int]]:
        """Batches in order, each with its seed; the same on every process."""
        if isinstance(source, Iterable):
            for number, batch in enumerate(source):
                yield batch, mixed_seed(self.seed, number)
            return
        for number, start in enumerate(range(0, len(source), size)):
            seed = mixed_seed(self.seed, number)
            yield self._read(source, range(start, min(start + size, len(source))), seed), seed

    @contextmanager
    def _pass(self, seed: int, model: nn.Module | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
        """Everything around a forward on anchors; yields what makes the loss remember it for its backward."""
        device = self.device if model is None else device_of(model)
        with (
            steady(self.model if model is None else model) as remember,
            isolated_rng(device, seed),
            autocast_to(device, self.autocast),
        ):
            yield remember
            if not torch.is_grad_enabled() and torch.is_autocast_enabled(device.type):
                # Older torch keeps weights cast without gradients for later forwards (pytorch/pytorch#158232)
                torch.clear_autocast_cache()

    def _read(self, anchors: Anchors, indices: Sequence[int] | Tensor, seed: int) -> AnchorBatch:
        return anchors.read(indices)

    def _taught(self, batch: AnchorBatch, seed: int) -> AnchorBatch:
        """The batch with the teacher's outputs; a cache has read them along."""
        return batch

    @abstractmethod
    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        """Name -> (mean over the batch, number of positions or anchors in that mean); (0, 0) for a mean over none."""

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return next(iter(terms.values()))

    def _precisions(self) -> list[torch.dtype]:
        """Those that the model computes in."""
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        running = autocast_dtype(self.device, self.autocast)
        return dtypes if running is None else [*dtypes, running]

    def _default_tolerance(self) -> float:
        """By the coarsest of the precisions that the teacher's outputs are stored in and the model computes in."""
        return max(_TOLERANCE.get(dtype, max(_TOLERANCE.values())) for dtype in self._precisions())

    def _check(self, drift: float, batch: AnchorBatch) -> None:
        tolerance = self._default_tolerance() if self.tolerance is None else self.tolerance
        if drift <= tolerance:
            return
        raise AnchorMismatchError(
            f"The model does not reproduce {self._teacher_in_words()} before the first step: its drift is {drift:.3g} "
            f"where at most {tolerance:.3g} is rounding. {self._cause(batch)} A run that continues from a fine-tuned "
            "checkpoint sets `position`, or strict=False."
        )

    @abstractmethod
    def _teacher_in_words(self) -> str: ...

    @abstractmethod
    def _cause(self, batch: AnchorBatch) -> str:
        """Why the first call found a drift, as far as it can be told, and what to do."""


class CachedRetention(AnchorRetention):
    """Retention whose teacher is an `AnchorCache`; see `LogitRetention` and `HiddenRetention`."""

    def __init__(self, model: nn.Module, cache: AnchorCache, batch_size: int = 16, **settings: Any) -> None:
        super().__init__(model, cache, batch_size, **settings)
        self.cache = cache

    def drift(
        self, cache_or_batches: AnchorCache | Iterable[AnchorBatch] | None = None, batch_size: int | None = None
    ) -> float:
        """The same loss over a whole cache, without gradients; held-out anchors included, if they are given.

        Means are over all valid positions (or anchors) of the cache, whatever the batches. Advances nothing. Of several
        processes each measures it as a whole.

        Args:
            cache_or_batches: A cache of the same kind, or batches as `AnchorCache.read` gives them. None: this
                closure's cache.
            batch_size: Anchors per forward. None: this closure's.

        Raises:
            ValueError: The cache is of another kind, there is no batch, or no position is valid.
        """
        source = self.cache if cache_or_batches is None else cache_or_batches
        if isinstance(source, AnchorCache):
            self._check_kind(source)
        return self._drift(source, batch_size)

    def _run(
        self, inputs: Inputs, layers: tuple[Layer, ...] = (), output: bool = True
    ) -> tuple[Any, dict[Layer, Tensor]]:
        inputs = to_device(inputs, self.device)
        return run(self.model, inputs, forward=self.forward, layers=layers, output=output)

    @abstractmethod
    def _check_kind(self, cache: AnchorCache) -> None:
        """Raises unless the cache holds what this closure compares."""

    def _precisions(self) -> list[torch.dtype]:
        return [*super()._precisions(), getattr(torch, self.cache.features.dtype)]

    def _teacher_in_words(self) -> str:
        return f"the cache {self.cache.path}"

    def _cause(self, batch: AnchorBatch) -> str:
        if why := compare_fingerprints(self.cache.fingerprint, fingerprint(self.model)):
            return f"Cause: {why}. Load the weights that the cache was built with, or build it with these."
        with torch.no_grad():
            values = []
            for number in (0, 1):
                with self._pass(mixed_seed(self.seed, number)):
                    values.append({name: float(value) for name, (value, _) in self._terms(batch).items()})
        if values[0] != values[1]:
            return (
                "Cause: the weights are the same, but the model's outputs are random: dropout or noise that is "
                "active in train mode, in a place that is not recognised as such. Turn it off in `forward=`."
            )
        built, running = self.cache.features.autocast, autocast_dtype(self.device, self.autocast)
        now = None if running is None else str(running).removeprefix("torch.")
        if built != now:
            return (
                f"Cause: the cache was built under autocast {built}, this pass runs under {now}. Pass the same "
                "`autocast=`."
            )
        return (
            "Cause: the weights are the same, but not what is computed with them. Likely: another `forward=`, "
            "mask or precision (autocast inside of the model's forward) than in `build`, another attention "
            "implementation, or inputs that were changed after the cache was built."
        )


def masked(inputs: Inputs, mask: Mask) -> Tensor:
    """`[...]` on the CPU: the positions that a mask given by the user selects."""
    if callable(mask):
        return mask(inputs).bool().cpu()
    if not isinstance(inputs, dict) or mask not in inputs:
        raise ValueError(f"`mask` must be a function, or the name of an input of a mapping. Found {mask!r}.")
    return inputs[mask].bool().cpu()


def kl_term(logits: Tensor, teacher: Mapping[str, Tensor], valid: Tensor | None) -> tuple[Tensor, int]:
    """Mean KL(teacher || softmax(logits)) over valid positions, and their number; (0, 0) if there are none.

    Positions are selected on the host: an accelerator need not be waited for, and only what counts travels.

    Args:
        logits: `[..., V]`, of the model.
        teacher: "logprobs" `[..., V]`; or, as in a cache, "topk_logprobs", "topk_indices" and "rest_logprob".
        valid: `[...]` on the CPU, true where a position counts. None: every position.
    """
    leading = logits.ndim - 1
    if valid is not None and valid.shape != logits.shape[:-1]:
        raise ValueError(f"The logits' mask must have shape {tuple(logits.shape[:-1])}. Found {tuple(valid.shape)}.")
    student = logits.flatten(0, -2)
    teacher = {name: x.flatten(0, leading - 1) for name, x in teacher.items()}
    if valid is not None:
        places = valid.flatten().nonzero().flatten()
        student = student.index_select(0, places.to(student.device, non_blocking=True))
        teacher = {name: x.index_select(0, places.to(x.device, non_blocking=True)) for name, x in teacher.items()}
    if not len(student):
        return student.float().sum(), 0
    teacher = {name: x.to(student.device, non_blocking=True) for name, x in teacher.items()}
    with torch.autocast(student.device.type, enabled=False):
        if "logprobs" in teacher:
            return losses.kl_divergence(student, teacher["logprobs"]), len(student)
        value = losses.topk_kl_divergence(
            student,
            teacher["topk_logprobs"],
            teacher["topk_indices"],
            teacher_rest_logprob=teacher.get("rest_logprob"),
        )
    return value, len(student)


class LogitRetention(CachedRetention):
    """KL(teacher || model) on the anchors' logits, in nats per valid position.

        L_ret = mean over valid positions i of  sum_v p_iv (log p_iv - log q_iv)

    p is the cached distribution, q the model's now. With a top-k cache, k classes and one for the rest: a lower bound.
    The mask, too, is the cached one.

    Example:
        anchors = build(model, batches, "anchors/")  # before fine-tuning
        retention = LogitRetention(model, anchors, batch_size=16)
        retention().backward()

    Args:
        model: The model in training, on its device, in either mode.
        cache: Built with logits from the same model.
        batch_size: Anchors per call (and rank).
        forward: As in `build`.
        mask: `mask(batch) -> bool`, or an input's name, instead of the cached mask.
        seed: Of the order of the anchors and of what the forward draws.
        strict: Check at the first call that the model reproduces the cache.
        autocast: Dtype of autocast in the pass, as in `build`. None: as the caller has it.
        device: Where inputs go. None: where the model's first parameter is.
        tolerance: Largest drift that the first call accepts. None: by precision; 1e-4 for float32, 1e-3 for float16,
            5e-3 for bfloat16, whichever of storage and computation is coarsest.
        rank: Place of this process among those that share the anchors. None, for both: `CraftOptimizer` finds out, see
            `shard`; a single process until then.
        world_size: Their number; together they draw what one process with the whole batch would.

    Raises:
        ValueError: The cache has no logits, or fewer anchors than a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        forward: Forward | None = None,
        mask: Mask | None = None,
        seed: int = 0,
        strict: bool = True,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tolerance: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._check_kind(cache)
        super().__init__(
            model, cache, batch_size, forward=forward, seed=seed, strict=strict, autocast=autocast, device=device,
            tolerance=tolerance, rank=rank, world_size=world_size,
        )  # fmt: skip
        self.mask = mask

    def _check_kind(self, cache: AnchorCache) -> None:
        if cache.features.logits is None:
            raise ValueError(
                f"LogitRetention needs a cache with logits. {cache.path} has {cache.describe()}: use "
                "HiddenRetention, or build it with logits=True or top_k."
            )

    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        output, _ = self._run(batch.inputs)
        logits = logits_of(output)
        if logits is None:
            raise AnchorMismatchError(
                f"The model gives no logits but {type(output).__name__}: pass the `forward=` that the cache was "
                "built with."
            )
        features = batch.features
        full = "logprobs" in features
        leading = features["logprobs"].shape[:-1] if full else features["topk_logprobs"].shape[:-1]
        classes = features["logprobs"].shape[-1] if full else self.cache.features.classes
        if logits.shape != (*leading, classes):
            raise AnchorMismatchError(
                f"The model gives logits of shape {tuple(logits.shape)}, the cache {self.cache.path} was built "
                f"with {(*leading, classes)}: another model, or another `forward=`."
            )
        names = ("logprobs",) if full else ("topk_logprobs", "topk_indices", "rest_logprob")
        teacher = {k: features[k] for k in names if k in features}
        valid = features.get("mask") if self.mask is None else masked(batch.inputs, self.mask)
        return {"kl": kl_term(logits, teacher, valid)}


class HiddenRetention(CachedRetention):
    """Distance of hidden states from the teacher's on the anchors, as a weighted mean over layers and spans.

        L_ret = sum_j w_j L_j / sum_j w_j,   L_j = |h_j - h0_j|^2 / Var[h0_j]   (loss="mse")

    Var is the variance of the teacher's features over the cached anchors, so 1 means: moved as far as the teacher's own
    features are spread. `losses` has the formulas. The forward ends at the deepest layer. It holds what it measures:
    the layers after it are free to move.

    Args:
        model: The model in training, on its device, in either mode.
        cache: Built with `layers` from the same model.
        batch_size: Anchors per call (and rank).
        loss: "mse" and "l1" in units of the teacher's variance and standard deviation, or "cosine".
        layers: Some of the cached layers. None: all of them.
        weights: Layer, or (layer, span), -> weight >= 0; 1 for those not named.
        forward: As in `build`.
        spans: As in `build`, instead of the cached masks of the spans.
        seed: Of the order of the anchors and of what the forward draws.
        strict: Check at the first call that the model reproduces the cache.
        autocast: Dtype of autocast in the pass, as in `build`. None: as the caller has it.
        device: Where inputs go. None: where the model's first parameter is.
        tolerance: Largest drift that the first call accepts. None: by precision, as for `LogitRetention`; its square
            root for "l1".
        rank: Place of this process among those that share the anchors; see `LogitRetention`.
        world_size: Their number.

    Raises:
        ValueError: The cache has no such layers, their features do not vary over the anchors, a weight is out of range,
            or there are fewer anchors than a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        loss: str = "mse",
        layers: Iterable[Layer] | None = None,
        weights: Mapping[Layer | tuple[Layer, str], float] | None = None,
        forward: Forward | None = None,
        spans: Spans | None = None,
        seed: int = 0,
        strict: bool = True,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tolerance: float | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if loss not in _DISTANCES:
            raise ValueError(f"`loss` must be one of {_DISTANCES}. Found {loss!r}.")
        self.loss, self.spans = loss, spans
        self.layers = resolve_layers(model, cache.features.layers if layers is None else layers)
        self.pooling = dict(cache.features.pooling)
        self._check_kind(cache)
        if not self.layers:
            raise ValueError("`layers` must name at least one layer. Found none.")
        self.weights = self._weights(dict(weights or {}))
        super().__init__(
            model,
            cache,
            batch_size,
            forward=forward,
            seed=seed,
            strict=strict,
            autocast=autocast,
            device=device,
            tolerance=tolerance,
            rank=rank,
            world_size=world_size,
        )
        flat = [key for key in self.weights if not cache.features.variances.get(key, 0.0) > 0.0]
        if flat and loss != "cosine":
            raise ValueError(
                f"loss={loss!r} measures in units of the features' variance over the anchors, and {flat} do not "
                f"vary over the {len(cache)} anchors of {cache.path}: use more, and more varied, anchors, other "
                "layers, or loss='cosine'."
            )

    def _weights(self, given: dict[Layer | tuple[Layer, str], float]) -> dict[str, float]:
        weights = {}
        for layer in self.layers:
            for span in self.pooling:
                weight = given.get((layer, span), given.get(layer, 1.0))
                if not 0.0 <= weight < float("inf"):
                    raise ValueError(f"`weights` must be finite and >= 0. Found {weight!r} for layer {layer!r}.")
                weights[tap_key(layer, span)] = float(weight)
        known = {*self.layers, *((layer, span) for layer in self.layers for span in self.pooling)}
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"`weights` names {unknown}, but the layers and spans here are {list(weights)}.")
        if not sum(weights.values()) > 0.0:
            raise ValueError(f"`weights` must not all be zero. Found {weights}.")
        return weights

    def _check_kind(self, cache: AnchorCache) -> None:
        missing = [layer for layer in self.layers if layer not in cache.features.layers]
        if missing or not cache.features.layers or cache.features.pooling != self.pooling:
            raise ValueError(
                f"HiddenRetention needs a cache with hidden states of layers {list(self.layers)} pooled as "
                f"{self.pooling}. {cache.path} has {cache.describe()}: choose among these, or build it with "
                "`layers=`."
            )

    def _default_tolerance(self) -> float:
        squared = super()._default_tolerance()
        return squared**0.5 if self.loss == "l1" else squared

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        weighted = [self.weights[name] * value for name, value in terms.items()]
        return torch.stack(weighted).sum() / sum(self.weights[name] for name in terms)

    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        _, hidden = self._run(batch.inputs, self.layers, output=False)
        masks = {k.removeprefix("span."): x for k, x in batch.features.items() if k.startswith("span.")}
        if self.spans is not None:
            given = self.spans(self.model, to_device(batch.inputs, self.device))
            masks = {span: x.bool().cpu() for span, x in given.items()}
        terms = {}
        for layer, value in hidden.items():
            states = positions(value)
            for span, mode in self.pooling.items():
                key = tap_key(layer, span)
                mask = masks.get(span) if value.ndim == 3 else None
                terms[key] = self._distance(key, states, mask, mode, batch.features[key])
        return terms

    def _distance(
        self, key: str, states: Tensor, mask: Tensor | None, mode: str, teacher: Tensor
    ) -> tuple[Tensor, int]:
        if mask is not None and mask.shape != states.shape[:2]:
            raise AnchorMismatchError(
                f"The model has {tuple(states.shape[:2])} positions at {key}, its span a mask of "
                f"{tuple(mask.shape)}: another `forward=` or `spans=` than in `build`."
            )
        if mode == "none" and mask is not None:
            places = mask.flatten().nonzero().flatten()  # on the host, see `kl_term`
            student = states.flatten(0, 1).index_select(0, places.to(states.device, non_blocking=True))
            expected = (*mask.shape, states.shape[-1])
            if teacher.shape == expected:
                teacher = teacher.flatten(0, 1)[places]
        elif states.ndim == 3:
            student = pool(states, None if mask is None else mask.to(states.device, non_blocking=True), mode)
            expected = tuple(student.shape)
        else:
            student, expected = states, tuple(states.shape)
        if student.shape != teacher.shape:
            raise AnchorMismatchError(
                f"The model gives {expected} at {key}, the cache {self.cache.path} was built with "
                f"{tuple(teacher.shape)}: another model, another layer of that number, or another `forward=`."
            )
        if not len(student):
            return student.float().sum(), 0
        teacher = teacher.to(student.device, non_blocking=True)
        with torch.autocast(student.device.type, enabled=False):
            if self.loss == "cosine":
                distance = losses.feature_cosine(student, teacher)
            else:
                function = losses.feature_mse if self.loss == "mse" else losses.feature_l1
                distance = function(student, teacher, variance=self.cache.features.variances[key])
        return distance, student.numel() // student.shape[-1]
