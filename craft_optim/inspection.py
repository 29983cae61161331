"""An anchor cache in numbers and words."""

from typing import Any, NamedTuple

import numpy as np

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.categories import by_category, in_line
from craft_optim.anchors.room import bytes_in_words

__all__ = ["Lengths", "as_json", "bytes_in_words", "facts", "lengths", "tensors"]


_NAMED = 6  # categories


class Lengths(NamedTuple):
    """Lengths of one tensor's anchors, padding at their ends not counted."""

    name: str
    shortest: int
    mean: float
    longest: int


def facts(cache: AnchorCache) -> list[tuple[str, str]]:
    """Label and text of what there is to say about a cache as a whole. Reads 4 bytes of each anchor."""
    f, settings = cache.features, cache.settings
    shards = len(cache.shards)
    names = ("forward", "mask", "spans", "autocast", "lengths")
    functions = {name: getattr(f, name) for name in names}
    stored = {name: settings.get(name) for name in ("images", "shard_size")}
    how = ", ".join(f"{name}={value}" for name, value in (functions | stored).items() if value is not None)
    skipped = f"; left out: {', '.join(cache.structure.skipped)}" if cache.structure.skipped else ""
    teacher = [cache.model_id, settings["teacher"].get("class")]
    rows = [
        ("Anchors", f"{len(cache):,} in {shards} shard{'s' * (shards != 1)}"),
        ("Categories", _categories(cache)),
        ("Positions", f"{cache.positions:,}" if cache.positions else ""),
        ("Size on disk", f"{bytes_in_words(cache.nbytes)}, {bytes_in_words(cache.nbytes / len(cache))} per anchor"),
        ("Holds", f.describe()),
        ("Teacher", " · ".join(filter(None, teacher)) or "not named"),
        ("Fingerprint", cache.fingerprint or "not known"),
        ("Imported from", cache.origin or ""),
        ("Built with", how),
        ("Batches", f"a {cache.structure.kind} of {', '.join(cache.structure.names)}{skipped}"),
    ]
    return [(label, text) for label, text in rows if text]


def _categories(cache: AnchorCache) -> str:
    """Each with its number of anchors, the largest first, as far as they fit a line; empty without any."""
    if not any(cache.categories):
        return ""
    parts = sorted(by_category(cache.categories), key=lambda part: -len(part[1]))
    more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
    return ", ".join(f"{in_line(name)} {len(places)}" for name, places in parts[:_NAMED]) + more


def tensors(cache: AnchorCache) -> list[tuple[str, str, str]]:
    """`AnchorCache.tensors`, inputs first."""
    return sorted(cache.tensors(), key=lambda row: (not row[0].startswith("inputs."), row[0]))


def lengths(cache: AnchorCache) -> list[Lengths]:
    """The lengths of every tensor whose anchors differ in it. Reads the shards' indices, 4 bytes per anchor."""
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


def as_json(cache: AnchorCache) -> dict[str, Any]:
    """The same for programs: `cache`, its path; `anchors`; `facts`, `kept` and `tensors`."""
    varying = {row.name: row for row in lengths(cache)}
    return {
        "cache": str(cache.path),
        "anchors": len(cache),
        "facts": dict(facts(cache)),
        "kept": {name: told._asdict() for name, told in cache.kept().items()},
        "tensors": [
            {"name": name, "shape": shape, "dtype": dtype}
            | ({"length": list(varying[name][1:])} if name in varying else {})
            for name, shape, dtype in tensors(cache)
        ],
    }
