"""One line in the place of the hundred that lerobot logs where torchcodec cannot be loaded, for each dataset again."""

import logging

__all__ = ["shorten"]

_said: list[str] = []


def shorten() -> None:
    """From now on, in this process; other messages stay as they are, and so does the fall back to pyav."""
    logger = logging.getLogger("lerobot.utils.import_utils")
    if _in_one_line not in logger.filters:
        logger.addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if "'torchcodec'" not in text:
        return True
    record.msg, record.args = text.rpartition("\n")[2].replace(" (see the error above)", ""), ()
    _said.append(record.msg)
    return len(_said) == 1
