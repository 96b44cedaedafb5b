"""A consumer that is killed over and over: `python -m tests.support.eater URL QUEUE TRANSPORT KILLS`.

It takes messages from the queue, adds the number in each to the set `eaten`, and acknowledges it; its parent kills it
with SIGKILL at random moments, the given number of times, and starts it again.
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
    """Take messages until there is no more to come for a while."""
    eaten = Redis.from_url(url)
    with Connection(url, transport_options={"visibility_timeout": 3600}) as connection:
        channel = connection.default_channel

        def take(body: Any, message: Any) -> None:
            eaten.sadd("eaten", body)
            message.ack()

        with Consumer(channel, [Queue(queue)], callbacks=[take]):
            while True:
                connection.drain_events()


def main() -> None:
    """Be the parent."""
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
