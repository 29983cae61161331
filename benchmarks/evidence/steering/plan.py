"""Which runs each table takes. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from .cases import Case

__all__ = ["BATCH", "BUILDS", "EPSILONS", "NOISES", "SCALES", "SHARES", "cases", "rates"]

SHARES = (1.0, 1 / 4, 1 / 16)
BATCH: Mapping[str, float] = {"classes": 1 / 4, "rotation": 1 / 4, "language": 1 / 16}
"""The share of the anchors in a pass that the settings have."""
NOISES = (0.0, 0.25, 0.5, 1.0, 1.5)
SCALES = (1e-6, 1e-4, 1e-2, 1e0, 1e2, 1e4, 1e6)
EPSILONS = (0.05, 0.2)  # of held-out anchors
BUILDS = ("this", "earlier")


def rates(setting: str) -> list[tuple[float, float]]:
    """(Factor on the learning rate, epsilon) of a setting's rows."""
    return [(1.0, 0.05)] if setting == "language" else [(1.0, 0.05), (3.0, 0.02)]


def cases(settings: Sequence[str], seeds: Sequence[int], build: str = "this") -> list[Case]:
    """All runs of a build; the earlier one knows K = 1 alone, and no held-out anchors.

    Args:
        settings: Of `pareto.prepared.SETTINGS`.
        seeds: Of each.
        build: Of `BUILDS`.
    """
    found = []
    every_of = ("auto", "1") if build == "this" else ("1",)
    default = every_of[0]
    for seed in seeds:
        found += [
            Case(setting, seed, every, epsilon, share, lr)
            for setting in settings
            for (lr, epsilon), share, every in product(rates(setting), SHARES, every_of)
        ]
        found += [Case("parameter", seed, every, noise=noise) for noise, every in product(NOISES, every_of)]
        found += [
            Case("network", seed, default, scale=scale, projection=projection)
            for scale, projection in product(SCALES, ("violated", "never"))
        ]
        if build == "this":
            plain = [
                Case(setting, seed, "auto", epsilon, BATCH[setting]) for setting, epsilon in product(settings, EPSILONS)
            ]
            found += plain + [replace(case, heldout=half) for case in plain for half in ("even", "odd")]
    return list(dict.fromkeys(found))
