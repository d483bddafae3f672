"""Stopping in order: Ctrl-C (SIGINT) and `kill` (SIGTERM) wait for the end of a step; a second one does not wait.

An exception in the middle of a step would strike anywhere, also where worker processes start, which then complain or stay.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The user, or the system, asked the program to end.

    Attributes:
        exit_code: 128 + the number of the signal, as shells have it.
        in_order: whether it was raised by `check`, and nothing is half done.
        what_remains: end of the sentence for the user.
    """

    what_remains = "nothing was saved"

    def __init__(self, number: int, *, in_order: bool = False) -> None:
        """Name the signal."""
        super().__init__(number)
        self.exit_code = 128 + number
        self.in_order = in_order


class StopSignals:
    """Receives SIGINT and SIGTERM; one instance serves the program."""

    def __init__(self, same_request_seconds: float = 5.0) -> None:
        """Begin without any request.

        Args:
            same_request_seconds: signals within this time are one request: at a terminal, and from schedulers, a program
                gets each twice, once directly and once from the launcher that it has as its parent.
        """
        self.same_request_seconds = same_request_seconds
        self._requested: int | None = None
        self._requested_at = 0.0
        self._agree: Callable[[int], int] | None = None
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
    def hold(self, agree: Callable[[int], int] | None = None) -> Iterator[None]:
        """Keep the first signal until the next `check`, or the end of the block.

        Args:
            agree: called in every `check` of the block with the number of the signal, or 0; returns what counts. With it
                several processes can stop together.
        """
        self._held = True
        self._agree = agree
        try:
            yield
        finally:
            self._held = False
            self._agree = None
        self.check()

    def check(self) -> None:
        """Stop here when it was asked for.

        Raises:
            Stopped: a signal came since `receive`.
        """
        requested = self._requested or 0
        if self._agree is not None:
            requested = self._agree(requested)
        if requested:
            raise Stopped(requested, in_order=True)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that has just been forked: its parent ends it
        is_first = self._requested is None
        if not is_first and time.monotonic() - self._requested_at < self.same_request_seconds:
            return
        self._requested = number
        self._requested_at = time.monotonic()
        if not (self._held and is_first):
            raise Stopped(number)
        print(
            f"\nStopping after this step. Once more, {self.same_request_seconds:g} seconds later, to stop at once.",
            file=sys.stderr,
        )


stop_signals = StopSignals()
