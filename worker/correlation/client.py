"""What the stores in Redis have in common: the client, scripts, and times as whole microseconds."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, cast

from redis import Redis, RedisError

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


def script(redis: Redis, name: str) -> Callable[[list[str], list[Any]], Any]:
    """The operation in `name.lua`; it takes the keys and the arguments."""
    source = files(__package__).joinpath(f"{name}.lua").read_text()
    return cast(Callable[[list[str], list[Any]], Any], redis.register_script(source))


def microseconds(duration: timedelta) -> int:
    """A duration as exact as the ledger has it, and still a whole number to Lua."""
    return duration // timedelta(microseconds=1)


def since_epoch(at: datetime) -> int:
    """A time in the same unit: the stores and the ledger must not disagree on what is fresh."""
    return microseconds(at - EPOCH)


def at_epoch(text: str) -> datetime:
    """A time from what a script returned."""
    return EPOCH + timedelta(microseconds=int(text))
