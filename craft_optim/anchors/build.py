"""`build`: runs the teacher over the anchors once, and writes its outputs into a cache."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from craft_optim._numbers import whole
from craft_optim._paths import local

from .build_folder import building, clean, require_same
from .cache import AnchorCache
from .capture import Layer, resolve_layers
from .features import Extractor
from .fingerprint import anchor_checksums, fingerprint
from .frozen import resolve_frozen
from .kept import TopK, top_k_of
from .manifest import MANIFEST, FeatureSpec, dtype_name
from .names import class_name, unwrapped
from .passes import autocast_dtype, device_of, isolated_rng, steady
from .processes import Team, find_team
from .progress import anchor_bar
from .reading import Reading, reading_of, with_fields
from .room import bytes_on_disk, say_room
from .shards import AnchorCacheError
from .structure import Flat, Lengths, flatten
from .writing import Writer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["build"]

_log = logging.getLogger("craft_optim")


def build(
    model: nn.Module,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    reading: Reading | None = None,
    *,
    top_k: TopK = "auto",
    layers: Iterable[Layer] = (),
    dtype: torch.dtype = torch.float16,
    images: str = "uint8",
    shard_size: int = 256,
    units_of: AnchorCache | None = None,
    model_id: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    process_group: "ProcessGroup | Literal[False] | None" = None,
    replicated: bool = True,
    **fields: Any,
) -> AnchorCache:
    """Runs the model over the anchors, before it is fine-tuned, and writes its outputs into a folder.

    A batch is a tensor (`model(batch)`), a tuple (`model(*batch)`) or a mapping (`model(**batch)`), its first dimension
    the anchors. Only a mapping's tensors are stored and passed to the model. Batches may differ in length (dimension 1)
    if the shorter ones may be padded with zeros on the right, that is, if an `attention_mask` among the inputs, or the
    reading's `mask`, covers that. A mapping's entry "category", a list with a text for each anchor, is kept: drift is
    then also reported per category.

    The model runs as in every later retention pass: as it is, except that dropout and normalisation modules are in eval
    mode. Its flags, and the random number generators of the CPU and of the model's device, are restored afterwards.

    A finished cache of the same model and settings is returned as it is, without running anything; a half-built one is
    continued, if `batches` yields the same anchors in the same order. The bytes are the same however often a build was
    stopped, and on any number of processes.

    With N processes (torchrun), all call this. Each writes every N-th shard, and runs the teacher on the batches of its
    own shards only; if `shard_size` is a multiple of the batch size, no batch belongs to two shards.

    Args:
        model: The teacher; it stays where it is, inputs are moved to its device.
        batches: Iterable of batches, read once and lazily.
        path: The cache's folder; created if needed.
        reading: The `Reading`: how the model is run, what its output is, and which positions count, if not as above.
            The cache passes it on to the closures.
        top_k: Number k of the likeliest classes to keep, with the mass of the rest; or "all". "auto": all up to 4,096
            classes, else the 64 likeliest. The KL over k classes and the rest is a lower bound of the KL over all; the
            log (level INFO) and `AnchorCache.kept` estimate the difference.
        layers: Hidden states to keep: numbers (k is the residual that enters decoder layer k; -1 the one before the
            final norm) and names of modules (their outputs).
        dtype: Dtype on disk of outputs (log-probabilities of classes) and hidden states: float16, bfloat16 or float32.
        images: "uint8": floating inputs of four or more dimensions are stored as bytes where that gives back every bit
            (see `images.FORMULAS` for the pipelines that qualify), and as they are otherwise. "keep": always as they
            are.
        shard_size: Anchors per file; one shard's anchors are held in memory.
        units_of: Of values and hidden states, whose drift is in shares of the teacher's variance: the cache whose
            variance that is, for held-out anchors. None: that of these anchors.
        model_id: Name of the teacher, for people.
        resume: True to continue a half-built folder; False starts over.
        overwrite: True to start over whatever the folder holds.
        progress: True to show a bar (or, without tqdm, log lines). None: only on a terminal with tqdm.
        process_group: Group of the processes that call this together; each runs and writes its share. None: all
            processes of torch.distributed, if it is initialised. False: this one alone.
        replicated: True if all of them are given the same batches. False: each has its own anchors, which are stored
            one process after the other.
        fields: Fields of `Reading` by keyword, instead of those of `reading`: `class_dim`, `output`, `mask` and so on.

    Returns:
        The cache, opened.

    Raises:
        AnchorCacheError: The folder holds another cache or another half-built one, or `batches` differs from its
            anchors; it cannot be written, or will not fit on the disk (nothing is written then); another build is
            writing to it, or another process has failed. Complete shards stay.
        TypeError: An argument is unknown, `batches` are single examples, or the model cannot be called on them.
        ValueError: An argument is out of range; the kind of the output is unknown or wrong; there are no batches,
            batches do not fit together, an anchor has no valid position, or an output is not finite, also after
            rounding to `dtype`. Nothing of the batch is written.

    Cost: one forward per batch, up to the deepest of `layers` where the output is not kept. Disk: with float16, 2 V
    bytes per position for all of V classes, labels or channels, 6 k + 2 for the top k, and 2 D per anchor (or
    position), layer and span. The log (level INFO) has the total before the first shard is written.
    """
    _require_batches(batches)
    if images not in ("uint8", "keep"):
        raise ValueError(f"`images` must be 'uint8' or 'keep'. Found {images!r}.")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"`dtype` must be float16, bfloat16 or float32. Found {dtype}.")
    shard_size = whole("shard_size", shard_size)
    reading = with_fields(Reading() if reading is None else reading, fields, "build")
    if top_k not in ("auto", "all") and reading.output is None:
        raise ValueError(f"`top_k` must be of an output. Found top_k={top_k}, output={reading.output!r}.")
    how_many = top_k_of(top_k)
    layers = resolve_layers(model, layers)
    if reading.output is None and not layers and reading.tokens is None:
        raise ValueError("Nothing to cache: leave `output` as it is, or pass `layers` or `tokens`.")

    if type(model).__name__ == "DistributedDataParallel":
        model = unwrapped(model)  # its forward broadcasts buffers: every process would need as many of them
    device = device_of(model)
    ran_under = autocast_dtype(device, reading.autocast)
    how = {
        **reading.in_words(),
        "pooling": dict(reading.pooling or {"all": "masked_mean"}) if layers else {},
        "frozen": tuple(resolve_frozen(model, reading.frozen)),
        "autocast": None if ran_under is None else dtype_name(ran_under),
    }
    spec = FeatureSpec(
        **({} if reading.output is None else how_many),
        dtype=dtype_name(dtype),
        layers=layers,
        **how,
    )
    settings = {
        "features": json.loads(json.dumps(asdict(spec))),
        "images": images,
        "shard_size": shard_size,
        "teacher": {
            "fingerprint": fingerprint(model),
            "class": class_name(model),
            "model_id": model_id,
            "dtypes": sorted({dtype_name(p.dtype) for p in model.parameters() if p.is_floating_point()}),
        },
    }
    folder = local(path)
    team = find_team(model, process_group)
    # Reading a DataLoader draws random numbers. A run that finds its cache finished draws none: both must train alike.
    with isolated_rng(device, None):
        stream = _Stream(
            batches,
            reading.lengths,
            progress if team.rank == 0 and team.writes else False,
            model_id or settings["teacher"]["class"],
        )
        if _agreed(team, folder, settings, stream, replicated) and not overwrite:
            return _finished(folder, settings, stream, reading)
        extractor = Extractor(model, device, spec, dtype, reading)
        start_over = overwrite or not resume
        with building(folder, settings, team, replicated, start_over=start_over) as target, Writer(target) as writer:
            target.units = None if units_of is None else units_of.features
            with steady(model):
                _run(extractor, stream, writer)
            writer.finish()
            cache = AnchorCache.open(folder, reading)
            if team.rank == 0 and team.writes:
                for name, kept in cache.kept().items():
                    _log.info("anchors in %s: %s", folder, kept.describe(cache.features.outputs[name].size))
            return cache


def _require_batches(batches: Any) -> None:
    """Raises TypeError for a source of single examples, or for one batch alone."""
    kinds = {kind.__name__ for kind in type(batches).__mro__}
    examples = "Dataset" in kinds and "IterableDataset" not in kinds
    remedy = None
    if isinstance(batches, Tensor):
        remedy = "give it in parts, batches.split(16), or as one batch, [batches]"
    elif isinstance(batches, Mapping):
        remedy = "one batch is given as a list of one, [batches]"
    elif isinstance(batches, str):
        remedy = "give batches of what the model reads, such as of a tokenizer"
    elif examples and hasattr(batches, "__getitem__"):
        remedy = (
            "it holds single examples. Pass torch.utils.data.DataLoader(dataset, batch_size=16); or, if its items are "
            "batches, list(dataset)"
        )
    if remedy is not None:
        raise TypeError(f"`batches` must be an iterable of batches. Found {type(batches).__name__}: {remedy}.")


def _agreed(team: Team, folder: Path, settings: dict[str, Any], stream: "_Stream", replicated: bool) -> bool:
    """True if the folder holds a finished cache; raises unless all processes see the same."""
    finished = (folder / MANIFEST).exists()
    if not team.several:
        return finished
    first = stream.first()
    batch = None if first is None else (first.structure, tuple(anchor_checksums(first)))
    seen = team.gather((finished, json.dumps(settings), batch))
    if len({which for which, *_ in seen}) > 1:
        raise AnchorCacheError(
            f"{folder} is not one folder on all processes: some of them see a finished cache there and others do not. "
            "Pass a `path` on a file system that they share."
        )
    if len({words for _, words, _ in seen}) > 1:
        raise ValueError("All processes must call `build` with the same model and the same arguments.")
    first_batches = {batch for *_, batch in seen}
    if replicated and len(first_batches) > 1:
        raise ValueError(
            "With replicated=True all processes must be given the same batches, of which each runs its share. The "
            "first batches differ: take a sampler for several processes out of the loader, or, if each process has "
            "anchors of its own, pass replicated=False."
        )
    if not replicated and len(first_batches) < team.world_size:
        raise ValueError(
            "With replicated=False each process must be given anchors of its own. Some first batches are the same: "
            "leave `replicated` as it is, or split the anchors."
        )
    return finished


def _run(extractor: Extractor, stream: "_Stream", writer: Writer) -> None:
    """Runs every batch that this process is responsible for."""
    folder, team, forwards, last = writer.folder, writer.folder.team, 0, None
    for batch, count in stream:
        if extractor.generate is None:
            writer.expect(batch)
        batch = replace(batch, tensors={name: x.detach() for name, x in batch.tensors.items()})
        last = batch.structure.rebuild(batch.tensors), batch.count, count, batch.lengths
        if writer.skips(batch):
            continue
        if team.sharded:
            team.anyone(True)
        taught = extractor(*last)
        inputs = batch
        if extractor.generate is not None:
            inputs = flatten(taught.inputs, batch.lengths)
            writer.expect(inputs)
        if forwards == 0:
            each = bytes_on_disk(inputs.tensors, taught.features, folder.settings["images"]) / batch.count
            anchors = stream.total and stream.total * (1 if folder.replicated else team.world_size)
            say_room(folder.path, each, anchors, speaks=team.rank == 0 and team.writes)
        writer.add(inputs, taught.features, taught.outputs, taught.joined, batch)
        forwards += 1
        if team.world_size > 1:
            folder.check_others()
    # Others may wait for this process' parts of the layers: it runs forwards as long as they do
    while team.sharded and last is not None and team.anyone(False):
        extractor(*last)


def _finished(folder: Path, settings: dict[str, Any], stream: "_Stream", reading: Reading) -> AnchorCache:
    """The cache in the folder; raises unless it is the one that would be built."""
    cache = AnchorCache.open(folder)
    require_same(folder, cache.settings, settings)
    cache.reading = reading_of(cache, reading)
    first = stream.first()
    if first is not None:
        stored, given = list(cache.first_anchors), anchor_checksums(first)
        if stored[: len(given)] != given[: len(stored)]:
            _log.warning(
                "The cache in %s is used as it is, but its first anchors are not the first batch passed to "
                "`build`. Pass overwrite=True if the anchors have changed; ignore this if they are shuffled.",
                folder,
            )
    clean(folder)
    return cache


class _Stream:
    """The batches, flat, each with the number of anchors before it, under a progress bar."""

    def __init__(self, batches: Iterable[Any], lengths: Lengths | None, progress: bool | None, title: str) -> None:
        self._progress, self._title = progress, title
        try:
            self._number: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:  # an iterable without a length
            self._number = None
        self._lengths, self._names, self._no_rows = lengths, tuple[str, ...](), dict[str, Tensor]()
        self._batches: Iterator[Flat] = map(self._flat, batches)
        self._peeked: list[Flat] = []
        self.total: int | None = None  # total of anchors, if it can be known

    def _flat(self, batch: Any) -> Flat:
        """The batch taken apart; an input that none of its anchors has, such as a picture, has no rows instead."""
        lacking = {name: x for name, x in self._no_rows.items() if name not in batch}
        if lacking and isinstance(batch, Mapping):
            entries = {**batch, **lacking}
            batch = {name: entries[name] for name in self._names if name in entries} | entries
        flat = flatten(batch, self._lengths)
        if not self._names:
            self._names = flat.structure.names
            self._no_rows = {name: flat.tensors[name][:0] for name in flat.structure.ragged}
        return flat

    def first(self) -> Flat | None:
        """The first batch, which the iteration yields again; None without batches."""
        if not self._peeked:
            self._peeked = list(islice(self._batches, 1))
        return self._peeked[0] if self._peeked else None

    def __iter__(self) -> Iterator[tuple[Flat, int]]:
        count, began, said = 0, time.monotonic(), time.monotonic()
        with anchor_bar(self._progress, self._title) as (bar, lines):
            for number, batch in enumerate(chain(self._peeked, self._batches), 1):
                self._peeked, size = [], batch.count
                if self._number is not None:  # estimated: the last batch may be smaller
                    self.total = math.ceil((count + size) / number * max(self._number, number))
                yield batch, count
                count += size
                bar(size, self.total)
                if lines and time.monotonic() - said > 10.0:
                    said = time.monotonic()
                    rate = count / (said - began)
                    left = f", {(self.total - count) / rate:.0f} s left" if self.total else ""
                    _log.info("anchors of %s: %d done, %.1f per second%s", self._title, count, rate, left)
        if lines:
            _log.info("anchors of %s: %d done, %.1f s", self._title, count, time.monotonic() - began)
