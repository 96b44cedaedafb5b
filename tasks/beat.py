"""The clock of `beat`."""

from celery.beat import Scheduler as _Scheduler


class Scheduler(_Scheduler):
    """Celery's, which wakes 10 ms before a task is due, and then asks for the time until it is, as fast as it can.

    With ticks of a second that is more than all other work of a role with nothing to do, and on a small machine a
    payment in a hundred has to wait for it (Celery 5.7).
    """

    def adjust(self, n: float, drift: float = 0.0) -> float:
        """How long to sleep if the next task is due in `n` seconds."""
        return n + drift
