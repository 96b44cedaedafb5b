"""HTTP load generator: many requests over a few connections, with little client CPU.

Requests are prepared bytes. Responses are distinguished by status only and must not have a body.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import uvloop

SEND_TICK_S = 0.001


class _Connection(asyncio.Protocol):
    """Connection for one request at a time. It passes the start of each response to `done`."""

    def __init__(self, done: Callable[["_Connection", bytes], None]) -> None:
        self._done = done
        self.transport: asyncio.WriteTransport
        self.sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._done(self, data)

    def send(self, request: bytes, at: float) -> None:
        """Send a request that was due at `at`."""
        self.sent_at = at
        self.transport.write(request)


class LoadResult:
    """Responses of one run by status, and the duration of each."""

    def __init__(self) -> None:
        self.statuses: Counter[bytes] = Counter()
        self.took_s: list[float] = []
        self.seconds = 0.0

    def per_second(self, status: bytes = b"204") -> float:
        """Return the responses with this status per second."""
        return self.statuses[status] / self.seconds

    def p99_ms(self) -> float:
        """Return the 99th percentile of the durations."""
        return sorted(self.took_s)[len(self.took_s) * 99 // 100] * 1000


def closed_loop(port: int, requests: Sequence[bytes], *, connections: int, seconds: float) -> LoadResult:
    """Run a closed loop: each connection sends its next request after the response to the previous one."""
    return uvloop.run(_closed_loop(port, requests, connections, seconds))


async def _closed_loop(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> LoadResult:
    result, clock = LoadResult(), time.perf_counter
    request_source = _cycle_requests(requests)
    end = clock() + seconds
    finished = asyncio.get_running_loop().create_future()
    busy = connections

    def done(connection: _Connection, answer: bytes) -> None:
        nonlocal busy
        result.statuses[answer[9:12]] += 1
        now = clock()
        if now < end and (request := next(request_source, None)) is not None:
            connection.send(request, now)
            return
        busy -= 1
        if not busy:
            finished.set_result(None)

    links = await _connect(port, connections, done)
    started_at = clock()
    for opened in links:
        opened.send(next(request_source), started_at)
    await finished
    result.seconds = clock() - started_at
    _close(links)
    return result


def open_loop(port: int, requests: Sequence[bytes], *, rate: float, connections: int, seconds: float) -> LoadResult:
    """Run an open loop: Poisson arrivals, `rate` per second on average, independent of responses."""
    return uvloop.run(_open_loop(port, requests, rate, connections, seconds))


async def _open_loop(port: int, requests: Sequence[bytes], rate: float, connections: int, seconds: float) -> LoadResult:
    result, clock = LoadResult(), time.perf_counter
    request_source, rng = _cycle_requests(requests), random.Random(1)  # noqa: S311 - not used for security
    waiting: deque[float] = deque()
    over = asyncio.Event()

    def done(connection: _Connection, answer: bytes) -> None:
        result.statuses[answer[9:12]] += 1
        result.took_s.append(clock() - connection.sent_at)
        if waiting:
            connection.send(next(request_source), waiting.popleft())
        else:
            idle.append(connection)
            if clock() > end and len(idle) == connections:
                over.set()

    idle = links = await _connect(port, connections, done)
    links = list(links)
    started_at = clock()
    end = started_at + seconds
    due = started_at + rng.expovariate(rate)
    while (now := clock()) < end:
        while due <= now:
            due += rng.expovariate(rate)
            if idle:
                idle.pop().send(next(request_source), now)
            else:
                waiting.append(now)
        await asyncio.sleep(SEND_TICK_S)
    if len(idle) < connections:
        await over.wait()
    result.seconds = clock() - started_at
    _close(links)
    return result


def _cycle_requests(requests: Sequence[bytes]) -> Iterator[bytes]:
    """Repeat a single request forever; send each of several requests once."""
    return iter(requests) if len(requests) > 1 else iter(lambda: requests[0], None)


async def _connect(port: int, count: int, done: Callable[[_Connection, bytes], None]) -> list[_Connection]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(lambda: _Connection(done), "127.0.0.1", port))[1] for _ in range(count)]


def _close(links: Sequence[_Connection]) -> None:
    for opened in links:
        opened.transport.close()
