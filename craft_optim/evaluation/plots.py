"""Plots of drift over checkpoints. Needs matplotlib, the extra `report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_optim._paths import local
from craft_optim.evaluation.checkpoints import Checkpoint, layer_name
from craft_optim.evaluation.drift import spread_over

__all__ = ["draw_checkpoints", "require_matplotlib"]

_BLUE = "#1b6ca8"


def require_matplotlib() -> None:
    """Checks that matplotlib is installed, before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"A plot needs matplotlib ({error}): pip install 'craft-optim[report]'.") from error


def draw_checkpoints(checkpoints: Sequence[Checkpoint], epsilon: Mapping[str, float], path: str | Path) -> None:
    """Draws the drift of each checkpoint, in order, against epsilon: a panel per kind, layers and actions.

    Args:
        checkpoints: The checkpoints, at least one, all with the same kinds.
        epsilon: Kind, or "actions", -> threshold to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    kinds, actions = checkpoints[0].drifts, checkpoints[0].actions
    panels = len(kinds) + sum(bool(drift.layers) for drift in kinds) + (actions is not None)
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    names = [checkpoint.name for checkpoint in checkpoints]
    for number, drift in enumerate(kinds):
        of_all = [checkpoint.drifts[number] for checkpoint in checkpoints]
        axis = next(axes)
        _draw_spread(axis, [(x.value, x.each) for x in of_all], "mean", epsilon.get(drift.kind))
        _label(axis, names, f"{drift.kind}, {drift.unit}")
        if drift.layers:
            axis = next(axes)
            for place, part in enumerate(drift.layers):
                values = [x.layers[place].value for x in of_all]
                axis.plot(values, marker="o", lw=1.2, label=layer_name(part.layer, part.span))
            _draw_epsilon(axis, epsilon.get(drift.kind))
            _label(axis, names, f"{drift.kind} by layer, {drift.unit}")
    if actions is not None:
        axis, apart = next(axes), [x.actions for x in checkpoints if x.actions is not None]
        _draw_spread(axis, [(x.mean_abs, x.each) for x in apart], "mean |difference|", epsilon.get("actions"))
        _label(axis, names, "actions, normalised units")
    figure.savefig(local(path), dpi=130)


def _draw_spread(
    axis: Any, measured: Sequence[tuple[float, Sequence[float]]], title: str, epsilon: float | None
) -> None:
    places = list(range(len(measured)))
    quantiles = [spread_over(each).quantiles for _, each in measured]
    low, middle, high = ([q[name] for q in quantiles] for name in ("5%", "50%", "95%"))
    if len(places) == 1:  # a band without width would be invisible
        axis.vlines(places, low, high, color=_BLUE, alpha=0.3, lw=8, label="anchors, 5 % to 95 %")
    else:
        axis.fill_between(places, low, high, color=_BLUE, alpha=0.15, lw=0, label="anchors, 5 % to 95 %")
    axis.plot(places, middle, color=_BLUE, marker=".", lw=0.8, ls=":", label="median anchor")
    axis.plot(places, [value for value, _ in measured], color=_BLUE, marker="o", lw=1.6, label=title)
    _draw_epsilon(axis, epsilon)


def _draw_epsilon(axis: Any, epsilon: float | None) -> None:
    if epsilon is not None:
        axis.axhline(epsilon, color="black", ls="--", lw=1, label=f"epsilon = {epsilon:g}")


def _label(axis: Any, names: Sequence[str], title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0, fontsize=8)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.legend(fontsize=8, frameon=False)
