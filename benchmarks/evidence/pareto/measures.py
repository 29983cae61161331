"""Measures of scores: plasticity, retention, and how much of their plane a method dominates. Pure."""

from collections.abc import Sequence

__all__ = ["dominated_area", "front", "plasticity", "retention", "retention_at"]

Point = tuple[float, float]  # plasticity, retention


def _within(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def plasticity(after: float, *, before: float, plain: float) -> float:
    """The share of plain fine-tuning's gain on the new task, clipped to [0, 1].

        P = (after - before) / (plain - before)

    Args:
        after: Score on the new test set after fine-tuning; larger is better.
        before: Of the pretrained network.
        plain: After plain fine-tuning with the same seed and learning rate.

    Raises:
        ValueError: Plain fine-tuning gained nothing.
    """
    if not plain > before:
        raise ValueError(
            f"`plain` must be above `before`: there is no gain to have a share of. Found plain={plain}, "
            f"before={before}. Train longer, or with another learning rate."
        )
    return _within((after - before) / (plain - before))


def retention(after: float, *, before: float, plain: float, chance: float) -> float:
    """The share of what plain fine-tuning loses of the old ability that is left, clipped to [0, 1].

        R = 1 - (before - after) / (before - max(plain, chance))

    1: nothing is lost. 0: as much as plain fine-tuning loses; or all, where that falls below chance.

    Args:
        after: Score on the old test set after fine-tuning; larger is better.
        before: Of the pretrained network.
        plain: After plain fine-tuning with the same seed and learning rate.
        chance: The score of the best answer that does not look at the input.

    Raises:
        ValueError: Plain fine-tuning loses nothing, or the pretrained network knew nothing.
    """
    floor = max(plain, chance)
    if not before > floor:
        raise ValueError(
            f"`before` must be above `plain` and `chance`: there is nothing to keep. Found before={before}, "
            f"plain={plain}, chance={chance}."
        )
    return _within(1.0 - (before - after) / (before - floor))


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one is at least as good as in both, from low plasticity to high; doubles once."""
    kept: list[Point] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def dominated_area(points: Sequence[Point]) -> float:
    """The area of the unit square that is below and left of some point: the hypervolume with reference (0, 0)."""
    area, before = 0.0, 0.0
    for p, r in front(points):
        area, before = area + (p - before) * r, p
    return area


def retention_at(points: Sequence[Point], least: float) -> float:
    """Retention where the front, with straight lines between its points, has this plasticity; 0 if it ends before.

    Lines, because the points of a sweep fall where its strengths do. Where all of the front is beyond: its first point.
    """
    kept = front(points)
    below, above = [point for point in kept if point[0] < least], [point for point in kept if point[0] >= least]
    if not above:
        return 0.0
    if not below:
        return above[0][1]
    (p, r), (q, s) = below[-1], above[0]
    return r + (s - r) * (least - p) / (q - p)
