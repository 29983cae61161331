"""Retention on anchors: drift of a model from its teacher, on the batch of anchors of a pass or on all."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from craft_optim._numbers import number, whole
from craft_optim.retention import Retention

from .cache import AnchorBatch
from .passes import autocast_dtype, autocast_to, device_of, isolated_rng, steady
from .reading import AnchorMismatchError, Reading
from .running_statistics import Statistics, StatisticsWatch
from .sampling import AnchorSampler, mixed_seed, spread

__all__ = ["AnchorMismatchError", "AnchorRetention", "Anchors", "Settings"]

# Largest drift that counts as rounding, by the coarsest precision involved. Measured on small models on a CPU, rounding
# to storage alone: float32 1e-7, float16 1e-6, bfloat16 6e-5. The margin is for accelerators, which compute in other
# orders.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}

_NOTHING_VALID = (
    "No position of these anchors is valid: `mask` (or `spans`) selects none of them. Leave such anchors out."
)


class Anchors(Protocol):
    """A source of batches: `AnchorCache`, or anything of its kind."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | Tensor) -> AnchorBatch:
        """The anchors with these numbers, in that order."""
        ...


class Settings(TypedDict, total=False):
    """Arguments of every closure on anchors; `AnchorRetention` explains them."""

    seed: int
    strict: bool
    device: torch.device | str | None
    tolerance: float | None


class AnchorRetention(Retention):
    """Retention on anchors; see `LogitRetention`, `HiddenRetention`, `TokenRetention` and `OnlineRetention`.

    The anchors of pass `number`, and its forward's random numbers, depend only on `number`, `seed` and `shard`. On
    another number of processes a batch has another number of anchors: a run resumed there sees other ones, all valid. A
    deep copy of a closure with its model runs the copied model on the same anchors.

    A subclass compares: it must define `_terms(batch)`, the forward and its comparison. A `CachedRetention` defines
    `_compare` and `_check_kind` instead, and the class attributes `_features` and `_wants_output`. The rest has
    defaults: `_source` takes the anchors of `drift`, `_read` makes batches, `_taught` adds the teacher's outputs,
    `_combine` makes one number of the terms, `_precisions`, `_teacher_in_words` and `_cause` serve the check of pass 0.

    Args:
        model: The model in training, on its device, in either mode.
        anchors: The anchors.
        batch_size: Anchors per pass (and process).
        reading: The `Reading`, how the model is run. None: by its own call; on a cache, as its teacher was.
        seed: Seed of the order of the anchors and of the forward's random numbers.
        strict: True to check in pass 0, until it agrees once, that the model is its teacher.
        device: Device of the inputs. None: that of the model's first parameter.
        tolerance: Largest |L_ret| that this check accepts. None: by precision; 1e-4 for float32, 1e-3 for float16, 5e-3
            for bfloat16, whichever of storage and computation is coarsest.

    Raises:
        ValueError: There are fewer anchors than a batch, or a number is out of range.
    """

    _fixed = frozenset(
        ("model", "reading", "batch_size", "seed", "strict", "cache", "workers", "layers", "pooling", "distance")
    ).union(("teacher", "collate", "output"))

    def __init__(
        self,
        model: nn.Module,
        anchors: Anchors,
        batch_size: int = 16,
        *,
        reading: Reading | None = None,
        seed: int = 0,
        strict: bool = True,
        device: torch.device | str | None = None,
        tolerance: float | None = None,
    ) -> None:
        if tolerance is not None:
            tolerance = number("tolerance", tolerance, least=0.0, finite=False)
        self.model, self.strict = model, strict
        self.reading = Reading() if reading is None else reading
        self._anchors, self._tolerance = anchors, tolerance
        self._sampler = AnchorSampler(len(anchors), batch_size, seed)
        self.batch_size, self.seed = self._sampler.batch_size, self._sampler.seed
        self._device = None if device is None else torch.device(device)
        self._mean: Callable[[Tensor], Tensor] | None = None
        self._unchecked, self._statistics = strict, Statistics(model) if strict else None
        self._statistics_watch = StatisticsWatch()

    def __deepcopy__(self, memo: dict[int, Any]) -> "AnchorRetention":
        memo |= {id(x): x for x in (self._anchors, self._mean)}  # neither copied nor moved
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def device(self) -> torch.device:
        """Device of the inputs, read at every pass: frameworks move a model after its optimizer is made."""
        return device_of(self.model) if self._device is None else self._device

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Largest |L_ret| that rounding gives an unchanged model: as given, or by the current precisions."""
        return self._by_precision() if self._tolerance is None else self._tolerance

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that the backward may reach, whoever owns them."""
        return list(self.model.parameters())

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Makes this process one of several that share the anchors; `CraftOptimizer` calls it if there are several.

        Each draws its own `batch_size` anchors. With `mean`, losses are weighted by their numbers of valid positions,
        n_r / mean(n), so that the mean over processes of loss and gradient is that of one process with the whole batch;
        `mean` is called once per pass, and once more at the check of pass 0.

        Raises:
            ValueError: There are fewer anchors than all processes' batches take together, or `rank` is out of range.
        """
        self._sampler = AnchorSampler(len(self._anchors), self.batch_size, self.seed, rank, world_size)
        self._mean, self.shared = mean, world_size > 1

    # A compiled training step must not trace into reading files and setting hooks
    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]  # lazy, unlike torch.compiler.disable
    def loss(self, number: int) -> Tensor:
        """L_ret on the anchors of pass `number`: a float32 scalar, with a graph unless gradients are off.

        It needs its own backward: until that is done, activation checkpointing would repeat other forwards without
        dropout.

        Raises:
            AnchorMismatchError: The model's outputs have other shapes than the teacher's; in pass 0 also other values.
            ValueError: No position of the batch is valid; with the `mean` of `shard`, the loss is NaN if no process has
                one.
        """
        seed = self._seed(number)
        batch = self._batch(number)
        batch = self._taught(batch, seed)
        with self._pass(seed) as remember:
            values = self._weighted(self._terms(batch))
            loss = remember(self._combine(values))
        self._statistics_watch.look(self.model)
        if number == 0:
            self._check_once({name: value.detach() for name, value in values.items()}, batch)
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def drift(self, anchors: Any = None, count: int | None = None, *, batch_size: int | None = None) -> float:
        """L_ret over all anchors, or over given held-out ones, without gradients.

        The mean is over all their valid positions (or anchors), whatever the batches. Advances nothing. Each of several
        processes measures the whole.

        Args:
            anchors: Other anchors of the same kind: a cache, or batches as `AnchorCache.read` gives them; examples for
                `OnlineRetention`. None: its own.
            count: Largest number of anchors to measure on, evenly spaced, the same ones at every call. None: all.
            batch_size: Anchors per forward. None: the closure's.

        Raises:
            ValueError: The anchors are of another kind, there are none, or none of their positions is valid; or a
                number is out of range.
        """
        totals: dict[str, Tensor] = {}
        weights: dict[str, int] = {}
        for batch, seed in self._batches(anchors, count, batch_size):
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

    def check(self) -> None:
        """Raises AnchorMismatchError as pass 0 would, with `strict`, until both agree once. One forward."""
        if self._unchecked:
            self.loss(0)

    def check_anchors(self, anchors: Any) -> None:
        """Checks anchors for `drift`; see `Retention.check_anchors`."""
        self._source(anchors)

    def examples(self, count: int) -> list[Any]:
        """Inputs of at most `count` anchors, evenly spaced, each a batch of one."""
        return [self._read(self._anchors, [place], 0).inputs for place in spread(len(self._anchors), count)]

    def _seed(self, number: int) -> int:
        return mixed_seed(self.seed, number, *([self._sampler.rank] if self.shared else []))

    def _batch(self, number: int) -> AnchorBatch:
        return self._read(self._anchors, self._sampler.indices(number), self._seed(number))

    def _batches(self, anchors: Any, count: int | None, size: int | None) -> Iterator[tuple[AnchorBatch, int]]:
        """The batches in order, each with its seed; the same on every process."""
        source = self._anchors if anchors is None else self._source(anchors)
        size = self.batch_size if size is None else size
        for name, value in (("batch_size", size), ("count", count)):
            if value is not None:
                whole(name, value)
        if isinstance(source, Iterable):
            if count is not None:
                raise ValueError("`count` goes with a cache. Found batches: leave it out, and pass fewer of them.")
            yield from ((batch, mixed_seed(self.seed, number)) for number, batch in enumerate(source))
            return
        places = range(len(source)) if count is None else spread(len(source), count)
        for batch, start in enumerate(range(0, len(places), size)):
            seed = mixed_seed(self.seed, batch)
            yield self._read(source, places[start : start + size], seed), seed

    def _weighted(self, terms: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Each term's share in its mean over all processes."""
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

    @contextmanager
    def _pass(self, seed: int, model: nn.Module | None = None) -> Iterator[Callable[[Tensor], Tensor]]:
        """Sets up a forward on anchors; yields a function that makes the loss remember it for its backward."""
        device = self.device if model is None else device_of(model)
        with (
            steady(self.model if model is None else model) as remember,
            isolated_rng(device, seed),
            autocast_to(device, self.reading.autocast),
        ):
            yield remember
            if not torch.is_grad_enabled() and torch.is_autocast_enabled(device.type):
                # Older torch keeps weights cast without gradients for later forwards (pytorch/pytorch#158232)
                torch.clear_autocast_cache()

    def _source(self, anchors: Any) -> Any:
        """`Anchors`, or an iterable of batches."""
        return anchors

    def _read(self, anchors: Anchors, indices: Sequence[int] | Tensor, seed: int) -> AnchorBatch:
        return anchors.read(indices)

    def _taught(self, batch: AnchorBatch, seed: int) -> AnchorBatch:
        """The batch with the teacher's outputs; a cache has read them already."""
        return batch

    @abstractmethod
    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        """Name -> (mean over the batch, number of positions or anchors in that mean); (0, 0) for a mean over none."""

    def _combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        return next(iter(terms.values()))

    # -- the check of pass 0 -------------------------------------------------------------------------------------------

    def _precisions(self) -> list[torch.dtype]:
        """Dtypes that model and teacher compute in."""
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        running = autocast_dtype(self.device, self.reading.autocast)
        return dtypes if running is None else [*dtypes, running]

    def _by_precision(self) -> float:
        return max(_TOLERANCE.get(dtype, max(_TOLERANCE.values())) for dtype in self._precisions())

    def _check_once(self, values: Mapping[str, Tensor], batch: AnchorBatch) -> None:
        """Raises unless model and teacher agree, until they do once: a line search runs pass 0 several times."""
        if self._unchecked:
            self._check(values, batch)
            self._unchecked, self._statistics = False, None

    def _check(self, values: Mapping[str, Tensor], batch: AnchorBatch) -> None:
        tolerance, drift, statistics = self.tolerance, self._over_all(self._combine(values)), self._statistics
        moved = not abs(drift) <= tolerance and statistics is not None and bool(statistics.moved())
        # The task's forward, which came first, may have moved them: the model before it must agree
        with torch.no_grad(), statistics.back() if moved and statistics is not None else nullcontext():
            if moved:
                with self._pass(self._seed(0)):
                    terms = self._terms(batch)
                drift = self._over_all(self._combine({name: value for name, (value, _) in terms.items()}))
            if not abs(drift) <= tolerance:
                raise AnchorMismatchError(
                    f"The model does not reproduce {self._teacher_in_words()} before the first step: its drift is "
                    f"{drift:.3g} where at most {tolerance:.3g} is rounding. {self._cause(batch)} A run that continues "
                    "from a fine-tuned checkpoint loads its optimizer's state, or passes strict=False."
                )

    def _over_all(self, value: Tensor) -> float:
        return float(value if self._mean is None else self._mean(value))

    def _teacher_in_words(self) -> str:
        return "its teacher"

    def _cause(self, batch: AnchorBatch) -> str:
        """The likely cause of a drift in pass 0, and what to do."""
        return ""
