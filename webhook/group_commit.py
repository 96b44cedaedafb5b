"""Group commit for webhook deliveries: concurrent deliveries share one transaction.

The follow-up actions run in another thread after the commit, so the responses do not wait for them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from config.log_config import get_logger
from tasks.batching import DrainLoop, MicroBatcher
from webhook.events import ParsedDelivery
from worker.flow import FollowUp

log = get_logger(__name__)

MAX_BATCH_SIZE = 100
"""Maximum number of deliveries in one transaction."""
MAX_CONCURRENT_COMMITS = 2
"""Concurrent transactions: one is prepared while the other waits for the disk."""
BISECT_TIME_BUDGET_S = 15.0
"""Time after which a failing batch is not bisected any further: the provider waits 20 s for a response."""
FOLLOW_UP_CAPACITY = 1000
"""Maximum number of committed batches that wait for their follow-up. The sweep does the work of all others."""


@dataclass(frozen=True, kw_only=True)
class PendingDelivery:
    """A delivery that waits for its commit."""

    delivery: ParsedDelivery
    committed: asyncio.Future[None]
    """Done when the delivery is committed, or has the error of the commit."""


class GroupCommitter:
    """The deliveries of this process that wait for their commit.

    If `commit` raises one of `unavailable_errors` and `is_available()` is false, the whole batch fails. Otherwise the
    batch is bisected to find the delivery that cannot be stored. `on_committed` is called with the follow-ups of the
    commits, in another thread.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[ParsedDelivery]], FollowUp],
        on_committed: Callable[[Sequence[FollowUp]], None],
        *,
        unavailable_errors: tuple[type[BaseException], ...],
        is_available: Callable[[], bool],
    ) -> None:
        self._commit = commit
        self._on_committed = on_committed
        self._follow_ups = MicroBatcher(
            self._follow_up,
            max_size=FOLLOW_UP_CAPACITY,
            capacity=FOLLOW_UP_CAPACITY,
            executor=self._run_in_thread_or_inline,
        )
        self._unavailable_errors = unavailable_errors
        self._is_available = is_available
        self._pending: list[PendingDelivery] = []
        self._free_committers = MAX_CONCURRENT_COMMITS
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop has weak references only
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_COMMITS + 1, "group-commit")

    async def commit(self, delivery: ParsedDelivery) -> None:
        """Return when the delivery is committed. Raise the error of `commit` if it is not."""
        pending = PendingDelivery(delivery=delivery, committed=asyncio.get_running_loop().create_future())
        self._pending.append(pending)
        if self._free_committers:
            self._free_committers -= 1
            task = asyncio.create_task(self._commit_all_pending_then_free_committer())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await pending.committed

    def shut_down_after_follow_ups(self) -> None:
        """Accept no more work and wait for pending follow-ups, after the event loop has ended."""
        self._threads.shutdown(wait=True)

    async def _commit_all_pending_then_free_committer(self) -> None:
        """Commit batches until no delivery is pending. Then another commit may start."""
        try:
            while self._pending:
                batch, self._pending = self._pending[:MAX_BATCH_SIZE], self._pending[MAX_BATCH_SIZE:]
                try:
                    await self._commit_or_bisect_and_complete(batch, time.monotonic() + BISECT_TIME_BUDGET_S)
                except Exception as error:  # noqa: BLE001 - `commit` raises it for each delivery
                    _complete(batch, error)
        finally:  # no await since the last check of `_pending`: a later delivery finds a free committer
            self._free_committers += 1

    async def _commit_or_bisect_and_complete(self, batch: Sequence[PendingDelivery], until: float) -> None:
        """Commit a batch. If a delivery cannot be stored, commit the halves, and finally its single events."""
        error = await self._try_commit_in_thread([pending.delivery for pending in batch])
        if error is None or not await self._should_bisect_after_ping(error, until):
            _complete(batch, error)
        elif len(batch) > 1:
            half = len(batch) // 2
            await self._commit_or_bisect_and_complete(batch[:half], until)
            await self._commit_or_bisect_and_complete(batch[half:], until)
        else:
            _complete(batch, await self._commit_each_event_and_return_last_error(batch[0].delivery, error, until))

    async def _commit_each_event_and_return_last_error(
        self, delivery: ParsedDelivery, error: Exception, until: float
    ) -> Exception | None:
        """Commit each event of a delivery on its own. Return the last error, or None."""
        parts = delivery.split_storable_events()
        if len(parts) < 2:  # noqa: PLR2004 - a single event has failed already
            return error
        last_error: Exception | None = None
        for part in parts:
            if time.monotonic() > until:
                return error
            last_error = await self._try_commit_in_thread([part]) or last_error
        return last_error

    async def _try_commit_in_thread(self, deliveries: Sequence[ParsedDelivery]) -> Exception | None:
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._threads, self._commit_and_queue_follow_up, deliveries
            )
        except Exception as error:  # noqa: BLE001 - the caller decides which deliveries fail
            return error
        return None

    def _commit_and_queue_follow_up(self, deliveries: Sequence[ParsedDelivery]) -> None:
        self._follow_ups.add_up_to_capacity(self._commit(deliveries))

    async def _should_bisect_after_ping(self, error: Exception, until: float) -> bool:
        """Return whether a delivery caused the error, and there is time to find it."""
        if time.monotonic() > until:
            return False
        if not isinstance(error, self._unavailable_errors):
            return True
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._is_available)

    def _run_in_thread_or_inline(self, drain: DrainLoop) -> None:
        try:
            self._threads.submit(drain)
        except RuntimeError:  # the process ends and accepts no work any more: run in this thread
            drain()

    def _follow_up(self, follow_ups: Sequence[FollowUp]) -> None:
        try:
            self._on_committed(follow_ups)
        except Exception as error:  # noqa: BLE001 - the data is committed, so the sweep repeats the follow-up
            log.warning("webhook.follow_up_failed", recovery="sweep", error=type(error).__name__)


def _complete(batch: Sequence[PendingDelivery], error: Exception | None) -> None:
    for pending in batch:
        if pending.committed.done():
            continue
        if error is None:
            pending.committed.set_result(None)
        else:
            pending.committed.set_exception(error)
