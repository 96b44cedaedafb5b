"""Work that is done together. Batches form by themselves: what comes while a round is at work is the next round.

When nothing else comes, one is a round, and waits for nobody.
"""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Go = Callable[[], None]


class Gatherer(Generic[Item]):
    """Gives `work` what was added, at most `limit` at a time, one round after the other.

    `run` has the rounds run: by default whoever adds the first item goes on until nothing is left.
    """

    def __init__(
        self, work: Callable[[list[Item]], None], *, limit: int, run: Callable[[Go], object] = lambda go: go()
    ) -> None:
        self._work, self._limit, self._run = work, limit, run
        self._lock = threading.Lock()
        self._waiting: list[Item] = []
        self._is_at_work = False

    def add(self, *items: Item) -> None:
        """Have these be part of the next round."""
        with self._lock:
            self._waiting += items
            if self._is_at_work or not self._waiting:
                return
            self._is_at_work = True
        try:
            self._run(self._go)
        except BaseException:
            with self._lock:
                self._is_at_work = False
            raise

    def _go(self) -> None:
        while taken := self._take():
            try:
                self._work(taken)
            except Exception:
                log.exception("%s items of work were not done", len(taken))

    def _take(self) -> list[Item]:
        with self._lock:
            taken, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            self._is_at_work = bool(taken)
            return taken


def after_a_while(pause_s: float) -> Callable[[Go], object]:
    """Let rounds begin so long after their first item, on a thread that a process waits for before it ends."""

    def run(go: Go) -> None:
        threading.Timer(pause_s, go).start()

    return run
