"""A scatter of what was learnt against what was kept, as SVG for the page: colours are the page's, also in the dark."""

import math
from collections.abc import Iterator, Mapping, Sequence

from craft_optim.markup import Markup, tag
from craft_optim.report.colours import ink
from craft_optim.report.outcomes import Outcome, Scatter

__all__ = ["axis_range", "in_words", "scatter_svg", "ticks"]

_WIDTH, _HEIGHT = 480, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 20, 50
_LETTER = 8  # the width of one, on average and with room to spare

_Box = tuple[float, float, float, float]


def axis_range(values: Sequence[float]) -> tuple[float, float]:
    """From 0 to 1 with a margin, if the values are shares; else around them."""
    low, high = min(values), max(values)
    if low >= 0.0 and high <= 1.0:
        return -0.04, 1.06
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range: four to eight of them."""
    raw = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(raw))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if step * k >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def in_words(scatter: Scatter) -> str:
    """For readers who do not see it."""
    points = ", ".join(f"{_name(p)} at {p.x:.2g} and {p.y:.2g}" for p in scatter.front)
    return f"{scatter.x} to the right, {scatter.y} upwards; on the front: {points}."


def _name(point: Outcome) -> str:
    return f"{point.method} {point.label}".strip()


def scatter_svg(scatter: Scatter, colours: Mapping[str, int]) -> Markup:
    """The drawing.

    Args:
        scatter: What to draw.
        colours: Method -> number of its colour.
    """
    points = scatter.points
    spread_x = [v for p in points for v in (p.x, *(p.x_interval or ()), *(s[0] for s in p.seeds))]
    spread_y = [v for p in points for v in (p.y, *(p.y_interval or ()), *(s[1] for s in p.seeds))]
    (x_low, x_high), (y_low, y_high) = axis_range(spread_x), axis_range(spread_y)

    def at_x(value: float) -> str:
        return f"{_LEFT + (value - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT):.1f}"

    def at_y(value: float) -> str:
        return f"{_HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = []
    for value in ticks(x_low, x_high):
        parts.append(_line(at_x(value), f"{_TOP}", at_x(value), f"{_HEIGHT - _BOTTOM}", "grid"))
        parts.append(tag("text", f"{value:g}", x=at_x(value), y=_HEIGHT - _BOTTOM + 17, text_anchor="middle"))
    for value in ticks(y_low, y_high):
        parts.append(_line(f"{_LEFT}", at_y(value), f"{_WIDTH - _RIGHT}", at_y(value), "grid"))
        parts.append(tag("text", f"{value:g}", x=_LEFT - 8, y=float(at_y(value)) + 4, text_anchor="end"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(tag("text", scatter.x, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, text_anchor="middle"))
    parts.append(tag("text", scatter.y, transform=f"translate(13 {middle}) rotate(-90)", text_anchor="middle"))
    parts.append(tag("path", d=_stairs(scatter, at_x, at_y), class_="front"))
    for method, of in scatter.sweeps.items():
        places = " ".join(f"{at_x(point.x)},{at_y(point.y)}" for point in of)
        parts.append(tag("polyline", points=places, style=f"--c:{ink(colours[method])}", class_="sweep"))
    for point in points:
        style = f"--c:{ink(colours[point.method])}"
        x, y = at_x(point.x), at_y(point.y)
        drawn = [tag("title", f"{_name(point)}: {scatter.x} {point.x:.3g}, {scatter.y} {point.y:.3g}")]
        drawn += [tag("circle", cx=at_x(sx), cy=at_y(sy), r=2.5, class_="seed") for sx, sy in point.seeds]
        if point.x_interval:
            drawn.append(_line(at_x(point.x_interval[0]), y, at_x(point.x_interval[1]), y, "interval"))
        if point.y_interval:
            drawn.append(_line(x, at_y(point.y_interval[0]), x, at_y(point.y_interval[1]), "interval"))
        drawn.append(tag("circle", cx=x, cy=y, r=6))
        parts.append(tag("g", *drawn, style=style, class_="point"))
    for point, left, top, anchor in _labels([(p, float(at_x(p.x)), float(at_y(p.y))) for p in _by_front(scatter)]):
        parts.append(tag("text", _name(point), x=f"{left:.1f}", y=f"{top:.1f}", text_anchor=anchor, class_="label"))
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=in_words(scatter), class_="scatter")


def _by_front(scatter: Scatter) -> list[Outcome]:
    front = scatter.front
    return [*front, *(point for point in scatter.points if point not in front)]


def _labels(points: Sequence[tuple[Outcome, float, float]]) -> Iterator[tuple[Outcome, float, float, str]]:
    """(point, x, y, anchor) of the names for which there is room; the others are told where the pointer rests."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for _, x, y in points]
    for point, x, y in points:
        width = _LETTER * len(_name(point))
        for dx, dy, anchor in ((10, -8, "start"), (-10, -8, "end"), (10, 18, "start"), (-10, 18, "end")):
            left = x + dx - (width if anchor == "end" else 0)
            box = (left, y + dy - 11, left + width, y + dy + 3)
            inside = box[0] >= _LEFT and box[2] <= _WIDTH - 4 and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield point, x + dx, y + dy, anchor
                break


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _line(x1: str, y1: str, x2: str, y2: str, kind: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _stairs(scatter: Scatter, at_x: object, at_y: object) -> str:
    front = scatter.front
    moves = [f"M{at_x(front[0].x)} {at_y(front[0].y)}"]  # type: ignore[operator]
    moves += [f"V{at_y(point.y)}H{at_x(point.x)}" for point in front[1:]]  # type: ignore[operator]
    return "".join(moves)
