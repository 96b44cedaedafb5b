"""Memory over many deliveries to the ASGI application: `python -m benchmarks.webhook_memory COUNT`.

Of ten deliveries seven are routine, one is a batch of 50, one is forged and one is not JSON. None of them is stored:
a million writes to SQL and Redis would take hours, and they add no more memory than the threads of the others.
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
from webhook.endpoint import app
from webhook.paths import PATH

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
            await asyncio.sleep(0)  # a server returns to its loop, which removes cancelled timers


def _resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


async def _resident_kib_by_tenth(deliveries: int) -> list[int]:
    """Handle the deliveries in one event loop, as a server does: each new loop takes some 300 KiB."""
    resident_kib = []
    for _ in range(STEPS):
        now = str(int(time.time()))
        routine = [_request(body(), now) for _ in range(700)]
        others = [_request(body(50), now) for _ in range(100)]
        others += [_request(body(), now, FORGED_SECRET) for _ in range(100)]
        others += [_request(body()[:-7], now) for _ in range(100)]
        await _handle_requests(routine + others, deliveries // STEPS)
        del routine, others
        resident_kib.append(_resident_kib())
    return resident_kib


def main(deliveries: int) -> None:
    """Print the resident memory after each tenth of the deliveries, as JSON."""
    logging.disable()  # the log is not needed
    resident_kib = uvloop.run(_resident_kib_by_tenth(deliveries))
    sys.stdout.write(
        json.dumps(
            {
                "deliveries": deliveries,
                "kib_after_each_tenth": resident_kib,
                "grown_kib": resident_kib[-1] - resident_kib[1],
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
