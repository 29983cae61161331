"""Categories of anchors, such as tasks or kinds of prompts: written into a shard's record, and read from it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["by_category", "categories_in", "in_line", "recorded"]

_KEY = "categories"
_WIDTH = 40  # characters of a category in a table


def recorded(categories: Sequence[str]) -> dict[str, Any]:
    """The entries of a shard's record: each text once, and its number for each anchor; nothing if all are "".

    Example:
        >>> recorded(["json", "list", "json"])
        {'categories': {'names': ['json', 'list'], 'of': [0, 1, 0]}}
    """
    if not any(categories):
        return {}
    names = {name: number for number, name in enumerate(dict.fromkeys(categories))}
    return {_KEY: {"names": list(names), "of": [names[category] for category in categories]}}


def categories_in(record: Mapping[str, Any], count: int) -> list[str]:
    """The categories of a shard's anchors, "" for none.

    Raises:
        ValueError: The record has not one category for each anchor.
    """
    if _KEY not in record:
        return [""] * count
    found = record[_KEY]
    try:
        names, numbers = found["names"], found["of"]
        whole = all(type(x) is int and x >= 0 for x in numbers) and all(isinstance(x, str) for x in names)
        if not whole or len(numbers) != count:
            raise ValueError
        return [names[x] for x in numbers]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"its {_KEY!r} must be names, and one of them for each of {count} anchors") from None


def in_line(category: str) -> str:
    """A category for the cell of a table: one line; a long text loses its middle.

    Example:
        >>> in_line(""), in_line("open\\nthe drawer")
        ('(none)', 'open the drawer')
    """
    text = " ".join(category.encode("utf-8", "replace").decode().split())
    if len(text) > _WIDTH:
        text = f"{text[: _WIDTH // 2 - 1]} ... {text[len(text) - _WIDTH // 2 + 4 :]}"
    return text or "(none)"


def by_category(categories: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Each category, in alphabetical order, with its anchors' places in the list."""
    places: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        places.setdefault(category, []).append(place)
    yield from sorted(places.items())
