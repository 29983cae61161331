"""Write a cache: run the teacher over the anchors once, and keep what it says."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .build_folder import building, clean, require_same
from .cache import AnchorCache
from .capture import POOLINGS, Layer, Spans, resolve_layers
from .features import Extractor
from .fingerprint import anchor_checksums, fingerprint
from .frozen import resolve_frozen
from .generation import Generate, greedy
from .manifest import MANIFEST, FeatureSpec, dtype_name
from .masks import Mask
from .names import class_name, unwrapped
from .passes import Forward, autocast_dtype, device_of, isolated_rng, steady
from .processes import Team, find_team
from .progress import anchor_bar
from .shards import AnchorCacheError
from .structure import Structure, flatten
from .writing import Writer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["build"]

_log = logging.getLogger("craft_optim")


def build(
    model: nn.Module,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    forward: Forward | None = None,
    logits: bool = True,
    top_k: int | None = None,
    layers: Iterable[Layer] = (),
    pooling: Mapping[str, str] | None = None,
    spans: Spans | None = None,
    batch_dim: int = 0,
    mask: Mask | None = None,
    tokens: int | Generate | None = None,
    frozen: Iterable[str] = (),
    dtype: torch.dtype = torch.float16,
    images: str = "uint8",
    shard_size: int = 256,
    model_id: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    autocast: torch.dtype | None = None,
    process_group: "ProcessGroup | Literal[False] | None" = None,
    replicated: bool = True,
) -> AnchorCache:
    """Runs the model over the anchors, before it is fine-tuned, and writes what it says into a folder.

    A batch is a tensor (`model(batch)`), a tuple (`model(*batch)`) or a mapping (`model(**batch)`), its first dimension
    the anchors. Of a mapping only tensors are stored and passed to the model. Batches may differ in length (dimension
    1) if the shorter ones may be padded with zeros on the right, that is, if an `attention_mask` among the inputs, or
    `mask`, covers that.

    The model runs as in every later retention pass: as it is, except that dropout and normalisation modules are in eval
    mode. Its flags, and the random number generators of the CPU and of the model's device, are afterwards as before.
    The first forward runs without gradients, the others in inference mode.

    A finished cache of the same model and settings is returned as it is, without running anything; a half-built one is
    taken up where it stopped, provided that `batches` yields the same anchors in the same order, and ends up the same
    bytes: however often it was stopped, and on however many processes it was built.

    Of several processes (torchrun), all of them call this. Each writes every N-th shard, and runs the teacher on the
    batches of its own shards only; a multiple of the batch size as `shard_size` saves it batches on the border of two.

    Args:
        model: The teacher; it stays where it is, inputs are moved to its device.
        batches: Any iterable of batches, read once and lazily.
        path: The cache's folder; created if need be.
        forward: `forward(model, batch) -> logits or None`, instead of the calls above.
        logits: Whether to keep the logits, as log-probabilities.
        top_k: Keep the k likeliest classes and the remaining mass instead of all.
        layers: Hidden states to keep: numbers (k is the residual that enters decoder layer k; -1 the one before the
            final norm) and names of modules (their outputs).
        pooling: Span -> "masked_mean", "mean", "first", "last" or "none", for every layer. Default: {"all":
            "masked_mean"}.
        spans: `spans(model, batch) -> {span: bool [B, T]}`. Default: "all" (`attention_mask`, else every position) and,
            for Hugging Face's vision-language models, "image" and "text".
        batch_dim: Dimension of the anchors in the hidden states: 1 where layers work on [T, B, D], as torch's
            transformer layers do by default.
        mask: Positions whose logits count: name of an input, or `mask(batch) -> bool` of the logits' shape without the
            classes. Default: `attention_mask` where its shape fits, else all.
        tokens: Let the teacher continue the batches, greedily, by at most this many tokens (transformers' `generate`),
            and keep what it wrote: for `TokenRetention`, and as inputs of everything else that is kept. Or a function
            `generate(model, batch) -> (inputs, labels)`, see `generation.greedy`.
        frozen: Names of modules that will not train, such as a vision tower: their outputs are kept, and retention
            passes leave them out. As long as they do not train; otherwise they run.
        dtype: Of log-probabilities and hidden states on disk: float16, bfloat16 or float32.
        images: "uint8": floating inputs of four or more dimensions are stored as bytes where that gives back every bit
            (see `images.FORMULAS` for the pipelines that qualify), and as they are otherwise. "keep": always as they
            are.
        shard_size: Anchors per file; one shard's anchors are held in memory.
        model_id: A name for the teacher, for people.
        resume: Take up a half-built folder; False starts it over.
        overwrite: Start over whatever the folder holds.
        progress: Show a bar (or, without tqdm, log lines). None: only on a terminal with tqdm.
        autocast: Dtype of autocast for the teacher. None: as it is.
        process_group: The processes that call this together, each of which runs and writes its share. None: all of
            torch.distributed's, if it is initialised; False: this one alone.
        replicated: Whether all of them are given the same batches. False: each has anchors of its own, which come one
            process after the other.

    Returns:
        The cache, opened.

    Raises:
        AnchorCacheError: The folder holds another cache or another half-built one, or `batches` is not what it was
            built from; it cannot be written, another build is writing to it, or another process has failed. Complete
            shards stay.
        ValueError: An argument is out of range; there are no batches, an anchor without valid positions, batches that
            do not fit together, or outputs that are not finite, also after rounding to `dtype`. Nothing of the batch is
            written.

    Cost: one forward per batch, up to the deepest of `layers` where logits are not kept. Disk: with float16,
    2 V bytes per position for full logits, 6 k for the top k, and 2 D per anchor (or position), layer and span.
    """
    if images not in ("uint8", "keep"):
        raise ValueError(f"`images` must be 'uint8' or 'keep'. Found {images!r}.")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"`dtype` must be float16, bfloat16 or float32. Found {dtype}.")
    if shard_size < 1:
        raise ValueError(f"`shard_size` must be >= 1. Found shard_size={shard_size}.")
    if top_k is not None and (top_k < 1 or not logits):
        raise ValueError(f"`top_k` must be >= 1, with logits=True. Found top_k={top_k}, logits={logits}.")
    layers = resolve_layers(model, layers)
    if not logits and not layers and tokens is None:
        raise ValueError("Nothing to cache: pass logits=True, `layers`, or `tokens`.")
    if batch_dim not in (0, 1):
        raise ValueError(f"`batch_dim` must be 0 or 1. Found batch_dim={batch_dim}.")
    if tokens is not None and mask is not None:
        raise ValueError("`mask` and `tokens` exclude each other: the positions that count are those of the tokens.")
    generate = greedy(tokens) if isinstance(tokens, int) else tokens
    pools = dict({"all": "masked_mean"} if pooling is None else pooling) if layers else {}
    if layers and (not pools or any(mode not in POOLINGS for mode in pools.values())):
        raise ValueError(f"`pooling` must give each span one of {POOLINGS}. Found {pools}.")

    if type(model).__name__ == "DistributedDataParallel":
        model = unwrapped(model)  # its forward broadcasts buffers: every process would need as many of them
    device = device_of(model)
    ran_under = autocast_dtype(device, autocast)
    spec = FeatureSpec(
        logits=("full" if top_k is None else "top_k") if logits else None,
        top_k=top_k,
        dtype=dtype_name(dtype),
        layers=layers,
        pooling=pools,
        mask=mask if mask is None or isinstance(mask, str) else _name_of(mask),
        spans=None if spans is None else _name_of(spans),
        forward=None if forward is None else _name_of(forward),
        autocast=None if ran_under is None else dtype_name(ran_under),
        tokens=None if generate is None else _name_of(generate),
        frozen=tuple(resolve_frozen(model, frozen)),
        batch_dim=batch_dim,
    )
    settings = {
        "features": json.loads(json.dumps(asdict(spec))),
        "images": images,
        "shard_size": shard_size,
        "teacher": {"fingerprint": fingerprint(model), "class": class_name(model), "model_id": model_id},
    }
    folder = Path(path)
    team = find_team(model, process_group)
    # Reading a DataLoader draws random numbers. A run that finds its cache finished draws none: both must train alike.
    with isolated_rng(device, None):
        stream = _Stream(
            batches, progress if team.rank == 0 and team.writes else False, model_id or settings["teacher"]["class"]
        )
        if _agreed(team, folder, settings, stream, replicated) and not overwrite:
            return _finished(folder, settings, stream)
        extractor = Extractor(
            model, device, spec, dtype, forward=forward, spans=spans, mask=mask, generate=generate,
            autocast=autocast, inference=_is_plain(model) and not team.sharded,
        )  # fmt: skip
        start_over = overwrite or not resume
        with building(folder, settings, team, replicated, start_over=start_over) as target, Writer(target) as writer:
            try:
                with steady(model):
                    _run(extractor, stream, writer)
            finally:
                _make_normal(model)
            writer.finish()
            return AnchorCache.open(folder)


def _agreed(team: Team, folder: Path, settings: dict[str, Any], stream: "_Stream", replicated: bool) -> bool:
    """True if the folder holds a finished cache; raises unless all processes see the same."""
    finished = (folder / MANIFEST).exists()
    if not team.several:
        return finished
    first = stream.first()
    batch = None if first is None else (first[0], tuple(anchor_checksums(first[1])))
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
    """Every batch that this process has to see to."""
    folder, team, forwards, last = writer.folder, writer.folder.team, 0, None
    for (structure, batch, size), count in stream:
        if extractor.generate is None:
            writer.expect(structure, batch)
        batch = {name: x.detach() for name, x in batch.items()}
        last = structure.rebuild(batch), size, count
        if writer.skips(batch):
            continue
        if team.sharded:
            team.anyone(True)
        taught = extractor(*last)
        inputs = batch
        if extractor.generate is not None:
            structure, inputs, _ = flatten(taught.inputs)
            writer.expect(structure, inputs)
        writer.add(inputs, taught.features, taught.classes, taught.joined, batch)
        forwards += 1
        if forwards == 1:
            stream.warn_if_too_large(folder.path, inputs, taught.features, size)
        if team.world_size > 1:
            folder.check_others()
    # Others may wait for this process' parts of the layers: it runs forwards as long as they do
    while team.sharded and last is not None and team.anyone(False):
        extractor(*last)


def _is_plain(model: nn.Module) -> bool:
    """True if all weights are ordinary tensors: others may not know inference mode."""
    kinds = {type(x) for x in (*model.parameters(), *model.buffers())}
    return kinds <= {Tensor, nn.Parameter}


def _make_normal(model: nn.Module) -> None:
    """Replaces tensors that the model made and kept in inference mode: a backward could not use them."""
    for module in model.modules():
        for owner in (vars(module), module._buffers):
            for name, value in list(owner.items()):
                if name not in ("_parameters", "_buffers", "_modules") and (mended := _normal(value)) is not value:
                    owner[name] = mended


def _normal(value: Any, depth: int = 0) -> Any:
    """The value without tensors of inference mode in it; itself if there are none."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if depth == 3 or type(value) not in (list, tuple, dict):
        return value
    parts = list(value.values()) if isinstance(value, dict) else value
    mended = [_normal(x, depth + 1) for x in parts]
    if all(new is old for new, old in zip(mended, parts, strict=True)):
        return value
    return dict(zip(value, mended, strict=True)) if isinstance(value, dict) else type(value)(mended)


def _name_of(function: Any) -> str:
    # Without its module: that is "__main__" or not, depending on how a script is started
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _finished(folder: Path, settings: dict[str, Any], stream: "_Stream") -> AnchorCache:
    """The cache in the folder, if it is the one that would be built."""
    cache = AnchorCache.open(folder)
    require_same(folder, cache.settings, settings)
    first = stream.first()
    if first is not None:
        stored, given = list(cache.first_anchors), anchor_checksums(first[1])
        if stored[: len(given)] != given[: len(stored)]:
            _log.warning(
                "The cache in %s is used as it is, but its first anchors are not the first batch passed to "
                "`build`. Pass overwrite=True if the anchors have changed; ignore this if they are shuffled.",
                folder,
            )
    clean(folder)
    return cache


_Flat = tuple[Structure, dict[str, Tensor], int]  # of a batch: structure, tensors, number of anchors


class _Stream:
    """The batches, flat, each with the number of anchors before it, under a progress bar."""

    def __init__(self, batches: Iterable[Any], progress: bool | None, title: str) -> None:
        self._progress, self._title = progress, title
        try:
            self._number: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:  # an iterable without a length
            self._number = None
        self._batches: Iterator[_Flat] = map(flatten, batches)
        self._peeked: list[_Flat] = []
        self._total: int | None = None

    def first(self) -> _Flat | None:
        """The first batch, which the iteration will give again; None without batches."""
        if not self._peeked:
            self._peeked = list(islice(self._batches, 1))
        return self._peeked[0] if self._peeked else None

    def __iter__(self) -> Iterator[tuple[_Flat, int]]:
        count, began, said = 0, time.monotonic(), time.monotonic()
        with anchor_bar(self._progress, self._title) as (bar, lines):
            for number, batch in enumerate(chain(self._peeked, self._batches), 1):
                self._peeked, size = [], batch[2]
                if self._number is not None:  # estimated: the last batch may be smaller
                    self._total = math.ceil((count + size) / number * max(self._number, number))
                yield batch, count
                count += size
                bar(size, self._total)
                if lines and time.monotonic() - said > 10.0:
                    said = time.monotonic()
                    rate = count / (said - began)
                    left = f", {(self._total - count) / rate:.0f} s left" if self._total else ""
                    _log.info("anchors of %s: %d done, %.1f per second%s", self._title, count, rate, left)
        if lines:
            _log.info("anchors of %s: %d done, %.1f s", self._title, count, time.monotonic() - began)

    def warn_if_too_large(
        self, folder: Path, named: Mapping[str, Tensor], features: Mapping[str, Tensor], size: int
    ) -> None:
        """Says so at the beginning if the disk is too small for the cache, as far as its size can be foreseen."""
        needed = sum(x.nbytes for x in features.values())
        # Floating images become bytes
        needed += sum(x.numel() if x.is_floating_point() and x.ndim >= 4 else x.nbytes for x in named.values())
        free = shutil.disk_usage(folder).free
        if self._total is not None and needed / size * self._total > free:
            _log.warning(
                "The cache in %s will take about %.3g GB, and %.3g GB are free.",
                folder,
                needed / size * self._total / 1e9,
                free / 1e9,
            )
