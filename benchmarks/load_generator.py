"""Many HTTP requests over a few connections, for as little of the client's time as Python allows.

A request is bytes that were made before. Answers are told apart by their status only, and must have no body.
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
    """One request at a time; tells `done` how its answer begins."""

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
    """Answers by status, and how long each took, of one run."""

    def __init__(self) -> None:
        self.statuses: Counter[bytes] = Counter()
        self.took_s: list[float] = []
        self.seconds = 0.0

    def per_second(self, status: bytes = b"204") -> float:
        """Answers of this status a second."""
        return self.statuses[status] / self.seconds

    def p99_ms(self) -> float:
        """The 99th percentile of the times."""
        return sorted(self.took_s)[len(self.took_s) * 99 // 100] * 1000


def closed_loop(port: int, requests: Sequence[bytes], *, connections: int, seconds: float) -> LoadResult:
    """As many requests as are answered: each connection sends its next one when its last was answered."""
    return uvloop.run(_closed_loop(port, requests, connections, seconds))


async def _closed_loop(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> LoadResult:
    volley, clock = LoadResult(), time.perf_counter
    supply = _cycle_requests(requests)
    end = clock() + seconds
    finished = asyncio.get_running_loop().create_future()
    busy = connections

    def done(connection: _Connection, answer: bytes) -> None:
        nonlocal busy
        volley.statuses[answer[9:12]] += 1
        now = clock()
        if now < end and (request := next(supply, None)) is not None:
            connection.send(request, now)
            return
        busy -= 1
        if not busy:
            finished.set_result(None)

    links = await _connect(port, connections, done)
    began = clock()
    for link in links:
        link.send(next(supply), began)
    await finished
    volley.seconds = clock() - began
    _close(links)
    return volley


def open_loop(port: int, requests: Sequence[bytes], *, rate: float, connections: int, seconds: float) -> LoadResult:
    """Requests that come by chance, `rate` a second on average, whether or not those before were answered."""
    return uvloop.run(_open_loop(port, requests, rate, connections, seconds))


async def _open_loop(port: int, requests: Sequence[bytes], rate: float, connections: int, seconds: float) -> LoadResult:
    volley, clock = LoadResult(), time.perf_counter
    supply, chance = _cycle_requests(requests), random.Random(1)  # noqa: S311 - chance hides nothing here
    waiting: deque[float] = deque()
    over = asyncio.Event()

    def done(connection: _Connection, answer: bytes) -> None:
        volley.statuses[answer[9:12]] += 1
        volley.took_s.append(clock() - connection.sent_at)
        if waiting:
            connection.send(next(supply), waiting.popleft())
        else:
            idle.append(connection)
            if clock() > end and len(idle) == connections:
                over.set()

    idle = links = await _connect(port, connections, done)
    links = list(links)
    began = clock()
    end = began + seconds
    due = began + chance.expovariate(rate)
    while (now := clock()) < end:
        while due <= now:
            due += chance.expovariate(rate)
            if idle:
                idle.pop().send(next(supply), now)
            else:
                waiting.append(now)
        await asyncio.sleep(SEND_TICK_S)
    if len(idle) < connections:
        await over.wait()
    volley.seconds = clock() - began
    _close(links)
    return volley


def _cycle_requests(requests: Sequence[bytes]) -> Iterator[bytes]:
    """One request is sent over and over; of many each is sent once."""
    return iter(requests) if len(requests) > 1 else iter(lambda: requests[0], None)


async def _connect(port: int, count: int, done: Callable[[_Connection, bytes], None]) -> list[_Connection]:
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(lambda: _Connection(done), "127.0.0.1", port))[1] for _ in range(count)]


def _close(links: Sequence[_Connection]) -> None:
    for link in links:
        link.transport.close()
