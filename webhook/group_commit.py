"""Group commit for webhook deliveries: concurrent deliveries share one transaction.

The follow-up actions run in the thread of the commit, after it. The responses do not wait for them.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from config.log_config import get_logger
from tasks.batching import MicroBatcher
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
    commits, in the thread of one of them.
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
        self._follow_ups = MicroBatcher(self._follow_up, max_size=FOLLOW_UP_CAPACITY, capacity=FOLLOW_UP_CAPACITY)
        self._unavailable_errors = unavailable_errors
        self._is_available = is_available
        self._pending: list[PendingDelivery] = []
        self._free_committers = MAX_CONCURRENT_COMMITS
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop has weak references only
        # One thread more than commits: follow-ups of all commits run in one thread at a time.
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
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[Exception | None] = loop.create_future()
        self._threads.submit(self._commit_then_follow_up, deliveries, finished, loop)
        return await finished

    def _commit_then_follow_up(
        self,
        deliveries: Sequence[ParsedDelivery],
        finished: asyncio.Future[Exception | None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Commit, finish the future, and then run the follow-up, unless another thread runs follow-ups."""
        error, follow_ups = None, []
        try:
            follow_ups = [self._commit(deliveries)]
        except Exception as commit_error:  # noqa: BLE001 - the caller decides which deliveries fail
            error = commit_error
        except BaseException as panic:  # noqa: BLE001 - of a library in Rust. Without a result the committer is lost
            error = RuntimeError(f"the commit ended with {type(panic).__name__}")
        with contextlib.suppress(RuntimeError):  # the loop has ended: the process ends
            loop.call_soon_threadsafe(_set_result_unless_done, finished, error)
        self._follow_ups.add_up_to_capacity(*follow_ups)

    async def _should_bisect_after_ping(self, error: Exception, until: float) -> bool:
        """Return whether a delivery caused the error, and there is time to find it."""
        if time.monotonic() > until:
            return False
        if not isinstance(error, self._unavailable_errors):
            return True
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._is_available)

    def _follow_up(self, follow_ups: Sequence[FollowUp]) -> None:
        try:
            self._on_committed(follow_ups)
        except Exception as error:  # noqa: BLE001 - the data is committed, so the sweep repeats the follow-up
            log.warning("webhook.follow_up_failed", recovery="sweep", error=type(error).__name__)


def _set_result_unless_done(future: asyncio.Future[Exception | None], error: Exception | None) -> None:
    if not future.done():  # it is cancelled when the loop ends
        future.set_result(error)


def _complete(batch: Sequence[PendingDelivery], error: Exception | None) -> None:
    for pending in batch:
        if pending.committed.done():
            continue
        if error is None:
            pending.committed.set_result(None)
        else:
            pending.committed.set_exception(error)
