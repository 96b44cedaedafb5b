"""Readiness: at most one check per second, for any number of requests."""

import asyncio
import threading
import time

import pytest

from webhook.readiness import CHECK_INTERVAL_S, NO_RESULT, TIME_LIMIT_S, SharedReadinessCheck


def test_concurrent_requests_share_one_check_per_second() -> None:
    """One of them is cancelled before the result."""
    now, checks = [0.0], [0]

    def check() -> str | None:
        checks[0] += 1
        time.sleep(0.02)
        return None if checks[0] == 1 else "the database is unavailable"

    ready = SharedReadinessCheck(check, lambda: now[0])

    async def send_requests() -> None:
        cancelled = asyncio.create_task(ready.find_problem())
        others = [asyncio.create_task(ready.find_problem()) for _ in range(100)]
        await asyncio.sleep(0)
        cancelled.cancel()
        assert set(await asyncio.gather(*others)) == {None}
        now[0] = CHECK_INTERVAL_S - 0.01
        assert await ready.find_problem() is None
        assert checks == [1]
        now[0] = CHECK_INTERVAL_S
        assert set(await asyncio.gather(*(ready.find_problem() for _ in range(100)))) == {"the database is unavailable"}
        assert checks == [2]

    asyncio.run(send_requests())


def test_slow_check_is_not_started_twice() -> None:
    """A database that does not respond blocks one thread, not one per request."""
    now, checks = [0.0], [0]

    def check() -> str | None:
        checks[0] += 1
        time.sleep(0.05)
        raise ValueError

    ready = SharedReadinessCheck(check, lambda: now[0])

    async def send_requests() -> None:
        first = asyncio.create_task(ready.find_problem())
        await asyncio.sleep(0)
        now[0] = TIME_LIMIT_S - 1
        for request in (first, asyncio.create_task(ready.find_problem())):
            with pytest.raises(ValueError):
                await request
        assert checks == [1]

    asyncio.run(send_requests())


def test_check_that_hangs_is_a_problem_after_its_time_limit() -> None:
    """Later requests do not wait again. The next result counts, and a check that hangs does not delay the end."""
    now, released = [0.0], threading.Event()

    def check() -> str | None:
        released.wait()
        return None

    ready = SharedReadinessCheck(check, lambda: now[0], time_limit_s=0.2)

    async def send_requests() -> None:
        assert set(await asyncio.gather(*(ready.find_problem() for _ in range(2)))) == {NO_RESULT}
        now[0] = 100
        assert await asyncio.wait_for(ready.find_problem(), timeout=0.1) == NO_RESULT

    started_at = time.monotonic()
    asyncio.run(send_requests())
    assert time.monotonic() - started_at < 5
    released.set()
