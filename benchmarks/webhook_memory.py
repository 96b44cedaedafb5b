"""Memory over many deliveries, by the ASGI application itself: `python -m benchmarks.door_memory COUNT`.

Of ten deliveries seven are routine, one is a batch of 50, one forged, one not JSON. Those that are kept go through SQL
and Redis, which would take hours for a million of them; the process grows no more by them than by the others' threads.
"""

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.webhook_throughput import FORGED_SECRET, body
from tests.webhook.conftest import SECRET, sign
from webhook.endpoint import PATH, app

STEPS = 10


def _request(content: bytes, timestamp: str, secret: str = SECRET) -> tuple[dict[str, Any], dict[str, Any]]:
    headers = [
        (b"content-type", b"application/json"),
        (b"quiltt-timestamp", timestamp.encode()),
        (b"quiltt-signature", sign(content, timestamp, secret).encode()),
    ]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
    return scope, {"type": "http.request", "body": content, "more_body": False}


async def _handle_requests(requests: list[tuple[dict[str, Any], dict[str, Any]]], count: int) -> None:
    async def send(_: Any) -> None:
        pass

    for number in range(count):
        scope, message = requests[number % len(requests)]

        async def receive(message: dict[str, Any] = message) -> dict[str, Any]:
            return dict(message)

        await app(scope, receive, send)
        if number % 100 == 0:
            await asyncio.sleep(0)  # a server goes back to its loop, which clears away timers that were not needed


def _resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main(deliveries: int) -> None:
    """Say how much memory there was after each tenth of the deliveries."""
    logging.disable()  # nobody would read it
    grown = []
    for _ in range(STEPS):
        now = str(int(time.time()))
        routine = [_request(body(), now) for _ in range(700)]
        others = [_request(body(50), now) for _ in range(100)]
        others += [_request(body(), now, FORGED_SECRET) for _ in range(100)]
        others += [_request(body()[:-7], now) for _ in range(100)]
        uvloop.run(_handle_requests(routine + others, deliveries // STEPS))
        del routine, others
        grown.append(_resident_kib())
    sys.stdout.write(
        json.dumps({"deliveries": deliveries, "kib_after_each_tenth": grown, "grown_kib": grown[-1] - grown[1]})
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
