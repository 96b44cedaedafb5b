"""Signals that end a command: recorded by the handler, raised at points where every process is tracked."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SLICE_S = 0.05


class Interrupted(Exception):
    """A signal requested the end of the command. `status` is the exit status for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interrupts:
    """The last received signal."""

    def __init__(self) -> None:
        self._received: int | None = None

    def record_signal(self, number: int, _frame: FrameType | None) -> None:
        """Record a signal (signal handler)."""
        self._received = number

    def check(self) -> None:
        """Raise `Interrupted` if a signal was received."""
        if self._received is not None:
            raise Interrupted(self._received)

    def sleep(self, seconds: float) -> None:
        """Sleep. Raise `Interrupted` at most 50 ms after a signal."""
        end = time.monotonic() + seconds
        while (remaining := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(remaining, _SLICE_S))
        self.check()


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Record signals while the block runs, and restore the previous handlers."""
    recorded = Interrupts()
    previous = [(number, signal.signal(number, recorded.record_signal)) for number in SIGNALS]
    try:
        yield recorded
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
