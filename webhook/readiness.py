"""Readiness check with a shared result: it costs one check per second, however often it is requested."""

import asyncio
import time
from collections.abc import Callable

CHECK_INTERVAL_S = 1.0
"""Minimum time between the starts of two checks."""


class SharedReadinessCheck:
    """One check at a time, in a thread. Requests during a check, or soon after it, share its result."""

    def __init__(self, find_problem: Callable[[], str | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._find_problem = find_problem
        self._clock = clock
        self._started_at = float("-inf")
        self._result: asyncio.Future[str | None] | None = None

    async def find_problem(self) -> str | None:
        """Return why the process is not ready, by the last check. Return None if it is ready."""
        now = self._clock()
        if self._result is None or (self._result.done() and now - self._started_at >= CHECK_INTERVAL_S):
            self._started_at = now
            self._result = asyncio.get_running_loop().run_in_executor(None, self._find_problem)
        return await asyncio.shield(self._result)  # a cancelled request must not cancel the check of the others
