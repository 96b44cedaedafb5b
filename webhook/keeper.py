"""Deliveries that come at once are made safe at once: one commit, one round to the disk, for all of them.

What is to be done about them then is done in another thread: their senders need not wait for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from tasks.gathering import Gatherer, Go
from webhook.events import Delivery

log = logging.getLogger(__name__)

TOGETHER = 100
"""Deliveries that are made safe in one transaction at most."""
HANDS = 2
"""Transactions at a time: while one waits for the disk the next one is made up."""
PATIENCE_S = 15.0
"""After this long it is no use to try parts of a group apart: the provider waits for an answer for 20 s."""
LEFT = 1000
"""Groups that wait to be followed up at most; the sweep does what is beyond."""

T = TypeVar("T")
_Waiting = tuple[Delivery, asyncio.Future[None]]


class Keeper(Generic[T]):
    """Collects the deliveries of this process.

    `keep` makes some safe, or raises: one of `away` if it may be no fault of theirs, and then `answers` says whether
    the store is there nevertheless. `follow` is given what `keep` returned, while the senders are told.
    """

    def __init__(
        self,
        keep: Callable[[Sequence[Delivery]], T],
        follow: Callable[[Sequence[T]], None],
        *,
        away: tuple[type[BaseException], ...] = (),
        answers: Callable[[], bool] = lambda: False,
    ) -> None:
        self._keep = keep
        self._follow = follow
        self._following = Gatherer(self._follow_up, limit=LEFT, room=LEFT, run=self._run)
        self._away = away
        self._answers = answers
        self._waiting: list[_Waiting] = []
        self._free = HANDS
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them but weakly
        self._threads = ThreadPoolExecutor(HANDS + 1, "keeper")

    async def keep(self, delivery: Delivery) -> None:
        """Return when it is safe. Raises what `keep` raised."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((delivery, done))
        if self._free:
            self._free -= 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await done

    def finish(self) -> None:
        """Follow up what is left when the loop has ended."""
        self._threads.shutdown(wait=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
                try:
                    await self._make_safe(taken, time.monotonic() + PATIENCE_S)
                except Exception as error:  # noqa: BLE001 - whatever it is, they are told
                    _tell(taken, error)
        finally:  # at once when nothing waits: what comes a moment later must find a free hand
            self._free += 1

    async def _make_safe(self, taken: Sequence[_Waiting], until: float) -> None:
        """Keep them together; if that cannot be done, keep apart what can be kept, and tell the others."""
        error = await self._try([delivery for delivery, _ in taken])
        if error is None or not await self._is_theirs(error, until):
            _tell(taken, error)
        elif len(taken) > 1:
            half = len(taken) // 2
            await self._make_safe(taken[:half], until)
            await self._make_safe(taken[half:], until)
        else:
            _tell(taken, await self._keep_apart(taken[0][0], error, until))

    async def _keep_apart(self, delivery: Delivery, error: Exception, until: float) -> Exception | None:
        """Keep event by event what could not be kept at once: none must spoil those that came with it."""
        parts = delivery.apart()
        failed = error if len(parts) < 2 else None  # noqa: PLR2004 - of one there are no others
        for one in parts if failed is None else ():
            if time.monotonic() > until:
                return error
            failed = await self._try([one]) or failed
        return failed

    async def _try(self, deliveries: Sequence[Delivery]) -> Exception | None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._keep_now, deliveries)
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            return error
        return None

    def _keep_now(self, deliveries: Sequence[Delivery]) -> None:
        self._following.add(self._keep(deliveries))

    async def _is_theirs(self, error: Exception, until: float) -> bool:
        """Whether it is one of the deliveries that cannot be kept, and there is time to find out which."""
        if time.monotonic() > until:
            return False
        if not isinstance(error, self._away):
            return True
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._answers)

    def _run(self, go: Go) -> None:
        try:
            self._threads.submit(go)
        except RuntimeError:  # the process ends: it is done here and now
            go()

    def _follow_up(self, left: Sequence[T]) -> None:
        try:
            self._follow(left)
        except Exception as error:  # noqa: BLE001 - it is safe, and the sweep sees to what was not done
            log.warning("what came is safe, and is left to the sweep: %s", type(error).__name__)


def _tell(taken: Sequence[_Waiting], error: Exception | None) -> None:
    for _, done in taken:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
