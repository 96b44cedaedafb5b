"""Work that is done together. Batches form by themselves: what comes while a round is at work is the next round.

Who comes alone is a round, and waits for nobody; when one comes soon after another, they wait a moment for more, as a
round costs nearly the same for many.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
Item = TypeVar("Item")
DrainLoop = Callable[[], None]


class MicroBatcher(Generic[Item]):
    """Gives `work` what was added, at most `limit` at a time, one round after the other.

    No round begins before `pace_s` after the one before it began, unless it is full. What comes when `room` items wait
    is dropped. `run` has the rounds run: by default whoever adds the first item goes on until nothing is left.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], None],
        *,
        max_size: int,
        min_interval_s: float = 0.0,
        capacity: int = sys.maxsize,
        executor: Callable[[DrainLoop], object] = lambda go: go(),
    ) -> None:
        self._work, self._limit, self._pace_s, self._room, self._run = (
            process,
            max_size,
            min_interval_s,
            capacity,
            executor,
        )
        self._began_at = float("-inf")
        self._lock = threading.Lock()
        self._full = threading.Condition(self._lock)
        self._waiting: list[Item] = []
        self._is_at_work = False

    def add(self, *items: Item) -> None:
        """Have these be part of the next round."""
        with self._lock:
            self._waiting += items[: max(0, self._room - len(self._waiting))]
            if len(self._waiting) >= self._limit:
                self._full.notify()
            if self._is_at_work or not self._waiting:
                return
            self._is_at_work = True
        try:
            self._run(self._drain)
        except BaseException:
            with self._lock:
                self._is_at_work = False
            raise

    def requeue_first(self, *items: Item) -> None:
        """Have these be the first of the next round, before those that came later. For `work` itself."""
        with self._lock:
            self._waiting[:0] = items

    def _drain(self) -> None:
        try:
            while taken := self._next_batch():
                self._began_at = time.monotonic()
                try:
                    self._work(taken)
                except Exception:
                    log.exception("%s items of work were not done", len(taken))
        except BaseException:  # the next item must find another thread; at a usual end that was said before
            with self._lock:
                self._is_at_work = False
            raise

    def _next_batch(self) -> list[Item]:
        with self._lock:
            early_s = self._began_at + self._pace_s - time.monotonic()
            if self._waiting and early_s > 0:
                self._full.wait_for(lambda: len(self._waiting) >= self._limit, early_s)
            taken, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            self._is_at_work = bool(taken)
            return taken


def start_after(delay_s: float) -> Callable[[DrainLoop], object]:
    """Let rounds begin so long after their first item, on a thread that a process waits for before it ends."""

    def run(go: DrainLoop) -> None:
        threading.Timer(delay_s, go).start()

    return run
