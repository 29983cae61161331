"""Importers: caches of earlier CRaFT implementations, read without running any code in their files.

    kind       written by                                                     becomes
    tokens     eggplantsalt-CRaFT, scripts/build_anchor_cache.py, at first    labels
    states     the same script, later                                         hidden states, spans "image" and "text"
    features   eggplantsalt-CRaFT, scripts/build_anchor_hidden_cache.py       hidden states of one layer and span
    records    craft4090, vla-scripts/build_anchor_hidden_cache.py            the same, and the span's mask

craft-adapter, the third code base, runs its teacher during training and writes no files.

All of them count layers as Hugging Face's `hidden_states` does: entry k enters decoder layer k, but the last one has
been through the final norm. Here that entry has no number; it is the output of the norm, under the norm's name.
"""

import json
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craft_optim._paths import local

from .build_folder import building
from .cache import AnchorCache
from .capture import Layer
from .manifest import MANIFEST, FeatureSpec, dtype_name, tap_key
from .masks import IGNORED
from .processes import Team
from .shards import AnchorCacheError
from .structure import flatten
from .writing import Writer

__all__ = ["convert", "write_cache"]

_INPUTS = ("pixel_values", "input_ids", "attention_mask")
_KINDS = {"target_features": "features", "teacher_hidden": "states", "labels": "tokens"}  # in their loader's order
_POOLINGS = {
    "mean_image_tokens": {"image": "masked_mean"},
    "mean_masked": {"all": "masked_mean"},
    "last_token": {"all": "last"},
    "cls_token": {"all": "first"},
}
_SOME = 64  # anchors per batch: the files are mapped, so that no more than these are in memory
_REMEDY = "Write it again with the code that made it, or copy it again from where it is whole."

_log = logging.getLogger("craft_optim")

_Batches = Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]


class _Contents(NamedTuple):
    """The contents of a file; the first four are the same for all files of a cache."""

    kind: str
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    pooling: dict[str, str]
    anchors: int
    dtype: torch.dtype
    teacher: Any = None
    left_out: tuple[str, ...] = ()


def convert(
    old_path: str | os.PathLike[str],
    new_path: str | os.PathLike[str],
    *,
    layers: Sequence[Layer] | None = None,
    overwrite: bool = False,
) -> AnchorCache:
    """Converts a cache of an earlier CRaFT implementation to this library's format.

    The files' contents show the kind. They are only read as tensors, numbers, strings, lists and dicts. Values keep
    every bit. Entries other than tensors, such as the prompts' text, are left out and logged.

    Inputs become the mapping {"pixel_values", "input_ids", "attention_mask"}, with "pixel_values.<name>" for each of
    several: the retention closure's `forward=` turns them into the model's arguments. `forward=` and `spans=` must also
    repeat an old builder's peculiarities, or else the unmodified model has a drift:

    - tokens: the teacher saw one more BOS token between prompt and continuation, which the files do not have.
    - states: the teacher saw one more BOS token behind the prompt. The span "text" is a single position, number
      `attention_mask.sum(1)` of the text: padding, unless the prompt fills the tokenizer's maximum. Give it weight 0
      then.
    - features: the span "image" is the first positions of the sequence, 196 where the model's config names no number.

    Args:
        old_path: Folder with the old cache's `.pt` files and, except for "records", its `metadata.json`.
        new_path: Folder of the new cache; created if needed.
        layers: Numbers of the layers, or names of modules, in stored order. None: as the files say; negative numbers
            count from -1, the residual before the final norm. Required if the output of the final norm is stored, also
            if the old builder was given its number counted from the front.
        overwrite: True to start over whatever the new folder holds.

    Returns:
        The new cache, opened; its teacher's fingerprint is unknown.

    Raises:
        AnchorCacheError: A file is missing, damaged, of unknown kind, or cannot be read without running code in it;
            files contradict each other or `metadata.json`; features are not finite; the layers must be named; nothing
            is written then. Or the new folder holds another cache.
        ValueError: `layers` has another length than the stored layers; or the files' tensors differ in dtype, or in
            shape other than the prompts' length.

    Cost: reads the files' headers twice and the anchors once; memory for one new shard. Files that torch wrote before
    version 1.6 cannot be mapped: they are read twice, and held in memory as a whole one by one.
    """
    folder, new_path = local(old_path), local(new_path)
    files = sorted(folder.glob("*.pt"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise _bad(folder, "it has no .pt files", "Check the path. AnchorCache.open opens caches of this library.")
    metadata = _metadata(folder / "metadata.json")
    found = [_read(path, metadata, layers)[0] for path in files]
    first = found[0]
    for path, other in zip(files, found, strict=True):
        if other[:4] != first[:4]:
            raise _bad(
                path,
                f"it holds {_in_words(other)}, but {files[0].name} {_in_words(first)}",
                "Keep the files of one cache in one folder.",
            )
    _check_counts(folder, metadata, first.kind, len(files), sum(contents.anchors for contents in found))
    if first.left_out:
        _log.info("%s: %s are left out: they are not the model's inputs", folder, ", ".join(first.left_out))
    teacher = metadata.get("teacher_policy_path", metadata.get("policy_pretrained_path", first.teacher))
    dataset = metadata.get("dataset_repo_id")
    return write_cache(
        new_path,
        (batch for path in files for batch in _read(path, metadata, layers)[1]),
        FeatureSpec(
            dtype=dtype_name(reduce(torch.promote_types, (contents.dtype for contents in found))),
            layers=first.layers,
            pooling=first.pooling,
        ),
        model_id=teacher if isinstance(teacher, str) else None,
        origin=f"{first.kind} cache {folder}" + (f" of {dataset}" if isinstance(dataset, str) else ""),
        overwrite=overwrite,
    )


def write_cache(
    path: str | os.PathLike[str],
    batches: Iterable[tuple[Any, Mapping[str, Tensor]]],
    spec: FeatureSpec,
    *,
    model_id: str | None = None,
    origin: str | None = None,
    overwrite: bool = False,
) -> AnchorCache:
    """Writes anchors with given features; see `build` for a teacher that can be run.

    Args:
        path: The cache's folder; created if needed.
        batches: Pairs (batch as for `build`, features by name), first dimension the anchors: "labels" `[n, T]` is the
            token that the logits at each position predict, or -100; `tap_key(layer, span)` `[n, D]` are pooled states.
        spec: Layers, pooling and dtype on disk of the hidden states.
        model_id: Name of the teacher; `origin` names the source of the anchors.
        overwrite: True to replace the folder's contents.

    Raises:
        AnchorCacheError: The folder holds a cache, or cannot be written to.
        ValueError: The batches do not fit together, or there are none.
    """
    path, stream = local(path), iter(batches)
    if (path / MANIFEST).exists() and not overwrite:
        raise AnchorCacheError(f"The folder {path} holds anchors already. Pass overwrite=True to replace them.")
    first = list(islice(stream, 1))
    if first and "labels" in first[0][1]:
        spec = replace(spec, tokens="imported")
    settings = {
        "features": asdict(spec),
        "images": "uint8",
        "shard_size": 256,
        "teacher": {"fingerprint": None, "class": None, "model_id": model_id, "origin": origin},
    }
    with building(path, settings, Team(None), start_over=True) as folder, Writer(folder) as writer:
        for batch, given in chain(first, stream):
            flat = flatten(batch)
            features = {x: v.to(getattr(torch, spec.dtype)) if x.startswith("hidden.") else v for x, v in given.items()}
            joined = ["tokens"] if "labels" in features else []
            if joined:
                labels = features.pop("labels")
                mask = labels != IGNORED
                features = {"mask": mask, "tokens": labels[mask].int(), **features}
            writer.expect(flat)
            writer.add(flat, features, {}, joined)
        writer.finish()
        return AnchorCache.open(path)


def _bad(path: Path, problem: str, remedy: str = _REMEDY) -> AnchorCacheError:
    return AnchorCacheError(f"{path} cannot be converted: {problem}. {remedy}")


def _in_words(contents: _Contents) -> str:
    return f"{contents.kind} of layers {list(contents.layers)} pooled as {contents.pooling}, inputs {contents.names}"


def _metadata(path: Path) -> dict[str, Any]:
    """`metadata.json`, or {} without one."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(path, f"it cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise _bad(path, "it is not a JSON object")
    return data


def _check_counts(folder: Path, metadata: Mapping[str, Any], kind: str, files: int, anchors: int) -> None:
    path = folder / "metadata.json"
    if not metadata and kind != "records":  # their builders write it last
        raise _bad(path, "it is missing or empty, so that nothing says whether the .pt files are all there")
    for key, count in (("num_shards", files), ("num_samples", anchors), ("num_anchors", anchors)):
        if metadata.get(key, count) != count:
            raise _bad(
                path,
                f"it says {key}={metadata[key]!r}, but the folder's .pt files make that {count}",
                "Copy the missing files, or delete those of another build.",
            )


def _load(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # not so in torch's format before 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _bad(
            path,
            "it cannot be read without running code that is in it, or is no file of torch.save",
            "If you trust it, load it with the code that made it, and save its tensors, numbers, strings, lists and "
            "dicts alone with torch.save.",
        ) from error
    except Exception as error:  # torch raises any type on a damaged file
        raise _bad(path, f"it is damaged, perhaps cut short ({type(error).__name__}: {error!s:.100})") from error


def _read(path: Path, metadata: Mapping[str, Any], layers: Sequence[Layer] | None) -> tuple[_Contents, _Batches]:
    """The contents of a file, and its anchors; all checks are done before the first anchor is read."""
    data = _load(path)
    if isinstance(data, dict) and isinstance(data.get("records"), list):
        return _read_records(path, data, layers)
    target = next((name for name in _KINDS if isinstance(data, dict) and name in data), None)
    if target is None:
        has = f"the keys {sorted(map(str, data))}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise _bad(path, f"it has {has}, none of 'records', {', '.join(map(repr, _KINDS))}", "Check the path.")
    return _read_columns(path, data, target, metadata, layers)


def _read_columns(
    path: Path, data: dict[Any, Any], target: str, metadata: Mapping[str, Any], layers: Sequence[Layer] | None
) -> tuple[_Contents, _Batches]:
    """Reads one tensor per name, its first dimension the anchors."""
    inputs = {name: _tensor(path, data, name, 2) for name in _INPUTS}
    feature = _tensor(path, data, target, {"tokens": 2, "states": 4, "features": 2}[_KINDS[target]])
    counts = {name: len(x) for name, x in (inputs | {target: feature}).items()}
    if min(counts.values()) < 1 or len(set(counts.values())) > 1:
        raise _bad(path, f"its tensors must have the same number of anchors, and at least one. Found {counts}")
    _check_finite(path, feature)
    attended = inputs["attention_mask"] != 0
    pooling: dict[str, str] = {}
    own: tuple[Layer, ...] = ()
    if target == "labels":
        if not feature.shape == inputs["input_ids"].shape == attended.shape:
            raise _bad(path, f"its 'labels' {tuple(feature.shape)} do not fit its 'input_ids' and 'attention_mask'")
        own = _own_layers(path, [], layers)
        features = {"labels": _next_tokens(feature, attended)}
    elif target == "teacher_hidden":
        pooling = {"image": "masked_mean", "text": "last"}
        if feature.shape[2] != len(pooling):
            raise _bad(path, f"its 'teacher_hidden' must be [anchors, layers, 2, D]. Found {tuple(feature.shape)}")
        count = feature.shape[1]
        stored = _state_layers(path, data.get("meta"), metadata, count) if layers is None else [0] * count
        own = _own_layers(path, stored, layers)
        features = {
            tap_key(layer, span): feature[:, i, j] for i, layer in enumerate(own) for j, span in enumerate(pooling)
        }
    else:
        own, pooling = _one_layer(path, data.get("meta"), layers)
        span = next(iter(pooling))
        features = {tap_key(own[0], span): feature}
        if span == "all":
            features["span.all"] = attended
    dtype = torch.float16 if target == "labels" else feature.dtype
    left_out = tuple(sorted({str(key) for key in data} - {*_INPUTS, target, "meta"}))
    batches = (
        ({k: x[i : i + _SOME] for k, x in inputs.items()}, {k: x[i : i + _SOME] for k, x in features.items()})
        for i in range(0, len(feature), _SOME)
    )
    return _Contents(_KINDS[target], _INPUTS, own, pooling, len(feature), dtype, left_out=left_out), batches


def _read_records(path: Path, data: dict[Any, Any], layers: Sequence[Layer] | None) -> tuple[_Contents, _Batches]:
    """Reads one dict per anchor."""
    anchors = [_anchor(path, i, record) for i, record in enumerate(data["records"])]
    if not anchors or any(set(x) != set(anchors[0]) for x in anchors):
        raise _bad(path, "its 'records' must hold the same tensors, and there must be at least one of them")
    for anchor in anchors:
        _check_finite(path, anchor["target_features"])
    own, pooling = _one_layer(path, data.get("meta"), layers)
    names = tuple(name for name in anchors[0] if name not in ("target_features", "image_token_mask"))
    dtype = reduce(torch.promote_types, (anchor["target_features"].dtype for anchor in anchors))
    first = data["records"][0]
    teacher = first["meta"].get("teacher") if isinstance(first.get("meta"), dict) else None
    left_out = tuple(sorted({str(key) for key in first["model_inputs"]} - {*_INPUTS, "image_token_mask"}))
    contents = _Contents("records", names, own, pooling, len(anchors), dtype, teacher, left_out)
    return contents, _stacked(anchors, own[0], next(iter(pooling)))


def _anchor(path: Path, number: int, record: Any) -> dict[str, Tensor]:
    """The tensors of one anchor by name, without the dimension of the anchors."""
    inputs = record.get("model_inputs") if isinstance(record, dict) else None
    if not isinstance(inputs, dict):
        raise _bad(path, f"its record {number} has no dict 'model_inputs'")
    pixels = inputs.get("pixel_values")
    parts = {f"pixel_values.{key}": x for key, x in pixels.items()} if isinstance(pixels, dict) else {}
    names = [*(parts or ["pixel_values"]), "input_ids", "attention_mask"]
    anchor = {name: _tensor(path, {**inputs, **parts}, name, 1, f"record {number}") for name in names}
    anchor["target_features"] = _tensor(path, record, "target_features", 1, f"record {number}")
    if "image_token_mask" in inputs:
        anchor["image_token_mask"] = _tensor(path, inputs, "image_token_mask", 1, f"record {number}")
        if len(anchor["image_token_mask"]) < len(anchor["attention_mask"]):
            raise _bad(path, f"the 'image_token_mask' of its record {number} is shorter than its 'attention_mask'")
    return anchor


def _stacked(anchors: list[dict[str, Tensor]], layer: Layer, span: str) -> _Batches:
    """Batches of neighbours of one length: the prompts were padded to the longest of a few."""
    for _, group in groupby(anchors, key=lambda anchor: [x.shape for x in anchor.values()]):
        alike = list(group)
        for i in range(0, len(alike), _SOME):
            inputs = {name: torch.stack([anchor[name] for anchor in alike[i : i + _SOME]]) for name in alike[0]}
            features = {tap_key(layer, span): inputs.pop("target_features")}
            image = inputs.pop("image_token_mask", None)
            if image is not None and span == "image":
                features["span.image"] = image.bool()
            elif image is not None:  # the image's tokens are inserted behind the first one
                attended = inputs["attention_mask"].bool()
                inserted = attended.new_ones(len(image), image.shape[1] - attended.shape[1])
                features["span.all"] = torch.cat([attended[:, :1], inserted, attended[:, 1:]], dim=1)
            yield inputs, features


def _tensor(path: Path, owner: Mapping[Any, Any], name: str, ndim: int, place: str = "file") -> Tensor:
    """`owner[name]`, a tensor of `ndim` dimensions, or of more for images."""
    value = owner.get(name)
    images = name.split(".")[0] == "pixel_values"
    if not isinstance(value, Tensor) or (value.ndim <= ndim if images else value.ndim != ndim):
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = f"{'more than ' if images else ''}{ndim} dimensions"
        raise _bad(path, f"its {place} must have a tensor {name!r} of {wanted}. Found {found}")
    return value


def _check_finite(path: Path, feature: Tensor) -> None:
    if not bool(feature.isfinite().all()):
        raise _bad(
            path,
            f"the teacher's outputs in it are not all finite, perhaps beyond the range of {feature.dtype}",
            "Leave such anchors out, or write it again with dtype bfloat16 or float32.",
        )


def _one_layer(path: Path, meta: Any, layers: Sequence[Layer] | None) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """Layer and pooling of a file that holds a single vector per anchor."""
    meta = meta if isinstance(meta, dict) else {}
    number, pooling = meta.get("hidden_layer"), meta.get("pooling")
    if pooling not in _POOLINGS:
        raise _bad(path, f"its meta['pooling'] must be one of {list(_POOLINGS)}. Found {pooling!r:.60}")
    if layers is None and type(number) is not int:
        raise _bad(path, f"its meta['hidden_layer'] must be a number. Found {number!r:.60}", "Pass `layers=`.")
    return _own_layers(path, [None if number == -1 else number], layers), _POOLINGS[pooling]


def _state_layers(path: Path, meta: Any, metadata: Mapping[str, Any], count: int) -> list[int | None]:
    """The numbers of the layers in 'teacher_hidden'; None for the output of the final norm.

    The file counts decoder layers by their outputs, and so does not show the norm; `metadata.json` has the numbers as
    they were requested, usually from the back.
    """
    stored = meta.get("layers_to_save") if isinstance(meta, dict) else None
    asked = metadata.get("layers_to_save")
    for numbers in (stored, asked):
        if not isinstance(numbers, list) or len(numbers) != count or any(type(x) is not int for x in numbers):
            raise _bad(
                path,
                f"it must say which {count} layers it has, in meta['layers_to_save'] and in metadata.json. "
                f"Found {stored!r:.60} and {asked!r:.60}",
                "Pass `layers=`.",
            )
    assert stored is not None
    assert asked is not None
    depth = next((s - a for s, a in zip(stored, asked, strict=True) if a < 0), None)
    return [None if s + 1 == depth else s + 1 for s in stored]


def _own_layers(path: Path, numbers: Sequence[Any], given: Sequence[Layer] | None) -> tuple[Layer, ...]:
    """The layers by this library's numbering."""
    if given is not None:
        if len(given) != len(numbers):
            raise ValueError(f"`layers` must be as many as {path} has, {len(numbers)}. Found {list(given)}.")
        return tuple(given)
    if None in numbers:
        example = ", ".join("'<name>'" if x is None else str(x) for x in numbers)
        raise _bad(
            path,
            "it holds the output of the final norm, which has no number",
            f"Pass layers=[{example}] with the norm's name within the model, such as 'model.norm'.",
        )
    return tuple(numbers)


def _next_tokens(labels: Tensor, attended: Tensor) -> Tensor:
    """Labels at the positions whose logits predict them, `[n, T]`.

    In Hugging Face's convention a label stands at its own token. The logits for it are those of the last attended
    position before: the previous one, but behind a padded prompt the prompt's end and not its padding.
    """
    places = torch.where(attended, torch.arange(labels.shape[1]), -1).cummax(1).values
    before = torch.nn.functional.pad(places[:, :-1], (1, 0), value=-1)
    rows, columns = (attended & (labels != IGNORED) & (before >= 0)).nonzero(as_tuple=True)
    out = torch.full(labels.shape, IGNORED)
    out[rows, before[rows, columns]] = labels[rows, columns].long()
    return out
