"""Consumer that is killed repeatedly: `python -m tests.support.killed_consumer URL QUEUE TRANSPORT KILLS`.

It adds the number in each message to the set `consumed` and acknowledges the message. The parent process kills it with
SIGKILL at random times, KILLS times, and starts it again.
"""

import os
import random
import signal
import sys
import time
from typing import Any

from kombu import Connection, Consumer, Queue
from kombu.transport import TRANSPORT_ALIASES
from redis import Redis


def consume(url: str, queue: str) -> None:
    """Consume messages until the process is killed."""
    redis = Redis.from_url(url)
    with Connection(url, transport_options={"visibility_timeout": 3600}) as connection:
        channel = connection.default_channel

        def on_message(body: Any, message: Any) -> None:
            redis.sadd("consumed", body)
            message.ack()

        with Consumer(channel, [Queue(queue)], callbacks=[on_message]):
            while True:
                connection.drain_events()


def main() -> None:
    """Start and kill consumers, as the parent process."""
    url, queue, transport, kills = sys.argv[1:]
    TRANSPORT_ALIASES["redis"] = transport
    for _ in range(int(kills)):
        if child := os.fork():
            time.sleep(random.uniform(0.05, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        else:
            consume(url, queue)


if __name__ == "__main__":
    main()
