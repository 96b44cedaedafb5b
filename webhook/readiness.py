"""Readiness check with a shared result: it costs one check per second, however often it is requested."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

CHECK_INTERVAL_S = 1.0
"""Minimum time between the starts of two checks."""
TIME_LIMIT_S = 4.0
"""Time from the start of a check after which the process is not ready. Kubernetes waits for 5 s for a response.

A check may take longer: behind a pooler its statement has no timeout, and waits for a free server connection.
"""
NO_RESULT = "the database does not respond"


class SharedReadinessCheck:
    """One check at a time, in a thread. Requests during a check, or soon after it, share its result."""

    def __init__(
        self,
        find_problem: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        self._find_problem = find_problem
        self._clock = clock
        self._time_limit_s = time_limit_s
        self._started_at = float("-inf")
        self._result: Future[str | None] | None = None

    async def find_problem(self) -> str | None:
        """Return why the process is not ready, by the last check or because it takes too long. None if it is ready."""
        now = self._clock()
        if self._result is None or (self._result.done() and now - self._started_at >= CHECK_INTERVAL_S):
            self._started_at = now
            self._result = self._start_check()
        time_left_s = max(0.0, self._started_at + self._time_limit_s - now)
        finished, _ = await asyncio.wait([asyncio.wrap_future(self._result)], timeout=time_left_s)
        return finished.pop().result() if finished else NO_RESULT

    def _start_check(self) -> Future[str | None]:
        """Start a check in a thread that does not delay the end of the process."""
        result = Future[str | None]()
        threading.Thread(target=self._run_check, args=(result,), name="readiness", daemon=True).start()
        return result

    def _run_check(self, result: Future[str | None]) -> None:
        result.set_running_or_notify_cancel()  # a request that is cancelled cannot cancel the check of the others
        try:
            result.set_result(self._find_problem())
        except Exception as error:  # noqa: BLE001 - the requests raise it
            result.set_exception(error)
