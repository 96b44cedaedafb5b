"""Deliveries that come at once are made safe at once: one commit, one round to the disk, for all of them."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from anyio import to_thread

from webhook.events import Delivery

Left = TypeVar("Left")
TOGETHER = 100
"""Deliveries that are made safe in one transaction at most."""
HANDS = 2
"""Transactions at a time: while one waits for the disk the next one is made up."""


class Keeper(Generic[Left]):
    """Collects the deliveries of this process.

    `keep` makes some safe, and raises if it cannot: one of `away` if that is no fault of theirs. When their senders
    have their answers, `go_on` is given what it returned.
    """

    def __init__(
        self,
        keep: Callable[[Sequence[Delivery]], Left],
        go_on: Callable[[Left], None],
        away: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._keep, self._go_on = keep, go_on
        self._away = away
        self._waiting: list[tuple[Delivery, asyncio.Future[None]]] = []
        self._free = HANDS
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them but weakly

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

    async def _work(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
                await self._make_safe(taken)
        finally:  # at once when nothing waits: what comes a moment later must find a free hand
            self._free += 1

    async def _make_safe(self, taken: list[tuple[Delivery, asyncio.Future[None]]]) -> None:
        try:
            left = await to_thread.run_sync(self._keep, [delivery for delivery, _ in taken])
        except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
            if len(taken) > 1 and not isinstance(error, self._away):
                for one in taken:  # one of them may be the reason, and must not spoil the others
                    await self._make_safe([one])
                return
            for _, done in taken:
                if not done.done():
                    done.set_exception(error)
        else:
            for _, done in taken:
                if not done.done():
                    done.set_result(None)
            await to_thread.run_sync(self._go_on, left)
