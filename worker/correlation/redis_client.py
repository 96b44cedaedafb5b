"""What the stores in Redis share: the client, Lua scripts, and times as whole microseconds."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, TypeVar, cast

from redis import Redis, RedisError
from redis.exceptions import NoScriptError

from config.log_config import get_logger
from worker.errors import error_summary

REDIS_UNAVAILABLE = (RedisError,)
"""Raised when Redis cannot be reached or does not respond in time."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
T = TypeVar("T")
RedisCommand = tuple[Any, ...]
"""A command of Redis: its name and its arguments."""

log = get_logger(__name__)


def create_client(url: str) -> Redis:
    """Return a client for a Redis address. It connects at its first use."""
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=5,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=15,
    )


class RedisServer:
    """The Redis server itself: its state and its clock. The operations raise `REDIS_UNAVAILABLE`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def info(self) -> Mapping[str, Any]:
        """Return the fields of the server's INFO."""
        return cast(Mapping[str, Any], self._redis.info())

    def memory_used_ratio(self) -> float:
        """Return the used share (0 to 1) of the server's `maxmemory`, or 0 if it has no limit."""
        info = self.info()
        limit = int(info.get("maxmemory", 0))
        return int(info.get("used_memory", 0)) / limit if limit else 0.0

    def time(self) -> datetime:
        """Return the time of the server's clock."""
        seconds, microseconds = self._redis.time()
        return EPOCH + timedelta(seconds=seconds, microseconds=microseconds)


class LuaScript:
    """The Lua script `name.lua` of this package. Calling it raises `REDIS_UNAVAILABLE`."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._source = files(__package__).joinpath(f"{name}.lua").read_text()
        self._digest = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: list[str], arguments: list[Any]) -> Any:
        """Run the script once."""
        return self.run_many([(keys, arguments)])[0]

    def run_many(self, calls: Sequence[tuple[list[str], list[Any]]], then: Sequence[RedisCommand] = ()) -> list[Any]:
        """Run the script several times, in this order, and then other commands, in one round trip.

        A call is its keys and arguments. Return the replies of the calls.
        """
        try:
            return self._evaluate(calls, then)
        except NoScriptError:  # Redis was restarted or flushed, and lost its scripts
            self._redis.script_load(self._source)
            return self._evaluate(calls, then)

    def _evaluate(self, calls: Sequence[tuple[list[str], list[Any]]], then: Sequence[RedisCommand]) -> list[Any]:
        if len(calls) == 1 and not then:
            [(keys, arguments)] = calls
            return [self._redis.evalsha(self._digest, len(keys), *keys, *arguments)]
        with self._redis.pipeline(transaction=False) as pipeline:
            for keys, arguments in calls:
                pipeline.evalsha(self._digest, len(keys), *keys, *arguments)
            for command in then:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py does not type it
            return pipeline.execute()[: len(calls)]


def duration_us(duration: timedelta) -> int:
    """Return a duration in microseconds: the resolution of the ledger, and an exact integer in Lua."""
    return duration // timedelta(microseconds=1)


def epoch_us(at: datetime) -> int:
    """Return a time in microseconds since the epoch, so that Redis and the ledger agree on what is fresh."""
    return duration_us(at - EPOCH)


def from_epoch_us(text: str) -> datetime:
    """Return the time that a script returned in microseconds since the epoch."""
    return EPOCH + timedelta(microseconds=int(text))


def best_effort(operation: str, run: Callable[..., T], *args: Any) -> T | None:
    """Run an operation on Redis, and return its result. If Redis is unavailable, log `operation` and return None.

    Losing the operation must cost only speed. `run` does nothing but the operation.
    """
    try:
        return run(*args)
    except REDIS_UNAVAILABLE as error:
        log.warning("redis.unavailable", operation=operation, error=error_summary(error))
        return None
