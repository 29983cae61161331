"""Write a cache: run the teacher over the anchors once, shard by shard.

A folder under construction holds complete shards, `build.json` that lists them, and nothing else that counts;
`cache.json` comes last and makes it a cache. Every file is written aside and renamed. So a build can be killed at any
moment: what is complete stays, and the same call takes it up again.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import images as image_codes
from .cache import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    AnchorCache,
    AnchorCacheError,
    FeatureSpec,
    Shard,
    tap_key,
)
from .capture import POOLINGS, Layer, Spans, default_spans, pool, positions, resolve_layers, run
from .fingerprint import compare_fingerprints, fingerprint
from .passes import Forward, autocast_dtype, autocast_to, device_of, isolated_rng, logits_of, steady, to_device
from .sampling import mixed_seed
from .structure import Inputs, Structure, flatten

__all__ = ["Mask", "build"]

Mask = str | Callable[[Any], Tensor]

_PROGRESS = "build.json"
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
    mask: Mask | None = None,
    dtype: torch.dtype = torch.float16,
    images: str = "uint8",
    shard_size: int = 256,
    model_id: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    autocast: torch.dtype | None = None,
) -> AnchorCache:
    """Runs the model over the anchors, before it is fine-tuned, and writes what it says into a folder.

    A batch is a tensor (`model(batch)`), a tuple (`model(*batch)`) or a mapping (`model(**batch)`), its first dimension
    the anchors. Of a mapping only tensors are stored and passed to the model. Batches may differ in length (dimension
    1) if the shorter ones may be padded with zeros on the right, that is, if an `attention_mask` among the inputs, or
    `mask`, covers that.

    The model runs as in every later retention pass: as it is, except that dropout and normalisation modules are in eval
    mode. Its flags, and the random number generators of the CPU and of the model's device, are afterwards as before. It
    runs without gradients but not in inference mode: tensors that it caches would be unusable in training.

    A finished cache of the same model and settings is returned as it is, without running anything; a half-built one is
    taken up where it stopped, provided that `batches` yields the same anchors in the same order, and ends up the same
    bytes.

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
        mask: Positions whose logits count: name of an input, or `mask(batch) -> bool` of the logits' shape without the
            classes. Default: `attention_mask` where its shape fits, else all.
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

    Returns:
        The cache, opened.

    Raises:
        AnchorCacheError: The folder holds another cache or another half-built one, or `batches` is not what it was
            built from.
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
    if not logits and not layers:
        raise ValueError("Nothing to cache: pass logits=True, or `layers`.")
    pools = dict({"all": "masked_mean"} if pooling is None else pooling) if layers else {}
    if layers and (not pools or any(mode not in POOLINGS for mode in pools.values())):
        raise ValueError(f"`pooling` must give each span one of {POOLINGS}. Found {pools}.")

    device = device_of(model)
    ran_under = autocast_dtype(device, autocast)
    spec = FeatureSpec(
        logits=("full" if top_k is None else "top_k") if logits else None,
        top_k=top_k,
        classes=None,  # not known before the first batch
        dtype=_name(dtype),
        layers=layers,
        pooling=pools,
        variances={},  # not known before the last
        mask=mask if mask is None or isinstance(mask, str) else _name_of(mask),
        spans=None if spans is None else _name_of(spans),
        forward=None if forward is None else _name_of(forward),
        autocast=None if ran_under is None else _name(ran_under),
    )
    teacher = _Teacher(model, device, spec, dtype, forward, spans, mask, autocast)
    settings = {
        "features": _as_json(spec),
        "images": images,
        "shard_size": shard_size,
        "teacher": {"fingerprint": fingerprint(model), "class": type(model).__name__, "model_id": model_id},
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Reading a DataLoader draws random numbers. A run that finds its cache finished draws none: both must train alike.
    with isolated_rng(device, None):
        if (folder / MANIFEST).exists() and not overwrite:
            return _finished(folder, settings, batches)
        writer = _Writer(folder, settings, start_over=overwrite or not resume)
        for batch, count in _shown(batches, progress, model_id or type(model).__name__):
            structure, named, size = flatten(batch)
            writer.expect(structure, named)
            if count + size <= writer.done:  # in a complete shard already
                writer.compare(named, count, size)
                continue
            named = {name: x.detach() for name, x in named.items()}
            features = teacher(structure.rebuild(named), size, count)
            writer.add(named, features, skip=max(0, writer.done - count), classes=teacher.classes)
        return writer.finish()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name_of(function: Any) -> str:
    # Without its module: that is "__main__" or not, depending on how a script is started
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def _as_json(value: Any) -> Any:
    """As it will look after writing and reading."""
    return json.loads(json.dumps(asdict(value) if not isinstance(value, dict) else value))


def _write_json(path: Path, value: Any) -> None:
    _write(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes aside, makes sure that it is on disk, and renames."""
    aside = path.with_name(path.name + ".tmp")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _shown(batches: Iterable[Any], progress: bool | None, title: str) -> Iterator[tuple[Any, int]]:
    """The batches, each with the number of anchors before it, under a progress bar."""
    count, began, said = 0, time.monotonic(), time.monotonic()
    with _bar(batches, progress, title) as (bar, lines):
        for batch in batches:
            size = flatten(batch)[2]
            yield batch, count
            count += size
            bar(size)
            if lines and time.monotonic() - said > 10.0:
                said = time.monotonic()
                _log.info("anchors of %s: %d done, %.1f per second", title, count, count / (said - began))
    if lines:
        _log.info("anchors of %s: %d done, %.1f s", title, count, time.monotonic() - began)


@contextmanager
def _bar(batches: Iterable[Any], progress: bool | None, title: str) -> Iterator[tuple[Callable[[int], Any], bool]]:
    """What to call after each batch, and whether to log lines instead of drawing."""
    if progress is not False:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            disable = None if progress is None else False  # None: tqdm draws on terminals only
            with tqdm(desc=f"anchors of {title}", unit=" anchors", disable=disable) as bar:
                yield bar.update, False
            return
    yield (lambda size: None), bool(progress)


def _finished(folder: Path, settings: dict[str, Any], batches: Iterable[Any]) -> AnchorCache:
    """The cache in the folder, if it is the one that would be built."""
    cache = AnchorCache.open(folder)
    _require_same(folder, cache.settings, settings)
    for batch in batches:
        structure, named, size = flatten(batch)
        head = cache.read(range(min(size, len(cache)))).inputs
        if structure != cache.structure or not _same_rows(flatten(head)[1], named, size):
            _log.warning(
                "The cache in %s is used as it is, but its first anchors are not the first batch passed to "
                "`build`. Pass overwrite=True if the anchors have changed; ignore this if they are shuffled.",
                folder,
            )
        break
    (folder / _PROGRESS).unlink(missing_ok=True)
    return cache


def _require_same(folder: Path, old: Any, new: dict[str, Any]) -> None:
    """Raises unless two builds have the same settings, naming the first that differs."""
    if old == new:
        return
    old = old if isinstance(old, dict) else {}
    parts = [(part, old.get(part), value) for part, value in new.items()]
    pairs = []
    for part, a, b in parts:
        if isinstance(a, dict) and isinstance(b, dict):
            pairs += [(f"{part}.{key}", a.get(key), b[key]) for key in b]
        else:
            pairs.append((part, a, b))
    difference = ""
    for key, a, b in pairs:
        if a != b:
            why = compare_fingerprints(a, b) if key == "teacher.fingerprint" and isinstance(a, str) else None
            difference = f": {why}" if why else f": {key} is {a!r} there and {b!r} here"
            break
    raise AnchorCacheError(
        f"The folder {folder} holds anchors of another build{difference}. Pass overwrite=True to replace them, "
        f"another `path` to keep them, or AnchorCache.open({str(folder)!r}) to use them."
    )


def _same_rows(stored: Mapping[str, Tensor], named: Mapping[str, Tensor], size: int) -> bool:
    """Whether stored inputs begin with the given ones, bit for bit; padding aside."""
    for name, x in stored.items():
        y = named[name][: len(x)].detach().cpu()
        if x.ndim != y.ndim or x.dtype != y.dtype or (x.ndim > 1 and y.shape[1] > x.shape[1]):
            return False
        x = x if x.ndim < 2 else x[:, : y.shape[1]]
        if x.shape != y.shape or not torch.equal(_bits(x), _bits(y)):
            return False
    return size >= 1


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x  # NaN is equal to itself here


class _Teacher:
    """The model's forward, and its outputs as they are stored."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        spec: FeatureSpec,
        dtype: torch.dtype,
        forward: Forward | None,
        spans: Spans | None,
        mask: Mask | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.device, self.spec, self.dtype = model, device, spec, dtype
        self.forward, self.spans, self.mask, self.autocast = forward, spans or default_spans, mask, autocast
        self.classes: int | None = None
        self.layers: tuple[Layer, ...] = spec.layers

    def __call__(self, inputs: Inputs, size: int, first: int) -> dict[str, Tensor]:
        """Features of one batch of `size` anchors, on the CPU. `first` is the number of its first anchor."""
        inputs = to_device(inputs, self.device)
        features: dict[str, Tensor] = {}
        with torch.no_grad(), steady(self.model), isolated_rng(self.device, mixed_seed(0, first)):
            with autocast_to(self.device, self.autocast):
                output, hidden = run(
                    self.model, inputs, forward=self.forward, layers=self.layers, output=self.spec.logits is not None
                )
            if torch.is_autocast_enabled(self.device.type):
                # Older torch keeps weights cast without gradients for later forwards (pytorch/pytorch#158232)
                torch.clear_autocast_cache()
            if self.spec.logits is not None:
                features |= self._logits(output, inputs, size, first)
            if hidden:
                features |= self._hidden(hidden, inputs, size, first)
        return {key: x.cpu() for key, x in features.items()}

    def _round(self, values: Tensor, what: str) -> Tensor:
        """`values` in the storage dtype, checked."""
        low, high = (float(x) for x in torch.aminmax(values))  # NaN if there is one; one pass, one wait
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"The teacher's {what} are not finite. Check the model and the anchors on their own; classes that "
                "are masked with -inf must be left out, or clamped, by `forward=`."
            )
        if not math.isfinite(float(torch.tensor(max(-low, high)).to(self.dtype))):
            raise ValueError(
                f"The teacher's {what} reach {max(-low, high):.3g}, beyond the range of dtype={self.dtype}: pass "
                "dtype=torch.bfloat16 or torch.float32."
            )
        return values.to(self.dtype)

    def _logits(self, output: Any, inputs: Inputs, size: int, first: int) -> dict[str, Tensor]:
        logits = logits_of(output)
        if logits is None or not logits.is_floating_point() or logits.ndim < 2 or len(logits) != size:
            found = type(output).__name__ if logits is None else f"{logits.dtype} of shape {tuple(logits.shape)}"
            raise ValueError(
                f"The model must give logits [B, ..., V] with B = {size} anchors, as a tensor or as `.logits`. "
                f"Found {found}: pass `forward=`, or logits=False and `layers`."
            )
        self.classes = logits.shape[-1]
        features: dict[str, Tensor] = {}
        mask = self._mask(inputs, logits)
        if mask is not None:
            features["mask"] = mask
            _require_positions(mask.flatten(1), first, "the logits' mask")
            if not bool(mask.all()):  # positions that do not count may hold anything, NaN included
                logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
        logprobs = F.log_softmax(logits.float(), dim=-1)
        k = self.spec.top_k
        if k is None:
            features["logprobs"] = self._round(logprobs, "logits")
            return features
        if k > self.classes:
            raise ValueError(f"`top_k` must not exceed the number of classes. Found top_k={k}, {self.classes} classes.")
        top = logprobs.topk(k, dim=-1)
        features["topk_logprobs"] = self._round(top.values, "logits")
        features["topk_indices"] = top.indices.int()
        if k < self.classes:  # stored, because one minus rounded probabilities is mostly rounding
            rest = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
            features["rest_logprob"] = self._round(rest, "logits")
        return features

    def _mask(self, inputs: Inputs, logits: Tensor) -> Tensor | None:
        shape = logits.shape[:-1]
        if callable(self.mask):
            mask, source = self.mask(inputs), f"mask={self.spec.mask}"
        elif self.mask is not None:
            if not isinstance(inputs, dict) or self.mask not in inputs:
                raise ValueError(
                    f"`mask` must be a function, or the name of an input of a mapping. Found {self.mask!r}."
                )
            mask, source = inputs[self.mask], f"the input {self.mask!r}"
        else:
            found = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            return found.bool() if found is not None and found.shape == shape else None
        if mask.shape != shape:
            raise ValueError(f"The logits' mask must have shape {tuple(shape)}. {source} has {tuple(mask.shape)}.")
        return mask.to(logits.device).bool()

    def _hidden(self, hidden: Mapping[Layer, Tensor], inputs: Inputs, size: int, first: int) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        spans = {span: x.to(self.device).bool() for span, x in self.spans(self.model, inputs).items()}
        for layer, value in hidden.items():
            states = positions(value)
            if len(states) != size:
                raise ValueError(
                    f"Layer {layer!r} gives {tuple(value.shape)}, but the first dimension must be the {size} anchors."
                )
            for span, mode in self.spec.pooling.items():
                what = f"hidden states of layer {layer!r}"
                if states.ndim == 2:
                    features[tap_key(layer, span)] = self._round(states, what)
                    continue
                # A feature map's positions are not those of the tokens
                mask = spans.get(span) if value.ndim == 3 else None
                if mask is None and span != "all":
                    raise ValueError(
                        f"`pooling` names the span {span!r}, but layer {layer!r} has "
                        f"{sorted({*spans, 'all'}) if value.ndim == 3 else 'only all'} in this batch."
                    )
                if mask is not None and mask.shape != states.shape[:2]:
                    raise ValueError(
                        f"Span {span!r} has a mask of shape {tuple(mask.shape)}, layer {layer!r} has positions "
                        f"{tuple(states.shape[:2])}: pass `spans=` with masks that fit."
                    )
                if mask is not None:
                    if f"span.{span}" not in features:
                        _require_positions(mask, first, f"span {span!r}")
                    features[f"span.{span}"] = mask
                pooled = pool(states, mask, mode)
                if mode == "none" and mask is not None:
                    pooled = torch.where(mask.unsqueeze(-1), pooled, 0.0)
                features[tap_key(layer, span)] = self._round(pooled, what)
        return features


def _require_positions(mask: Tensor, first: int, what: str) -> None:
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        numbers = ", ".join(str(first + i) for i in empty[:5])
        raise ValueError(f"{what} selects no position of anchor {numbers}: leave such anchors out of `batches`.")


class _Writer:
    """Collects anchors into shards and knows which are complete."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, start_over: bool) -> None:
        self.folder, self.settings = folder, settings
        self.size: int = settings["shard_size"]
        self.structure: Structure | None = None
        self.signature: dict[str, tuple[Any, ...]] = {}
        self.widths: dict[str, int] = {}
        self.feature_widths: dict[str, int] = {}
        self.classes: int | None = None
        self.records: list[dict[str, Any]] = []
        self.shards: list[Shard] = []
        self.pieces: list[dict[str, Tensor]] = []
        self.formulas: list[dict[str, str]] = []
        self.pending = 0
        self.varies = False
        record = None if start_over else self._load()
        if record is None:
            # The manifest first: without it, what is left is no cache
            for name in (MANIFEST, _PROGRESS):
                (folder / name).unlink(missing_ok=True)
            for file in folder.iterdir():
                if re.fullmatch(r"shard-\d{5,}\.safetensors(\.tmp)?", file.name):
                    file.unlink()
            return
        self.records, self.classes = record["shards"], record["classes"]
        self.shards = [Shard(folder / r["file"], r["anchors"], r["bytes"], r["images"]) for r in self.records]
        _log.info("%s is half built: taking it up after %d anchors", folder, self.done)

    def _load(self) -> dict[str, Any] | None:
        path = self.folder / _PROGRESS
        try:
            record = json.loads(path.read_bytes())
            settings, _ = record["settings"], (record["shards"], record["classes"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise AnchorCacheError(f"{path} is damaged: pass resume=False to start over.") from error
        _require_same(self.folder, settings, self.settings)
        loaded: dict[str, Any] = record
        return loaded

    @property
    def done(self) -> int:
        """Anchors in complete shards."""
        return sum(shard.count for shard in self.shards)

    def expect(self, structure: Structure, named: Mapping[str, Tensor]) -> None:
        """Raises unless a batch looks like those before it, up to its number of anchors and their length."""
        signature = {name: (x.dtype, x.ndim, *x.shape[2:]) for name, x in named.items()}
        if self.structure is None:
            self.structure, self.signature = structure, signature
            self.widths = {name: x.shape[1] if x.ndim > 1 else 0 for name, x in named.items()}
        if structure != self.structure or signature != self.signature:
            raise ValueError(
                "All batches must hold the same tensors, with the same dtypes and shapes from dimension 2 on. "
                f"Found {_brief(self.structure, self.signature)} and then {_brief(structure, signature)}."
            )
        changed = [name for name, x in named.items() if x.ndim > 1 and x.shape[1] != self.widths[name]]
        if changed and not self.varies:
            covered = self.settings["features"]["mask"] is not None or "attention_mask" in named
            if not covered:
                raise ValueError(
                    f"Inputs {', '.join(map(repr, changed))} differ in length (dimension 1) between batches, and "
                    "nothing says which positions count: add an `attention_mask` to the batches, pass `mask=`, or "
                    "pad them to one length."
                )
            if "mean" in self.settings["features"]["pooling"].values():
                raise ValueError(
                    "Pooling 'mean' counts padding, and batches differ in length: use 'masked_mean', or pad to "
                    "one length."
                )
            self.varies = True

    def compare(self, named: Mapping[str, Tensor], count: int, size: int) -> None:
        """Raises unless the complete shards hold these anchors as numbers `count`, `count + 1`, ..."""
        start = 0
        for shard in self.shards:
            for row in range(max(count - start, 0), min(count + size - start, shard.count)):
                for name, x in named.items():
                    given = x[start + row - count : start + row - count + 1].detach().cpu()
                    key = f"inputs.{name}"
                    stored = shard.row(key, row) if key in shard.entries else None
                    if stored is None or stored.shape != given.shape or not torch.equal(_bits(stored), _bits(given)):
                        raise AnchorCacheError(
                            f"{self.folder} is half built from other anchors: number {start + row} differs in "
                            f"{name!r}. Pass the same batches in the same order, or resume=False to start over."
                        )
            start += shard.count

    def add(self, named: Mapping[str, Tensor], features: Mapping[str, Tensor], skip: int, classes: int | None) -> None:
        """Takes a batch, without its first `skip` anchors, and writes every shard that becomes full."""
        if self.classes is not None and classes != self.classes:
            raise ValueError(
                f"All batches must have the same number of classes. Found {self.classes} and then {classes}."
            )
        self.classes = classes
        piece = {f"inputs.{name}": x.cpu() for name, x in named.items()}
        piece |= {f"features.{name}": x for name, x in features.items()}
        if self.pieces and set(self.pieces[0]) != set(piece):
            raise ValueError(
                f"All batches must give the same features. Found {sorted(set(self.pieces[0]) ^ set(piece))}."
            )
        for name, x in features.items():
            width = self.feature_widths.setdefault(name, x.shape[1] if x.ndim > 1 else 0)
            if x.ndim > 1 and x.shape[1] != width and _cover(name) not in (None, *features):
                raise ValueError(
                    f"The teacher's {name!r} differs in size between batches, {width} and {x.shape[1]}, and no "
                    "mask says which positions count: pass `mask=` (logits) or `spans=` (hidden states)."
                )
        piece = {key: x[skip:] for key, x in piece.items()}
        size = len(next(iter(piece.values())))
        at = 0
        while self.pending + size - at >= self.size:
            end = at + self.size - self.pending
            self._push({key: x[at:end] for key, x in piece.items()})
            self._flush()
            _write_json(
                self.folder / _PROGRESS,
                {"settings": self.settings, "classes": self.classes, "shards": self.records},
            )
            at = end
        if at < size:
            self._push({key: x[at:] for key, x in piece.items()})

    def _push(self, piece: dict[str, Tensor]) -> None:
        """Keeps a part of a shard, its images as bytes already: floats would take four times the memory."""
        size = len(next(iter(piece.values())))
        formulas: dict[str, str] = {}
        if self.settings["images"] == "uint8":
            for key, x in piece.items():
                if key.startswith("inputs.") and x.is_floating_point() and x.ndim >= 4:
                    encoded = image_codes.encode(x)
                    if encoded is not None:
                        piece[key], formulas[key] = encoded
        self.pieces.append(piece)
        self.formulas.append(formulas)
        self.pending += size

    def _flush(self) -> None:
        """Writes what is pending as one shard."""
        tensors: dict[str, Tensor] = {}
        encodings: dict[str, dict[str, str]] = {}
        for key in self.pieces[0]:
            parts = [piece[key] for piece in self.pieces]
            name = key.removeprefix("inputs.")
            used = {formulas.get(key) for formulas in self.formulas}
            formula = used.pop() if len(used) == 1 else None
            if used:  # no common formula: an image may fit several, so try one for all
                dtype = self.signature[name][0]
                pairs = zip(parts, self.formulas, strict=True)
                parts = [image_codes.decode(x, f[key], dtype) if key in f else x for x, f in pairs]
                alike = image_codes.encode_alike(parts)
                if alike is not None:
                    parts, formula = alike
            if formula is not None:
                encodings[name] = {"formula": formula, "dtype": _name(self.signature[name][0])}
            joined, lengths = _join(parts)
            tensors[key] = joined.contiguous()
            if lengths is not None:
                tensors[f"lengths.{key}"] = lengths
        path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        _write(path, lambda aside: safetensors.torch.save_file(tensors, aside))
        shard = Shard(path, self.pending, path.stat().st_size, encodings)
        self.records.append(
            {
                "file": path.name,
                "anchors": shard.count,
                "bytes": shard.size,
                "sha256": shard.checksum(),
                "images": encodings,
            }
        )
        self.shards.append(shard)
        self.pieces, self.formulas, self.pending = [], [], 0

    def finish(self) -> AnchorCache:
        """Writes the last shard and the manifest."""
        if self.pending:
            self._flush()
        if not self.shards or self.structure is None:
            raise ValueError(f"`batches` yielded nothing: there is no anchor to write to {self.folder}.")
        spec = _as_json({**self.settings["features"], "classes": self.classes, "variances": {}})
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "anchors": self.done,
            "inputs": _as_json(asdict(self.structure)),
            "features": spec,
            "teacher": self.settings["teacher"],
            "built_with": {"images": self.settings["images"], "shard_size": self.size},
            "shards": self.records,
        }
        spec["variances"] = {
            tap_key(layer, span): _variance(self.shards, layer, span, mode)
            for layer in spec["layers"]
            for span, mode in spec["pooling"].items()
        }
        _write_json(self.folder / MANIFEST, manifest)
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        return AnchorCache.open(self.folder)


def _join(parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Parts in one tensor; where they differ in dimension 1, padded with zeros, and each row's own size (int32)."""
    if parts[0].ndim < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(parts), None
    rows, width = sum(map(len, parts)), max(part.shape[1] for part in parts)
    joined = parts[0].new_zeros((rows, width, *parts[0].shape[2:]))
    lengths = torch.empty(rows, dtype=torch.int32)
    at = 0
    for part in parts:
        joined[at : at + len(part), : part.shape[1]] = part
        lengths[at : at + len(part)] = part.shape[1]
        at += len(part)
    return joined, lengths


def _cover(key: str) -> str | None:
    """The mask that has to come with a feature whose dimension 1 varies; None for masks."""
    if key.startswith("hidden."):
        return f"span.{key.rsplit('.', 1)[1]}"
    return None if key == "mask" or key.startswith("span.") else "mask"


def _variance(shards: Iterable[Shard], layer: Layer, span: str, mode: str) -> float:
    """Variance over anchors (and valid positions) of a stored feature, averaged over its last dimension.

    In float64, shard by shard: means and squared deviations of parts combine exactly (Chan et al. 1979).
    """
    count, mean, deviation = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for shard in shards:
        rows = shard.whole(f"features.{tap_key(layer, span)}")
        mask = f"features.span.{span}"
        if mode == "none" and rows.ndim == 3 and mask in shard.entries:
            rows = rows[shard.whole(mask)]
        rows = rows.reshape(-1, rows.shape[-1]).double()
        n, m = len(rows), rows.mean(0)
        deviation = deviation + (rows - m).square().sum(0) + (m - mean).square() * (count * n / (count + n))
        mean = mean + (m - mean) * (n / (count + n))
        count += n
    return float(f"{float((deviation / count).mean()):.9g}")  # the last digits depend on the number of threads


def _brief(structure: Structure, signature: Mapping[str, tuple[Any, ...]]) -> str:
    return f"{structure.kind} {signature}"
