"""Episodes of a dataset, as --dataset.episodes chooses them."""

import json
from collections.abc import Sequence

__all__ = ["Episodes", "chosen_episodes", "parse_episodes"]

Episodes = int | slice | list[int]
"""Number of first episodes, a slice, or the episodes' numbers"""


def parse_episodes(text: str) -> Episodes:
    """The episodes that a text selects, whatever the dataset.

    Args:
        text: "12", the first 12; "[0,3,5]", a list as lerobot-train writes it; "40:", "-10:", "5:20", "::2", a slice as
            in Python.

    Raises:
        ValueError: The text is none of these.

    Example:
        >>> parse_episodes("12"), parse_episodes("[0, 3]"), parse_episodes("-10:")
        (12, [0, 3], slice(-10, None, None))
    """
    forms = "the first N as N, a list as [0,3,5], or a part as 40:, -10: or 5:20"
    wrong = ValueError(f"`episodes` must be {forms}. Found {text!r}.")
    try:
        if text.lstrip().startswith("["):
            numbers = json.loads(text)
            if not numbers or not all(type(number) is int for number in numbers):
                raise wrong
            _check_list(numbers)
            return list(numbers)
        parts = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError as error:
        raise (error if "`episodes`" in str(error) else wrong) from None
    if len(parts) > 3 or (len(parts) == 1 and (parts[0] or 0) < 1) or (len(parts) == 3 and parts[2] == 0):
        raise wrong
    return parts[0] or 0 if len(parts) == 1 else slice(*parts)


def chosen_episodes(episodes: str | Sequence[int] | None, total: int, where: str) -> list[int]:
    """The numbers of the selected episodes of a dataset with `total`, ascending; `where` is its name.

    Args:
        episodes: Numbers, or text as `parse_episodes` takes it. None: all.

    Raises:
        ValueError: There are no such episodes, or one is named twice.

    Example:
        >>> chosen_episodes("-2:", 5, "data/")
        [3, 4]
    """
    if episodes is None:
        return list(range(total))
    wanted = parse_episodes(episodes) if isinstance(episodes, str) else list(episodes)
    if isinstance(wanted, list):
        _check_list(wanted)
        found, missing = sorted(wanted), [number for number in wanted if number >= total]
    elif isinstance(wanted, slice):
        found, missing = sorted(range(total)[wanted]), []
    else:
        found, missing = list(range(min(wanted, total))), list(range(total, wanted))
    if missing or not found:
        text = f"`episodes`={episodes if isinstance(episodes, str) else wanted}"
        raise ValueError(
            f"{where} has {total} episodes, 0 to {total - 1}. Found {text}, "
            f"{f'{missing[0]} among them' if missing else 'which is none of them'}."
        )
    return found


def _check_list(numbers: Sequence[int]) -> None:
    if any(number < 0 for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f"`episodes` must be numbers >= 0, each once; the last ten are -10: as text. Found {numbers}.")
