"""Micro-batching for worker threads.

Items that arrive while a batch is processed form the next batch. An item that arrives when the batcher is idle is
processed at once. Under load, batches start at most every `min_interval_s`: a batch of 50 costs about as much as a
batch of one.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from config.log_config import get_logger
from tasks.unavailability import traceback_of_unexpected
from worker.errors import error_summary

log = get_logger(__name__)
Item = TypeVar("Item")
DrainLoop = Callable[[], None]
"""Processes batches until no item waits."""


class MicroBatcher(Generic[Item]):
    """Calls `process` with up to `max_size` items, one batch at a time.

    A batch starts at least `min_interval_s` after the previous one, unless it is full. When `capacity` items are
    waiting, new items are dropped. `executor` runs the drain loop; the default runs it in the thread that adds the
    first item.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], None],
        *,
        max_size: int,
        min_interval_s: float = 0.0,
        capacity: int = sys.maxsize,
        executor: Callable[[DrainLoop], object] = lambda drain: drain(),
    ) -> None:
        self._process, self._executor = process, executor
        self._max_size, self._min_interval_s, self._capacity = max_size, min_interval_s, capacity
        self._started_at = float("-inf")
        self._lock = threading.Lock()
        self._batch_full = threading.Condition(self._lock)
        self._waiting: list[Item] = []
        self._is_running = False

    def add_up_to_capacity(self, *items: Item) -> None:
        """Add items to the next batch, but drop those beyond the capacity. Start the drain loop if it does not run."""
        with self._lock:
            self._waiting += items[: max(0, self._capacity - len(self._waiting))]
            if len(self._waiting) >= self._max_size:
                self._batch_full.notify()
            if self._is_running or not self._waiting:
                return
            self._is_running = True
        try:
            self._executor(self._drain_and_log_errors)
        except BaseException:
            with self._lock:
                self._is_running = False
            raise

    def _drain_and_log_errors(self) -> None:
        try:
            while batch := self._take_batch_after_interval_or_mark_idle():
                self._started_at = time.monotonic()
                try:
                    self._process(batch)
                except Exception as error:
                    log.error(
                        "batch.failed",
                        size=len(batch),
                        error=error_summary(error),
                        exc_info=traceback_of_unexpected(error),
                    )
        except BaseException:  # a normal end has reset the flag in _take_batch_after_interval_or_mark_idle
            with self._lock:
                self._is_running = False
            raise

    def _take_batch_after_interval_or_mark_idle(self) -> list[Item]:
        """Wait until a batch may start, and return its items. Without items mark the batcher idle."""
        with self._lock:
            wait_s = self._started_at + self._min_interval_s - time.monotonic()
            if self._waiting and wait_s > 0:
                self._batch_full.wait_for(lambda: len(self._waiting) >= self._max_size, wait_s)
            batch, self._waiting = self._waiting[: self._max_size], self._waiting[self._max_size :]
            self._is_running = bool(batch)
            return batch


def start_after(delay_s: float) -> Callable[[DrainLoop], object]:
    """Return an executor that starts the loop `delay_s` seconds after the first item.

    The loop runs in a non-daemon thread, so the process does not exit before the loop has ended.
    """

    def execute(drain: DrainLoop) -> None:
        threading.Timer(delay_s, drain).start()

    return execute
