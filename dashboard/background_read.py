"""Reads of the ledger in a thread, for figures that a busy ledger cannot give while a page waits."""

import threading
from collections.abc import Callable

from config.log_config import get_logger
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE

log = get_logger(__name__)
PAGE_WAIT_S = 0.06
"""How long a page waits for figures that are being read."""


class BackgroundRead:
    """One read at a time, in a thread that does not delay the end of the process. Threads share it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        """Why the last read failed: one of `DATABASE_UNAVAILABLE`. None if it did not fail, or has not ended."""

    def start(self, read: Callable[[], None]) -> None:
        """Start a read unless one is running."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self.failure = None
                self._thread = threading.Thread(target=self._run, args=(read,), name=self._name, daemon=True)
                self._thread.start()

    def wait_briefly(self) -> None:
        """Wait up to `PAGE_WAIT_S` for the end of the read that is running."""
        if self._thread is not None:
            self._thread.join(PAGE_WAIT_S)

    def _run(self, read: Callable[[], None]) -> None:
        try:
            read()
        except DATABASE_UNAVAILABLE as error:
            self.failure = error
            log.warning("dashboard.background_read_failed", read=self._name, error=error_summary(error))
