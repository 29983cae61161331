"""Retention closures: how far the model has drifted from its own snapshot, on the next anchors.

Made once (`retention = LogitRetention(model, cache)`), then

    loss = retention()          # on the next batch of anchors, with a graph
    retention.drift()           # on all of them, without

`CraftOptimizer` calls it; so may any other loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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

__all__ = ["AnchorMismatchError", "AnchorRetention", "HiddenRetention", "LogitRetention"]

# Largest drift that counts as rounding, by the coarsest precision involved. Measured on small models on a CPU, rounding
# to storage alone: float32 1e-7, float16 1e-6, bfloat16 6e-5. The margin is for accelerators, which compute in other
# orders.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}

_DISTANCES = ("mse", "cosine", "l1")


class AnchorMismatchError(ValueError):
    """The model does not reproduce the cache: drift measured against it would mean nothing."""


class AnchorRetention(ABC):
    """What all retention closures share; see `LogitRetention` and `HiddenRetention`.

    Attributes:
        position: Number of batches drawn so far; setting it determines which anchors come next. It is all the state
            there is.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        forward: Forward | None = None,
        seed: int = 0,
        strict: bool = True,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tolerance: float | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if tolerance is not None and not tolerance >= 0.0:
            raise ValueError(f"`tolerance` must be >= 0. Found tolerance={tolerance!r}.")
        self.model, self.cache, self.batch_size = model, cache, batch_size
        self.forward, self.seed, self.strict = forward, seed, strict
        self.autocast, self.tolerance = autocast, tolerance
        self._device = None if device is None else torch.device(device)
        self._sampler = AnchorSampler(len(cache), batch_size, seed, rank, world_size)
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

    def __call__(self) -> Tensor:
        """The loss on the next batch of anchors: a float32 scalar with a graph. Advances `position` if it succeeds.

        The first call (`position` 0) checks that the model reproduces the cache, unless `strict` is False. The loss
        needs a backward of its own: until that is done, activation checkpointing would repeat other passes without
        dropout.

        Raises:
            AnchorMismatchError: The model's outputs have other shapes than the cache's; or, at the first call, other
                values.
        """
        batch = self.cache.read(self._sampler.indices(self._position))
        with torch.enable_grad(), self._pass(self._position) as remember:
            loss = remember(self._combine({name: value for name, (value, _) in self._terms(batch).items()}))
        if self.strict and self._position == 0:
            self._check(float(loss.detach()), batch)
        self._position += 1
        return loss

    def drift(
        self, cache_or_batches: AnchorCache | Iterable[AnchorBatch] | None = None, batch_size: int | None = None
    ) -> float:
        """The same loss over a whole cache, without gradients; held-out anchors included, if they are given.

        Means are over all valid positions (or anchors) of the cache, whatever the batches. Advances nothing.

        Args:
            cache_or_batches: A cache of the same kind, or batches as `AnchorCache.read` gives them. None: this
                closure's cache.
            batch_size: Anchors per forward. None: this closure's.
        """
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"`batch_size` must be >= 1. Found batch_size={size}.")
        source = self.cache if cache_or_batches is None else cache_or_batches
        if isinstance(source, AnchorCache):
            self._check_kind(source)
            cache = source
            starts = range(0, len(cache), size)
            source = (cache.read(range(start, min(start + size, len(cache)))) for start in starts)
        totals: dict[str, Tensor] = {}
        weights: dict[str, int] = {}
        for number, batch in enumerate(source):
            with torch.no_grad(), self._pass(number):
                for name, (value, weight) in self._terms(batch).items():
                    totals[name] = totals.get(name, 0.0) + value.double() * weight
                    weights[name] = weights.get(name, 0) + weight
        if not totals:
            raise ValueError("`cache_or_batches` must have at least one batch.")
        return float(self._combine({name: total / weights[name] for name, total in totals.items()}))

    @contextmanager
    def _pass(self, number: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Everything around a forward on anchors; yields what makes the loss remember it for its backward."""
        seed = mixed_seed(self.seed, number)
        with steady(self.model) as remember, isolated_rng(self.device, seed), autocast_to(self.device, self.autocast):
            yield remember
            if not torch.is_grad_enabled() and torch.is_autocast_enabled(self.device.type):
                # Older torch keeps weights cast without gradients for later forwards (pytorch/pytorch#158232)
                torch.clear_autocast_cache()

    def _run(
        self, inputs: Inputs, layers: tuple[Layer, ...] = (), output: bool = True
    ) -> tuple[Any, dict[Layer, Tensor]]:
        inputs = to_device(inputs, self.device)
        return run(self.model, inputs, forward=self.forward, layers=layers, output=output)

    @abstractmethod
    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        """Name -> (mean over the batch, number of positions or anchors in that mean)."""

    @abstractmethod
    def _check_kind(self, cache: AnchorCache) -> None:
        """Raises unless the cache holds what this closure compares."""

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return next(iter(terms.values()))

    def _default_tolerance(self) -> float:
        """By the coarsest of the precisions that the features are stored in and the model computes in."""
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        dtypes.append(getattr(torch, self.cache.features.dtype))
        running = autocast_dtype(self.device, self.autocast)
        if running is not None:
            dtypes.append(running)
        return max(_TOLERANCE.get(dtype, max(_TOLERANCE.values())) for dtype in dtypes)

    def _check(self, drift: float, batch: AnchorBatch) -> None:
        tolerance = self._default_tolerance() if self.tolerance is None else self.tolerance
        if drift <= tolerance:
            return
        raise AnchorMismatchError(
            f"The model does not reproduce the cache {self.cache.path} before the first step: its drift is "
            f"{drift:.3g} where at most {tolerance:.3g} is rounding. {self._cause(batch)} A run that continues "
            "from a fine-tuned checkpoint sets `position`, or strict=False."
        )

    def _cause(self, batch: AnchorBatch) -> str:
        if why := compare_fingerprints(self.cache.fingerprint, fingerprint(self.model)):
            return f"Cause: {why}. Load the weights that the cache was built with, or build it with these."
        with torch.no_grad():
            values = []
            for number in (0, 1):
                with self._pass(number):
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


class LogitRetention(AnchorRetention):
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
        rank: Place of this process among those that share the anchors.
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
        rank: int = 0,
        world_size: int = 1,
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

    def _valid(self, batch: AnchorBatch) -> Tensor | None:
        """`[...]` on the CPU: positions that count."""
        if self.mask is None:
            return batch.features.get("mask")
        if callable(self.mask):
            return self.mask(batch.inputs).bool().cpu()
        if not isinstance(batch.inputs, dict) or self.mask not in batch.inputs:
            raise ValueError(f"`mask` must be a function, or the name of an input of a mapping. Found {self.mask!r}.")
        return batch.inputs[self.mask].bool()

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
        student = logits.flatten(0, -2)
        names = ("logprobs",) if full else ("topk_logprobs", "topk_indices", "rest_logprob")
        teacher = {k: features[k].flatten(0, len(leading) - 1) for k in names if k in features}
        valid = self._valid(batch)
        if (
            valid is not None
        ):  # selected on the host: an accelerator need not be waited for, and only what counts travels
            places = valid.flatten().nonzero().flatten()
            if not len(places):
                raise ValueError("`mask` selects no position of this batch of anchors.")
            student = student.index_select(0, places.to(logits.device, non_blocking=True))
            teacher = {k: x[places] for k, x in teacher.items()}
        teacher = {k: x.to(logits.device, non_blocking=True) for k, x in teacher.items()}
        with torch.autocast(logits.device.type, enabled=False):
            if full:
                value = losses.kl_divergence(student, teacher["logprobs"])
            else:
                value = losses.topk_kl_divergence(
                    student,
                    teacher["topk_logprobs"],
                    teacher["topk_indices"],
                    teacher_rest_logprob=teacher.get("rest_logprob"),
                )
        return {"kl": (value, len(student))}


class HiddenRetention(AnchorRetention):
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
        rank: Place of this process among those that share the anchors.
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
        rank: int = 0,
        world_size: int = 1,
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
            places = mask.flatten().nonzero().flatten()  # on the host, see LogitRetention
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
        teacher = teacher.to(student.device, non_blocking=True)
        with torch.autocast(student.device.type, enabled=False):
            if self.loss == "cosine":
                distance = losses.feature_cosine(student, teacher)
            else:
                function = losses.feature_mse if self.loss == "mse" else losses.feature_l1
                distance = function(student, teacher, variance=self.cache.features.variances[key])
        return distance, student.numel() // student.shape[-1]
