"""Room on the disk: the size of a cache, logged before its first shard is written; too large a cache is refused."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .images import encode, is_image
from .shards import AnchorCacheError

__all__ = ["bytes_in_words", "bytes_on_disk", "say_room"]

_log = logging.getLogger("craft_optim")


def bytes_in_words(size: float) -> str:
    """Bytes in decimal units, as disks are sold: 1 kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"


def bytes_on_disk(inputs: Mapping[str, Tensor], features: Mapping[str, Tensor], images: str) -> int:
    """Estimated size of a batch of anchors; floating images that come from bytes count as those, unless "keep"."""
    as_bytes = [x for x in inputs.values() if images == "uint8" and is_image(x) and encode(x[:1].cpu()) is not None]
    saved = sum(x.nbytes - x.numel() for x in as_bytes)
    return sum(x.nbytes for x in (*inputs.values(), *features.values())) - saved


def say_room(folder: Path, each: float, anchors: int | None, *, speaks: bool) -> None:
    """Logs the size of a cache, in one line (level INFO).

    Args:
        folder: Folder of the cache. Parts of it on disk already are not counted again.
        each: Bytes per anchor.
        anchors: Total number of anchors; None if unknown.
        speaks: False in processes that do not log.

    Raises:
        AnchorCacheError: The cache does not fit on the disk. Nothing was written.
    """
    free = shutil.disk_usage(folder).free
    total = None if anchors is None else each * anchors
    if speaks:
        known = "" if total is None else f"about {anchors:,}, "
        whole = "" if total is None else f", {bytes_in_words(total)} in all"
        _log.info(
            "anchors in %s: %s%s each%s; %s are free", folder, known, bytes_in_words(each), whole, bytes_in_words(free)
        )
    there = sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
    if total is not None and total - there > free:
        raise AnchorCacheError(
            f"The cache in {folder} would take about {bytes_in_words(total)}, {anchors:,} anchors of "
            f"{bytes_in_words(each)}, and {bytes_in_words(free)} are free. Keep less of each (`top_k=64` of classes, "
            "pooled hidden states, `Reading(tokens=...)` with TokenRetention), take fewer anchors, make room, or pass "
            "another `path`."
        )
