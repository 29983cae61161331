"""The colours of methods, in the order in which they are given out; beyond the last one they begin anew."""

__all__ = ["DARK", "LIGHT", "ink"]

_ON_WHITE = "1b6ca8 d95f02 1b9e77 8a5cc0 c2185b 7a6a00 00838f 6d4c41 3f51b5 558b2f ad1457 546e7a"
_ON_BLACK = "5fb0f0 ff9a4d 4fd1a5 b69af0 f472a8 d8c44a 4dd0e1 c9a294 9fa8ff 9ccc65 ff80ab b0bec5"

LIGHT, DARK = ([f"#{colour}" for colour in each.split()] for each in (_ON_WHITE, _ON_BLACK))


def ink(number: int) -> str:
    """The colour of a method on the page, as CSS that follows the reader's light or dark."""
    return f"var(--g{number % len(LIGHT)})"
