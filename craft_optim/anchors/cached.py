"""Retention with a cache as teacher: batches, read ahead while the task step runs, and one forward on each."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Unpack, cast

import torch
from torch import Tensor, nn

from craft_optim._numbers import whole

from .ahead import Ahead, to_device_ahead, wait_for
from .cache import AnchorBatch, AnchorCache
from .capture import Layer
from .fingerprint import compare_fingerprints, fingerprint
from .forwards import AnchorForward, FrozenMismatchError, Outcome
from .images import Encoding, decode
from .kinds import OutputError
from .manifest import dtype_name, is_index, is_mask
from .outputs import Outputs
from .passes import autocast_dtype, to_device
from .reading import AnchorMismatchError, Reading, reading_of, require_functions
from .retention import AnchorRetention, Anchors, Settings
from .sampling import mixed_seed, spread
from .single import single_anchors
from .structure import flatten

__all__ = ["CachedRetention", "CachedSettings", "DriftOfEach"]

# Tensors of a cache by key, how to decode images among them, and the event to wait for
_Prepared = tuple[AnchorCache, dict[str, Tensor], dict[str, Encoding], Any]
_OfEach = dict[str, tuple[Tensor, Tensor]]  # term -> values and numbers of positions, one per anchor


class CachedSettings(Settings, total=False):
    """Arguments of every closure on a cache; `CachedRetention` explains them."""

    reading: Reading | None
    workers: int


class DriftOfEach(NamedTuple):
    """Drift on some anchors together, and on each of them.

    Attributes:
        value: Drift on all of them, as `drift` gives it.
        each: Drift on each anchor alone, float64 `[anchors]`.
        parts: The same for each part of a combined drift: layers and spans, or members.
    """

    value: float
    each: Tensor
    parts: dict[str, "DriftOfEach"]


class CachedRetention(AnchorRetention):
    """Retention whose teacher is an `AnchorCache`; see `LogitRetention`, `HiddenRetention` and `TokenRetention`.

    Threads read the next batches and bring them to the model's device. Two optimizers on one closure each get the right
    anchors; where their positions differ, reading ahead is wasted.

    Args:
        model: The model in training, on its device, in either mode.
        cache: Cache that was built from the same model.
        batch_size: Anchors per pass (and process).
        reading: The `Reading` that the cache was built with. None: as the cache has it.
        workers: Threads that read ahead; 0 reads when called.
        **settings: Arguments of `AnchorRetention`.

    Raises:
        AnchorMismatchError: The cache was built with another reading, or with a `forward` that is missing.
        ValueError: The cache does not hold what is compared, or fewer anchors than a batch.
    """

    layers: tuple[Layer, ...] = ()
    _features: Iterable[str]  # names of the features that are compared
    _wants_output: bool = True  # True if the model's output is needed, not only hidden states

    def __init__(
        self,
        model: nn.Module,
        cache: AnchorCache,
        batch_size: int = 16,
        *,
        reading: Reading | None = None,
        workers: int = 1,
        **settings: Unpack[Settings],
    ) -> None:
        workers = whole("workers", workers, least=0)
        self._check_kind(cache)
        reading = cache.reading if reading is None else reading_of(cache, reading)
        require_functions(cache, reading, "forward")
        super().__init__(model, cache, batch_size, reading=reading, **settings)
        self.cache, self.workers = cache, workers
        self._ahead = Ahead(self._prepare, workers)
        self._run: AnchorForward | None = None
        self._destination = torch.device("cpu")

    def shard(self, rank: int, world_size: int, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        """Restarts reading ahead; see `AnchorRetention.shard`."""
        super().shard(rank, world_size, mean)
        self._ahead = Ahead(self._prepare, self.workers)  # what was read ahead is another process' now

    def examples(self, count: int) -> list[Any]:
        """Inputs of at most `count` anchors, evenly spaced, each a batch of one."""
        return [self.cache.read([place], features=False).inputs for place in spread(len(self.cache), count)]

    def drift_of_each(
        self, indices: Sequence[int], batch_size: int | None = None, on_batch: Callable[[int], object] | None = None
    ) -> DriftOfEach:
        """Drift on these anchors of the cache together, and on each, without gradients.

        Args:
            indices: Numbers of the anchors; at least one.
            batch_size: Anchors per forward. None: the closure's.
            on_batch: Function called after each forward with its number of anchors.

        Raises:
            AnchorMismatchError: The model's outputs have other shapes than the teacher's.
            ValueError: An anchor has no valid position; the message names it.
        """
        size, found = self.batch_size if batch_size is None else batch_size, []
        for number, start in enumerate(range(0, len(indices), size)):
            batch = indices[start : start + size]
            found.append(self._of_each(batch, mixed_seed(self.seed, number)))
            if on_batch is not None:
                on_batch(len(batch))
        terms = {
            name: (torch.cat([x[name][0] for x in found]), torch.cat([x[name][1] for x in found])) for name in found[0]
        }
        for name, (_, counts) in terms.items():
            if empty := [place for place, count in zip(indices, counts.tolist(), strict=True) if not count]:
                raise ValueError(
                    f"No position of the anchors {str(empty[:5])[1:-1]} in {self.cache.path} is valid ({name}): "
                    "nothing of them can be compared. Leave such anchors out."
                )
        return self._put_together(terms)

    def _put_together(self, terms: _OfEach) -> DriftOfEach:
        each = {name: x for name, (x, _) in terms.items()}
        means = {name: (x * counts).sum() / counts.sum() for name, (x, counts) in terms.items()}
        parts = {name: DriftOfEach(float(means[name]), each[name], {}) for name in terms}
        return DriftOfEach(float(self._combine(means)), self._combine(each), parts)

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def _of_each(self, indices: Sequence[int], seed: int) -> _OfEach:
        """Terms of each anchor alone, by one forward: values, float64, and counts, int64; (0, 0) if none."""
        first = self._run is None
        with torch.no_grad():
            batch = self._read(self.cache, indices, seed)
            with self._pass(seed):
                outcome = self._outcome(batch)
                if first:
                    self._compare(outcome, batch)  # on the whole batch: its errors name another model
                parts = single_anchors(outcome, batch, self.cache.joined_features, self.cache.features.batch_dim)
                terms = [self._compare(*part) for part in parts]
        return {
            name: (torch.stack([x[name][0] for x in terms]).cpu().double(), torch.tensor([x[name][1] for x in terms]))
            for name in terms[0]
        }

    # -- batches -------------------------------------------------------------------------------------------------------

    def _prepare(self, number: int) -> _Prepared:
        """Reads a batch and starts its copy to the device; runs in another thread."""
        return self._on_device(self.cache, self._sampler.indices(number), self._destination)

    def _on_device(self, cache: AnchorCache, indices: Sequence[int] | Tensor, device: torch.device) -> _Prepared:
        wanted = [*self._features, *cache.frozen_features]
        tensors, encodings = cache.gather(indices, wanted, pin_memory=device.type == "cuda")
        if device.type == "cpu":  # decoded ahead, too; elsewhere bytes travel, and are decoded there
            return cache, tensors | {key: decode(tensors[key], *encodings[key]) for key in encodings}, {}, None
        # Masks select positions on the host, and tokens are compared with the number of classes there: an accelerator
        # need not be waited for
        stay = {
            key
            for key in tensors
            if key == "features.tokens" or is_mask(key.removeprefix("features.")) or is_index(key)
        }
        moving = {key: x for key, x in tensors.items() if key not in stay}
        there, event = to_device_ahead(moving, device)
        return cache, tensors | there, encodings, event

    def _batch(self, number: int) -> AnchorBatch:
        self._destination = self.device  # the other thread must not walk the model, which FSDP1 changes as it runs
        return _arrived(self._ahead.get(number) if self.workers else self._prepare(number))

    def _read(self, anchors: Anchors, indices: Sequence[int] | Tensor, seed: int) -> AnchorBatch:
        return _arrived(self._on_device(cast(AnchorCache, anchors), indices, self.device))

    def _source(self, anchors: Any) -> Any:
        if isinstance(anchors, AnchorCache):
            self._check_kind(anchors)
        return anchors

    # -- the forward ---------------------------------------------------------------------------------------------------

    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        return self._compare(self._outcome(batch), batch)

    def _outcome(self, batch: AnchorBatch) -> Outcome:
        reading = self.reading
        if self._run is None:  # `layers` are known by now
            self._run = AnchorForward(
                self.model,
                reading.forward,
                self.layers,
                self._outputs() if self._wants_output else None,
                reading.frozen,
            )
        inputs = to_device(batch.inputs, self.device)
        try:
            count = flatten(inputs, batch.lengths).count
            return self._run(inputs, count, batch.features.get("mask"), batch.features, batch.lengths)
        except (FrozenMismatchError, OutputError) as error:
            raise AnchorMismatchError(f"{error} The cache is {self.cache.path}.") from error

    def _outputs(self) -> Outputs:
        held = self.cache.features.outputs
        if not held:  # the teacher's tokens alone
            return Outputs(self.model, "classes", -1)
        return Outputs(self.model, {name: output.kind for name, output in held.items()}, known=held)

    @abstractmethod
    def _compare(self, outcome: Outcome, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        """The terms of `_terms`, computed from a forward's results."""

    @abstractmethod
    def _check_kind(self, cache: AnchorCache) -> None:
        """Raises unless the cache holds what this closure compares."""

    # -- the check of pass 0 -------------------------------------------------------------------------------------------

    def _precisions(self) -> list[torch.dtype]:
        return [*super()._precisions(), getattr(torch, self.cache.features.dtype), *self.cache.teacher_dtypes]

    def _teacher_in_words(self) -> str:
        return f"the cache {self.cache.path}"

    def _cause(self, batch: AnchorBatch) -> str:
        built_by = self.cache.fingerprint
        if built_by is not None and (why := compare_fingerprints(built_by, fingerprint(self.model))):
            return f"Cause: {why}. Load the weights that the cache was built with, or build it with these."
        values = []
        for number in (0, 1):
            with self._pass(mixed_seed(self.seed, number)):
                values.append({name: float(value) for name, (value, _) in self._terms(batch).items()})
        if values[0] != values[1]:
            return (
                "Cause: the weights are the same, but the model's outputs are random: dropout or noise that is "
                "active in train mode, in a place that is not recognised as such. Turn it off in `forward=`."
            )
        built, running = self.cache.features.autocast, autocast_dtype(self.device, self.reading.autocast)
        now = None if running is None else dtype_name(running)
        if built != now:
            return (
                f"Cause: the cache was built under autocast {built}, this pass runs under {now}. Step outside of "
                "autocast, or build the cache under it."
            )
        return (
            "Cause: the weights are the same, but not what is computed with them. Likely: a `forward=` that has "
            "changed, another precision (autocast inside of the model's forward) or attention implementation than in "
            "`build`, or inputs that were changed after the cache was built."
        )


def _arrived(prepared: _Prepared) -> AnchorBatch:
    cache, tensors, encodings, event = prepared
    if event is not None:
        wait_for(tensors, event)
    return cache.batch(tensors, encodings)
