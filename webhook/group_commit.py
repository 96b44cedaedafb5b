"""Deliveries that come at once are made safe at once: one commit, one round to the disk, for all of them.

What is to be done about them then is done in another thread: their senders need not wait for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from tasks.batching import DrainLoop, MicroBatcher
from webhook.events import ParsedDelivery

log = logging.getLogger(__name__)

MAX_BATCH_SIZE = 100
"""Deliveries that are made safe in one transaction at most."""
MAX_CONCURRENT_COMMITS = 2
"""Transactions at a time: while one waits for the disk the next one is made up."""
BISECT_TIME_BUDGET_S = 15.0
"""After this long it is no use to try parts of a group apart: the provider waits for an answer for 20 s."""
FOLLOW_UP_CAPACITY = 1000
"""Groups that wait to be followed up at most; the sweep does what is beyond."""

T = TypeVar("T")
_PendingDelivery = tuple[ParsedDelivery, asyncio.Future[None]]


class GroupCommitter(Generic[T]):
    """Collects the deliveries of this process.

    `keep` makes some safe, or raises: one of `away` if it may be no fault of theirs, and then `answers` says whether
    the store is there nevertheless. `follow` is given what `keep` returned, while the senders are told.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[ParsedDelivery]], T],
        on_committed: Callable[[Sequence[T]], None],
        *,
        unavailable_errors: tuple[type[BaseException], ...] = (),
        is_available: Callable[[], bool] = lambda: False,
    ) -> None:
        self._commit = commit
        self._on_committed = on_committed
        self._follow_ups = MicroBatcher(
            self._follow_up, max_size=FOLLOW_UP_CAPACITY, capacity=FOLLOW_UP_CAPACITY, executor=self._run
        )
        self._unavailable_errors = unavailable_errors
        self._is_available = is_available
        self._pending: list[_PendingDelivery] = []
        self._free = MAX_CONCURRENT_COMMITS
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them but weakly
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_COMMITS + 1, "group-commit")

    async def commit(self, delivery: ParsedDelivery) -> None:
        """Return when it is safe. Raises what `keep` raised."""
        done = asyncio.get_running_loop().create_future()
        self._pending.append((delivery, done))
        if self._free:
            self._free -= 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await done

    def drain(self) -> None:
        """Follow up what is left when the loop has ended."""
        self._threads.shutdown(wait=True)

    async def _work(self) -> None:
        try:
            while self._pending:
                taken, self._pending = self._pending[:MAX_BATCH_SIZE], self._pending[MAX_BATCH_SIZE:]
                try:
                    await self._commit_or_bisect(taken, time.monotonic() + BISECT_TIME_BUDGET_S)
                except Exception as error:  # noqa: BLE001 - whatever it is, they are told
                    _complete(taken, error)
        finally:  # at once when nothing waits: what comes a moment later must find a free hand
            self._free += 1

    async def _commit_or_bisect(self, taken: Sequence[_PendingDelivery], until: float) -> None:
        """Keep them together; if that cannot be done, keep apart what can be kept, and tell the others."""
        error = await self._try([delivery for delivery, _ in taken])
        if error is None or not await self._is_data_error(error, until):
            _complete(taken, error)
        elif len(taken) > 1:
            half = len(taken) // 2
            await self._commit_or_bisect(taken[:half], until)
            await self._commit_or_bisect(taken[half:], until)
        else:
            _complete(taken, await self._commit_events_separately(taken[0][0], error, until))

    async def _commit_events_separately(
        self, delivery: ParsedDelivery, error: Exception, until: float
    ) -> Exception | None:
        """Keep event by event what could not be kept at once: none must spoil those that came with it."""
        parts = delivery.split_by_event()
        failed = error if len(parts) < 2 else None  # noqa: PLR2004 - of one there are no others
        for one in parts if failed is None else ():
            if time.monotonic() > until:
                return error
            failed = await self._try([one]) or failed
        return failed

    async def _try(self, deliveries: Sequence[ParsedDelivery]) -> Exception | None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._keep_now, deliveries)
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            return error
        return None

    def _keep_now(self, deliveries: Sequence[ParsedDelivery]) -> None:
        self._follow_ups.add(self._commit(deliveries))

    async def _is_data_error(self, error: Exception, until: float) -> bool:
        """Whether it is one of the deliveries that cannot be kept, and there is time to find out which."""
        if time.monotonic() > until:
            return False
        if not isinstance(error, self._unavailable_errors):
            return True
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._is_available)

    def _run(self, go: DrainLoop) -> None:
        try:
            self._threads.submit(go)
        except RuntimeError:  # the process ends: it is done here and now
            go()

    def _follow_up(self, left: Sequence[T]) -> None:
        try:
            self._on_committed(left)
        except Exception as error:  # noqa: BLE001 - it is safe, and the sweep sees to what was not done
            log.warning("what came is safe, and is left to the sweep: %s", type(error).__name__)


def _complete(taken: Sequence[_PendingDelivery], error: Exception | None) -> None:
    for _, done in taken:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
