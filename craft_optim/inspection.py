"""What an anchor cache holds, in numbers and words, and whether a model agrees with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from craft_optim.anchors import AnchorCache, HiddenRetention, LogitRetention, TokenRetention
from craft_optim.anchors.fingerprint import compare_fingerprints, fingerprint
from craft_optim.anchors.passes import Forward
from craft_optim.anchors.retention import CachedRetention

__all__ = [
    "Drift",
    "Lengths",
    "bytes_in_words",
    "drifts",
    "facts",
    "lengths",
    "retention_kinds",
    "spread",
    "tensors",
    "verdict",
]

_BATCH = 16


class Lengths(NamedTuple):
    """How long one tensor's anchors are, padding at their ends not counted."""

    name: str
    shortest: int
    mean: float
    longest: int


@dataclass(frozen=True)
class Drift:
    """How far a model is from a cache, by one of the retention closures.

    Attributes:
        kind: "logits", "hidden" or "tokens".
        unit: Of all numbers here, in words.
        value: Mean over the valid positions of the anchors measured.
        each: The same of each anchor, in their order.
        tolerance: What counts as rounding; None if the teacher itself is not at 0.
    """

    kind: str
    unit: str
    value: float
    each: list[float]
    tolerance: float | None


def bytes_in_words(size: float) -> str:
    """Decimal, as disks are sold: 1 kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"


def spread(total: int, count: int) -> list[int]:
    """`count` numbers in [0, total), evenly apart, the same at every call; all of them if there are no more."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def retention_kinds(cache: AnchorCache) -> dict[str, type[CachedRetention]]:
    """Kind -> the retention closure for it, of everything that the cache can hold a model to."""
    f = cache.features
    kinds: dict[str, type[CachedRetention]] = {}
    if f.logits is not None:
        kinds["logits"] = LogitRetention
    if f.layers:
        kinds["hidden"] = HiddenRetention
    if f.tokens is not None:
        kinds["tokens"] = TokenRetention
    return kinds


def facts(cache: AnchorCache) -> list[tuple[str, str]]:
    """Label and text of what there is to say about a cache as a whole. Reads nothing."""
    f, settings = cache.features, cache.settings
    shards = len(cache.shards)
    functions = {"forward": f.forward, "mask": f.mask, "spans": f.spans, "autocast": f.autocast}
    stored = {name: settings.get(name) for name in ("images", "shard_size")}
    how = ", ".join(f"{name}={value}" for name, value in (functions | stored).items() if value is not None)
    skipped = f"; left out: {', '.join(cache.structure.skipped)}" if cache.structure.skipped else ""
    teacher = [cache.model_id, settings["teacher"].get("class")]
    rows = [
        ("Anchors", f"{len(cache)} in {shards} shard{'s' * (shards != 1)}"),
        ("Size on disk", f"{bytes_in_words(cache.nbytes)}, {bytes_in_words(cache.nbytes / len(cache))} per anchor"),
        ("Holds", f.describe()),
        ("Teacher", " · ".join(filter(None, teacher)) or "not named"),
        ("Fingerprint", cache.fingerprint or "not known"),
        ("Imported from", cache.origin or ""),
        ("Built with", how),
        ("Batches", f"a {cache.structure.kind} of {', '.join(cache.structure.names)}{skipped}"),
    ]
    return [(label, text) for label, text in rows if text]


def tensors(cache: AnchorCache) -> list[tuple[str, str, str]]:
    """`AnchorCache.tensors`, inputs first."""
    return sorted(cache.tensors(), key=lambda row: (not row[0].startswith("inputs."), row[0]))


def lengths(cache: AnchorCache) -> list[Lengths]:
    """Of every tensor whose anchors differ in length. Reads the shards' indices, 4 bytes per anchor."""
    found = []
    for name, shape, _ in cache.tensors():
        if shape.split(" x ")[0] not in ("length", "positions"):
            continue
        counts = []
        for shard in cache.shards:
            index = shard.index(name)
            plain = [shard.entries[name].shape[1]] * shard.count if index is None else []
            counts.append(np.asarray(plain) if index is None else np.diff(index.starts))
        every = np.concatenate(counts)
        found.append(Lengths(name, int(every.min()), float(every.mean()), int(every.max())))
    return found


def drifts(model: nn.Module, cache: AnchorCache, indices: Sequence[int], *, forward: Forward | None) -> list[Drift]:
    """How far the model is from the cache on these anchors, for each kind that the cache holds.

    Hidden states are compared by "mse", in units of the teacher's variance, or by "cosine" where that is zero.

    Args:
        model: On its device; its flags are left as they are.
        cache: Of this model or an earlier state of it.
        indices: Places of the anchors; at least one.
        forward: As in `build`.

    Raises:
        ValueError: The model does not fit the cache (`AnchorMismatchError`: other shapes than its teacher's).

    Cost: two forwards without gradients per anchor and kind.
    """
    f = cache.features
    autocast = None if f.autocast is None else getattr(torch, f.autocast)
    varies = all(variance > 0.0 for variance in f.variances.values())
    results = []
    for kind, closure in retention_kinds(cache).items():
        loss = {"loss": "mse" if varies else "cosine"} if kind == "hidden" else {}
        retention = closure(model, cache, 1, forward=forward, autocast=autocast, workers=0, strict=False, **loss)
        groups = [indices[start : start + _BATCH] for start in range(0, len(indices), _BATCH)]
        tolerance: float | None = retention._default_tolerance()
        unit = {
            "logits": "nats per position (KL)",
            "hidden": "of the teacher's variance" if varies else "cosine distance",
            "tokens": "nats per token",
        }[kind]
        if kind == "tokens" and all(name != "features.token_logprobs" for name, *_ in cache.tensors()):
            unit, tolerance = "nats per token, the teacher's own entropy among them", None
        results.append(
            Drift(
                kind,
                unit,
                retention.drift(cache.read(group) for group in groups),
                [retention.drift([cache.read([i])]) for i in indices],
                tolerance,
            )
        )
    return results


def verdict(cache: AnchorCache, model: nn.Module, measured: Sequence[Drift]) -> tuple[bool, str]:
    """Whether the model agrees with the cache, and a sentence about it."""
    why = None if cache.fingerprint is None else compare_fingerprints(cache.fingerprint, fingerprint(model))
    known = [drift for drift in measured if drift.tolerance is not None]
    if not known:
        return False, "The cache does not say how likely the teacher found its tokens: 0 is not to be expected."
    if all(abs(drift.value) <= drift.tolerance for drift in known if drift.tolerance is not None):
        return True, f"The cache fits this model: its drift is rounding{f', although {why}' if why else ''}."
    far = ", ".join(f"{drift.value:.3g} {drift.unit}" for drift in known)
    if why is not None:
        return False, f"The model has drifted from the cache by {far}: {why}."
    same = "not known to be those" if cache.fingerprint is None else "those"
    return False, (
        f"The model does not reproduce the cache: {far}. Its weights are {same} of the teacher; compare the "
        "`forward=`, the mask, the precision and the attention implementation with those of the build."
    )
