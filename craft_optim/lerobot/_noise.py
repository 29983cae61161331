"""One log line instead of lerobot's hundred per dataset if torchcodec cannot be loaded."""

import logging

__all__ = ["shorten"]

_said: list[str] = []


def shorten() -> None:
    """Shortens that message in this process from now on; other messages, and the fallback to pyav, stay the same."""
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
