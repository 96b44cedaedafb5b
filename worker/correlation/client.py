"""What the stores in Redis have in common: the client, scripts, and times as whole microseconds."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

from redis import Redis, RedisError
from redis.exceptions import NoScriptError

CORRELATION_AWAY = (RedisError,)
"""What is raised when Redis cannot be reached, or does not answer in time."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def connect(url: str) -> Redis:
    """A client for a Redis address; nothing is connected yet."""
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=5,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=15,
    )


class Script:
    """The operation in `name.lua`; it takes keys and arguments."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._source = files(__package__).joinpath(f"{name}.lua").read_text()
        self._digest = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: list[str], arguments: list[Any]) -> Any:
        """Do it; raises `CORRELATION_AWAY`."""
        return self.each([(keys, arguments)])[0]

    def each(self, calls: Sequence[tuple[list[str], list[Any]]]) -> list[Any]:
        """Do it several times, in this order, in one round trip."""
        try:
            return self._send(calls)
        except NoScriptError:  # Redis was restarted, or emptied: it knows none of its scripts
            self._redis.script_load(self._source)
            return self._send(calls)

    def _send(self, calls: Sequence[tuple[list[str], list[Any]]]) -> list[Any]:
        if len(calls) == 1:
            [(keys, arguments)] = calls
            return [self._redis.evalsha(self._digest, len(keys), *keys, *arguments)]
        with self._redis.pipeline(transaction=False) as pipeline:
            for keys, arguments in calls:
                pipeline.evalsha(self._digest, len(keys), *keys, *arguments)
            return pipeline.execute()


def microseconds(duration: timedelta) -> int:
    """A duration as exact as the ledger has it, and still a whole number to Lua."""
    return duration // timedelta(microseconds=1)


def since_epoch(at: datetime) -> int:
    """A time in the same unit: the stores and the ledger must not disagree on what is fresh."""
    return microseconds(at - EPOCH)


def at_epoch(text: str) -> datetime:
    """A time from what a script returned."""
    return EPOCH + timedelta(microseconds=int(text))
