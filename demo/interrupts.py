"""Ctrl-C, SIGTERM and a closed terminal: noted when they come, raised where nothing can be left half done."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SLICE_S = 0.05


class Interrupted(Exception):
    """A signal asked us to stop; `status` is the exit status that says so."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interrupts:
    """The signals that came."""

    def __init__(self) -> None:
        self._came: int | None = None

    def record_signal(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: remember it."""
        self._came = number

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self._came is not None:
            raise Interrupted(self._came)

    def sleep(self, seconds: float) -> None:
        """Wait; raise `Interrupted` soon after a signal."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _SLICE_S))
        self.check()


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Note signals for as long as the block runs, instead of being ended by them."""
    noted = Interrupts()
    before = [(number, signal.signal(number, noted.record_signal)) for number in SIGNALS]
    try:
        yield noted
    finally:
        for number, handler in before:
            signal.signal(number, handler)
