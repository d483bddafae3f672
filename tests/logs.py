"""What the libraries would have told the user."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def recorded_log() -> Iterator[list[str]]:
    """Collect warnings and errors of all loggers, transformers' included; what was warned about once is warned about again."""
    transformers_logging.warning_once.cache_clear()
    recorder = _Recorder()
    loggers = [logging.getLogger(), logging.getLogger("transformers")]  # the latter does not hand on to the former
    for logger in loggers:
        logger.addHandler(recorder)
    try:
        yield recorder.messages
    finally:
        for logger in loggers:
            logger.removeHandler(recorder)
