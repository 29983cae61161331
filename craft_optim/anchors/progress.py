"""Progress: a bar that counts anchors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["anchor_bar"]


@contextmanager
def anchor_bar(progress: bool | None, title: str) -> Iterator[tuple[Callable[[int, int | None], Any], bool]]:
    """Yields a function to call after each batch with its size and the total, and True to log lines instead.

    Args:
        progress: True to show the bar. None: only on a terminal.
        title: Name of the anchors' source, such as the teacher.
    """
    if progress is not False:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            disable = None if progress is None else False  # None: tqdm draws on terminals only
            with tqdm(desc=f"anchors of {title}", unit=" anchors", disable=disable) as bar:

                def update(size: int, total: int | None) -> None:
                    bar.total = total
                    bar.update(size)

                yield update, False
            return
    yield (lambda size, total: None), bool(progress)
