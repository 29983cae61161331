"""Checkpoints side by side: names, and drift and all else about them as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from craft_optim.anchors.categories import by_category
from craft_optim.evaluation.actions import ActionDrift
from craft_optim.evaluation.drift import Drift, spread_over

__all__ = ["Checkpoint", "layer_name", "record", "short_names"]


@dataclass(frozen=True)
class Checkpoint:
    """The measurements of one model.

    Attributes:
        path: Folder or hub id of the model.
        drifts: Drift by kind.
        actions: Distance of its actions from the teacher's; None if not compared.
    """

    path: str
    name: str
    drifts: Sequence[Drift]
    actions: ActionDrift | None = None


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all share at the beginning and end.

    Example:
        >>> short_names(["out/checkpoints/000100/pretrained_model", "out/checkpoints/000200/pretrained_model"])
        ['000100', '000200']
    """
    parts = [PurePath(path).parts for path in paths]
    if len(set(parts)) < 2:
        return list(paths)
    begin, end = _shared(parts), _shared([part[::-1] for part in parts])
    cut = [part[begin : len(part) - end] for part in parts]
    return ["/".join(part) for part in cut] if all(cut) else list(paths)


def _shared(parts: Sequence[tuple[str, ...]]) -> int:
    """Number of equal folders at the beginning."""
    alike = (len(set(folders)) == 1 for folders in zip(*parts, strict=False))
    return next((count for count, same in enumerate(alike) if not same), min(map(len, parts)))


def layer_name(layer: int | str, span: str) -> str:
    """The name of a layer and a span for people: "layer 4, image"."""
    return f"{f'layer {layer}' if isinstance(layer, int) else layer}, {span}"


def record(
    checkpoints: Sequence[Checkpoint],
    places: Sequence[int],
    epsilon: Mapping[str, float],
    worst: int = 5,
    categories: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """All measurements on the anchors at these places, with the `worst` named, in the types of JSON.

    Numbers that are not finite are None.

    Args:
        epsilon: Kind, or "actions", -> threshold.
        categories: Category of each of these anchors; empty if they have none.
    """

    def numbers(
        value: float | None, each: Sequence[float], kind: str, of: Sequence[int] = places, *, split: bool = True
    ) -> dict[str, Any]:
        spread = spread_over(each, of, epsilon.get(kind), worst)
        parts = {
            category: numbers(None, [each[i] for i in some], kind, [of[i] for i in some], split=False)
            for category, some in by_category(categories if split else ())
        }
        return {
            **({} if value is None else {"mean": value}),
            "anchor_mean": spread.anchor_mean,
            "quantiles": spread.quantiles,
            "epsilon": epsilon.get(kind),
            "share_over_epsilon": spread.over,
            "worst": [{"anchor": place, "drift": drift} for place, drift in spread.worst],
            "each": list(each),
            **({"categories": parts} if parts else {}),
        }

    rows = []
    for checkpoint in checkpoints:
        row: dict[str, Any] = {"path": checkpoint.path, "name": checkpoint.name, "drift": {}}
        for drift in checkpoint.drifts:
            about = {"unit": drift.unit, "tolerance": drift.tolerance, **numbers(drift.value, drift.each, drift.kind)}
            if drift.layers:
                about["layers"] = [
                    {"layer": part.layer, "span": part.span, "pooling": part.pooling}
                    | numbers(part.value, part.each, drift.kind)
                    for part in drift.layers
                ]
            row["drift"][drift.kind] = about
        if checkpoint.actions is not None:
            apart = asdict(checkpoint.actions)
            row["actions"] = apart | numbers(None, checkpoint.actions.each, "actions")
        rows.append(row)
    found: list[dict[str, Any]] = _finite(rows)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, list) else value
