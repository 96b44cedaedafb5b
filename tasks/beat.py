"""The clock of `beat`."""

from celery.beat import Scheduler as _Scheduler


class Scheduler(_Scheduler):
    """Celery's, which wakes 10 ms before a task is due, and then asks for the time until it is, as fast as it can.

    With ticks of a second that is four fifths of what beat does, and on a small machine payments wait for the processor
    meanwhile (Celery 5.7).
    """

    def adjust(self, n: float, drift: float = 0.0) -> float:
        """How long to sleep if the next task is due in `n` seconds."""
        return n + drift
