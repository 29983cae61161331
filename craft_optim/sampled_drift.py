"""A closure's drift on part of its anchors, or of others: what large caches are measured by."""

from typing import Any

from craft_optim.anchors import AnchorBatch, AnchorCache, CombinedRetention, OnlineRetention
from craft_optim.anchors.retention import AnchorRetention, CachedRetention
from craft_optim.inspection import spread

__all__ = ["drift_on", "inputs_of"]


def drift_on(retention: Any, anchors: Any = None, count: int | None = None) -> float:
    """`retention.drift(anchors)`, on at most `count` anchors, evenly apart and the same at every call.

    Advances nothing. The mean is over all valid positions of these anchors.

    Args:
        retention: A closure of `craft_optim.anchors`, or anything with `drift()`, which is measured on all it has.
        anchors: What its `drift` takes: a cache; for `OnlineRetention` also examples. None: its own.
        count: None: all.

    Raises:
        TypeError: It has no `drift`: a plain function tells its loss on the next anchors only.
    """
    if isinstance(retention, CombinedRetention):
        return float(
            sum(w * drift_on(retention.members[name], anchors, count) for name, w in retention.weights.items())
        )
    if count is not None and isinstance(retention, CachedRetention):
        cache = retention.cache if anchors is None else anchors
        retention._check_kind(cache)
        places, size = spread(len(cache), count), retention.batch_size
        return retention.drift(cache.read(places[start : start + size]) for start in range(0, len(places), size))
    if count is not None and isinstance(retention, OnlineRetention):
        source = retention._anchors if anchors is None else retention._source(anchors)
        return float(retention._drift(_Some(source, spread(len(source), count)), None))
    if not hasattr(retention, "drift"):
        raise TypeError(
            "`retention` must have a method `drift()` that measures it without gradients, as the closures of "
            f"craft_optim.anchors do. Found {type(retention).__name__}."
        )
    return float(retention.drift() if anchors is None else retention.drift(anchors))


def inputs_of(retention: Any, count: int) -> list[Any]:
    """The inputs of at most `count` of its anchors, each a batch of one; none if it does not tell them.

    Of combined closures those of the first.

    Args:
        retention: As for `drift_on`.
        count: As for `drift_on`.
    """
    if isinstance(retention, CombinedRetention):
        return inputs_of(next(iter(retention.members.values())), count)
    if not isinstance(retention, AnchorRetention):
        return []
    anchors = retention._anchors
    places = spread(len(anchors), count)
    if isinstance(anchors, AnchorCache):
        return [anchors.read([place], features=False).inputs for place in places]
    return [retention._read(anchors, [place], 0).inputs for place in places]


class _Some:
    """Some of the anchors, as anchors."""

    def __init__(self, anchors: Any, places: list[int]) -> None:
        self._anchors, self._places = anchors, places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, indices: Any) -> AnchorBatch:
        batch: AnchorBatch = self._anchors.read([self._places[int(i)] for i in indices])
        return batch
