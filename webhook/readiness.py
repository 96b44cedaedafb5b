"""Is the process ready? Anybody may ask, as often as they like: it costs one check a second, for all of them."""

import asyncio
import time
from collections.abc import Callable

CHECK_INTERVAL_S = 1.0
"""From the beginning of one check to that of the next."""


class Readiness:
    """One check at a time, in a thread; who asks while it runs, or soon after, shares its answer."""

    def __init__(self, check: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._check = check
        self._clock = clock
        self._began_at = float("-inf")
        self._answer: asyncio.Future[bool] | None = None

    async def __call__(self) -> bool:
        """Whether the last check said so. Raises what it raised."""
        now = self._clock()
        if self._answer is None or (self._answer.done() and now - self._began_at >= CHECK_INTERVAL_S):
            self._began_at = now
            self._answer = asyncio.get_running_loop().run_in_executor(None, self._check)
        return await asyncio.shield(self._answer)  # one who leaves does not take the answer from the others
