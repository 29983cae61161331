"""What all retention closures share: how far the model has drifted from its own snapshot, on the next anchors.

Made once (`retention = LogitRetention(model, cache)`), then

    loss = retention()          # on the next batch of anchors, with a graph
    retention.drift()           # on all of them, without

`CraftOptimizer` calls it; so may any other loop.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from craft_optim.retention import Retention

from .ahead import Ahead, to_device_ahead, wait_for
from .cache import AnchorBatch, AnchorCache
from .capture import Layer
from .fingerprint import compare_fingerprints, fingerprint
from .forwards import AnchorForward, FrozenMismatchError, Outcome
from .images import Encoding, decode
from .manifest import dtype_name, is_mask
from .passes import Forward, Statistics, autocast_dtype, autocast_to, device_of, isolated_rng, steady, to_device
from .sampling import AnchorSampler, mixed_seed
from .single import single_anchors
from .structure import flatten

__all__ = ["AnchorMismatchError", "AnchorRetention", "Anchors", "CachedRetention"]

# Largest drift that counts as rounding, by the coarsest precision involved. Measured on small models on a CPU, rounding
# to storage alone: float32 1e-7, float16 1e-6, bfloat16 6e-5. The margin is for accelerators, which compute in other
# orders.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}

# Of a cache: tensors by key, how to decode images among them, and what to wait for
_Prepared = tuple[AnchorCache, dict[str, Tensor], dict[str, Encoding], Any]

_NOTHING_VALID = (
    "No position of these anchors is valid: `mask` (or `spans`) selects none of them. Leave such anchors out."
)


class AnchorMismatchError(ValueError):
    """The model does not reproduce its teacher at the start: drift measured against it would mean nothing."""


class Anchors(Protocol):
    """Where batches come from: `AnchorCache`, or anything of its kind."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | Tensor) -> AnchorBatch:
        """The anchors of these numbers, in that order."""
        ...


class AnchorRetention(Retention):
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
        self.autocast, self._tolerance_given = autocast, tolerance
        self._anchors = anchors
        self._device = None if device is None else torch.device(device)
        self._placed = rank is not None
        self._sampler = AnchorSampler(
            len(anchors), batch_size, seed, rank or 0, 1 if world_size is None else world_size
        )
        self._mean: Callable[[Tensor], Tensor] | None = None
        self._position = 0
        self._statistics = Statistics(model) if strict else None

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

    # A compiled training step must not trace into reading files and setting hooks
    def loss(self, number: int) -> Tensor:
        kept, self._position = self._position, number
        try:
            return self._loss()
        finally:
            self._position = kept

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]  # lazy, unlike torch.compiler.disable
    def _loss(self) -> Tensor:
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
        seed = self._seed(self._position)
        batch = self._next(self._position)
        with torch.enable_grad():
            batch = self._taught(batch, seed)
            with self._pass(seed) as remember:
                values = self._weighted(self._terms(batch))
                loss = remember(self._combine(values))
        if self._position == 0 and not getattr(self, "_agreed", False):
            self._check_first({name: value.detach() for name, value in values.items()}, batch)
            self._agreed = True
        return loss

    def _seed(self, position: int) -> int:
        several = self._sampler.world_size > 1
        return mixed_seed(self.seed, position, *([self._sampler.rank] if several else []))

    def _next(self, position: int) -> AnchorBatch:
        """The anchors of a position."""
        return self._read(self._anchors, self._sampler.indices(position), self._seed(position))

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

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
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

    def _check_first(self, values: Mapping[str, Tensor], batch: AnchorBatch) -> None:
        """Raises unless model and teacher agree, before the first step."""
        if not self.strict:
            return
        measured = self._combine(values)
        drift = float(measured if self._mean is None else self._mean(measured))
        tolerance = self._default_tolerance() if self._tolerance_given is None else self._tolerance_given
        if abs(drift) <= tolerance:
            return
        if self._statistics is not None and self._statistics.moved():
            # The task's forward, which came first, has moved them: what has to agree is the model before it
            statistics, self._statistics = self._statistics, None
            with torch.no_grad(), statistics.back():
                with self._pass(self._seed(self._position)):
                    terms = self._terms(batch)
                self._check_first({name: value for name, (value, _) in terms.items()}, batch)
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
    """Retention whose teacher is an `AnchorCache`; see `LogitRetention`, `HiddenRetention` and `TokenRetention`.

    While the task step runs, `workers` threads read the next batches and bring them to the model's device.
    """

    layers: tuple[Layer, ...] = ()

    def __init__(
        self, model: nn.Module, cache: AnchorCache, batch_size: int = 16, *, workers: int = 1, **settings: Any
    ) -> None:
        if workers < 0:
            raise ValueError(f"`workers` must be >= 0. Found workers={workers}.")
        super().__init__(model, cache, batch_size, **settings)
        self.cache = cache
        self._ahead = Ahead(self._prepare, workers)
        self._run: AnchorForward | None = None
        self._destination = torch.device("cpu")

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        super().shard(rank, world_size, mean)
        self._ahead = Ahead(self._prepare, self._ahead.workers)  # what was read ahead is another process' now

    def _prepare(self, position: int) -> _Prepared:
        """Reads a batch and starts its copy to the device; runs in another thread."""
        return self._on_device(self.cache, self._sampler.indices(position), self._destination)

    def _on_device(self, cache: AnchorCache, indices: Sequence[int] | Tensor, device: torch.device) -> _Prepared:
        tensors, encodings = cache.gather(indices, self._wanted(cache), pin_memory=device.type == "cuda")
        if device.type == "cpu":  # decoded ahead, too; elsewhere bytes travel, and are decoded there
            decoded = {key: decode(tensors[key], *encodings[key]) for key in encodings}
            return cache, tensors | decoded, {}, None
        there, event = to_device_ahead({k: x for k, x in tensors.items() if not _stays(k)}, device)
        return cache, tensors | there, encodings, event

    def _next(self, position: int) -> AnchorBatch:
        self._destination = self.device  # the other thread must not walk the model, which FSDP1 changes as it runs
        return _arrived(self._ahead.get(position))

    def _read(self, anchors: Anchors, indices: Sequence[int] | Tensor, seed: int) -> AnchorBatch:
        return _arrived(self._on_device(cast(AnchorCache, anchors), indices, self.device))

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
        drift: float = self._drift(source, batch_size)
        return drift

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def _of_each(self, indices: Sequence[int], number: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """The terms of each of these anchors alone, by one forward without gradients.

        Args:
            indices: Of the cache; at least one.
            number: Which batch this is: as in `drift`, what the forward draws depends on it.

        Returns:
            Name -> values, float64 `[anchors]`, and numbers of positions in these means, int64 `[anchors]`, on the CPU;
            (0, 0) for a mean over none.
        """
        seed, first = mixed_seed(self.seed, number), self._run is None
        with torch.no_grad():
            batch = self._read(self.cache, indices, seed)
            with self._pass(seed):
                outcome = self._outcome(batch)
                if first:
                    self._compare(outcome, batch)  # of the whole: another model is refused in its own words
                parts = single_anchors(outcome, batch, self.cache.joined_features, self.cache.features.batch_dim)
                terms = [self._compare(*part) for part in parts]
        return {
            name: (torch.stack([x[name][0] for x in terms]).cpu().double(), torch.tensor([x[name][1] for x in terms]))
            for name in terms[0]
        }

    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        return self._compare(self._outcome(batch), batch)

    def _outcome(self, batch: AnchorBatch) -> Outcome:
        if self._run is None:  # `layers` are known by now
            self._run = AnchorForward(
                self.model, self.forward, self.layers, self._compares_output(), self.cache.features.frozen
            )
        inputs = to_device(batch.inputs, self.device)
        size = flatten(inputs)[2]
        try:
            return self._run(inputs, size, batch.features.get("mask"), batch.features)
        except FrozenMismatchError as error:
            raise AnchorMismatchError(f"{error} The cache is {self.cache.path}.") from error

    def _wanted(self, cache: AnchorCache) -> list[str]:
        """Names of the features to read."""
        return [*self._features(), *cache.frozen_features]

    @abstractmethod
    def _features(self) -> list[str]:
        """Names of the features that are compared."""

    @abstractmethod
    def _compares_output(self) -> bool:
        """Whether the model's output is needed, not only hidden states."""

    @abstractmethod
    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        """As `_terms`, of a forward's results."""

    @abstractmethod
    def _check_kind(self, cache: AnchorCache) -> None:
        """Raises unless the cache holds what this closure compares."""

    def _precisions(self) -> list[torch.dtype]:
        return [*super()._precisions(), getattr(torch, self.cache.features.dtype)]

    def _teacher_in_words(self) -> str:
        return f"the cache {self.cache.path}"

    def _cause(self, batch: AnchorBatch) -> str:
        built_by = self.cache.fingerprint
        if built_by is not None and (why := compare_fingerprints(built_by, fingerprint(self.model))):
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
        now = None if running is None else dtype_name(running)
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


def _stays(key: str) -> bool:
    """Masks select positions on the host: an accelerator need not be waited for."""
    return is_mask(key.removeprefix("features."))


def _arrived(prepared: _Prepared) -> AnchorBatch:
    cache, tensors, encodings, event = prepared
    wait_for(tensors, event)
    return cache.batch(tensors, encodings)
