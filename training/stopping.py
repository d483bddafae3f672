"""Stopping in order: Ctrl-C (SIGINT) and `kill` (SIGTERM) wait for the end of a step; a second one does not wait.

An exception in the middle of a step would strike anywhere, also where worker processes start, which then complain or stay.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The user, or the system, asked the program to end.

    Attributes:
        exit_code: 128 + the number of the signal, as shells have it.
        what_remains: end of the sentence for the user.
    """

    what_remains = "nothing was saved"

    def __init__(self, number: int) -> None:
        """Name the signal."""
        super().__init__(number)
        self.exit_code = 128 + number


class StopSignals:
    """Receives SIGINT and SIGTERM; one instance serves the program."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._held = False
        self._process: int | None = None

    @contextmanager
    def receive(self) -> Iterator[None]:
        """In this block both signals raise `Stopped`; within `hold`, the first one is kept until `check`."""
        self._requested = None
        self._process = os.getpid()
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the first signal until the next `check`, or the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    def check(self) -> None:
        """Stop here when it was asked for.

        Raises:
            Stopped: a signal came since `receive`.
        """
        if self._requested is not None:
            raise Stopped(self._requested)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that has just been forked: its parent ends it
        if self._held and self._requested is None:
            self._requested = number
            print("\nStopping after this step. Once more to stop at once.", file=sys.stderr)
        else:
            raise Stopped(number)


stop_signals = StopSignals()
