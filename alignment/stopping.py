"""SIGTERM as a request: the loop finishes what cannot be left half done, saves, and the process exits with 75."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any

from alignment.distributed import from_all

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on."""


class Stopped(Exception):
    """The stage was asked to stop, and everything that is needed to go on is on disk."""


class StopRequest:
    """Whether SIGTERM has arrived. `then` is called each time that it does."""

    def __init__(self) -> None:
        self.received = False
        self.then: Callable[[], object] | None = None

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call it together and get the same answer."""
        return any(from_all(self.received))

    def check(self) -> None:
        """Stopped, on all processes, when any of them was asked to."""
        if self.agreed():
            raise Stopped("SIGTERM")


@contextlib.contextmanager
def stop_on_sigterm() -> Generator[StopRequest]:
    """Inside, SIGTERM does not end this process but is remembered."""
    request = StopRequest()

    def remember(_number: int, _frame: Any) -> None:
        request.received = True
        if request.then is not None:
            request.then()

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
