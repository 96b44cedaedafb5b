"""Consumer that is killed repeatedly: `python -m tests.support.killed_consumer URL QUEUE KILLS`.

It fetches messages, counts each in the hash `seen`, adds those that were delivered before to the set `redelivered`, and
acknowledges them. The parent process kills it with SIGKILL at random times, KILLS times, and starts it again.
"""

import os
import random
import signal
import sys
import time

from redis import Redis

from tasks.message_source import MessageSource
from tasks.redis_source import RedisSource

VISIBILITY_TIMEOUT_S = 0.3
"""So short that the next consumers fetch messages of killed ones."""
BATCH_SIZE = 20


def consume(redis: Redis, source: MessageSource) -> None:
    """Consume messages until the process is killed."""
    while True:
        for message in source.fetch(BATCH_SIZE, 1):
            with redis.pipeline() as pipeline:
                pipeline.hincrby("seen", message.text.decode(), 1)
                if message.deliveries > 1:
                    pipeline.sadd("redelivered", message.text)
                pipeline.execute()
            source.acknowledge([message.tag])


def main() -> None:
    """Start and kill consumers, as the parent process."""
    url, queue, kills = sys.argv[1:]
    for _ in range(int(kills)):
        if child := os.fork():
            time.sleep(random.uniform(0.05, 0.15))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        else:
            source = RedisSource(url, queue, lists=[queue], key_prefix="", visibility_timeout_s=VISIBILITY_TIMEOUT_S)
            consume(Redis.from_url(url), source)


if __name__ == "__main__":
    main()
