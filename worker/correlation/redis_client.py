"""What the stores in Redis share: the clients, Lua scripts, and times as whole microseconds."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, TypeVar, cast

from redis import Redis, RedisCluster, RedisError
from redis.backoff import ExponentialWithJitterBackoff
from redis.cluster import ClusterNode
from redis.exceptions import NoScriptError, RedisClusterException
from redis.retry import Retry
from redis.sentinel import Sentinel

from config.log_config import get_logger
from config.redis_addresses import RedisAddress, parse_redis_address
from worker.errors import error_summary

REDIS_UNAVAILABLE = (RedisError, RedisClusterException)
"""Raised when Redis cannot be reached or does not respond in time."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
T = TypeVar("T")
RedisCommand = tuple[Any, ...]
"""A command of Redis: its name and its arguments."""

log = get_logger(__name__)


class _LazyCluster:
    """The client of a cluster. It connects at its first use: redis-py's own connects when it is made."""

    def __init__(self, address: RedisAddress, options: Mapping[str, Any]) -> None:
        self._address, self._options = address, options

    @functools.cached_property
    def cluster(self) -> RedisCluster:
        """The connected client. Raise `REDIS_UNAVAILABLE` if no node responds."""
        # A node that does not respond is asked again while the cluster replaces it. A payment does not wait for that.
        retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=3)
        nodes = [cast(Any, ClusterNode)(host.name, host.port) for host in self._address.hosts]
        return RedisCluster(startup_nodes=nodes, **{**self._options, "retry": retry})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if "cluster" in self.__dict__:
            self.cluster.close()


def create_client(url: str) -> Redis:
    """Return a client of the correlation store for a Redis address. It connects at its first use."""
    return open_redis(url, decode_responses=True, health_check_interval=15)


def open_redis(url: str, **options: Any) -> Redis:
    """Return a client for a Redis address, with redis-py's options. It connects at its first use.

    With Sentinels each new connection goes to the server that they name as master. For a cluster the client is
    redis-py's `RedisCluster`, which has the same commands.
    """
    address = parse_redis_address(url)
    chosen = {"socket_timeout": 5, "socket_connect_timeout": 5, "retry": None, **options}
    chosen |= {**address.credentials.as_options, **address.tls_options}
    if address.kind == "socket":
        return Redis(unix_socket_path=address.path, db=address.database, **chosen)
    chosen["socket_keepalive"] = True
    if address.kind == "cluster":
        return cast(Redis, _LazyCluster(address, chosen))
    if address.kind == "sentinel":
        sentinel_options = address.sentinel_options(timeout_s=chosen["socket_connect_timeout"])
        sentinel = cast(Any, Sentinel)(address.host_ports, sentinel_kwargs=sentinel_options)
        return cast(Redis, sentinel.master_for(address.master_name, db=address.database, **chosen))
    [host] = address.hosts
    return Redis(host=host.name, port=host.port, db=address.database, **chosen)


class RedisServer:
    """The Redis server itself: its state and its clock. The operations raise `REDIS_UNAVAILABLE`.

    Of a cluster, this is the primary with the largest used share of its memory.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def info(self) -> Mapping[str, Any]:
        """Return the fields of the server's INFO."""
        if isinstance(self._redis, _LazyCluster):
            infos = self._redis.info(target_nodes=RedisCluster.PRIMARIES)
            return max(infos.values(), key=_memory_used_ratio)
        return cast(Mapping[str, Any], self._redis.info())

    def memory_used_ratio(self) -> float:
        """Return the used share (0 to 1) of the server's `maxmemory`, or 0 if it has no limit."""
        return _memory_used_ratio(self.info())

    def time(self) -> datetime:
        """Return the time of the server's clock."""
        seconds, microseconds = self._redis.time()
        return EPOCH + timedelta(seconds=seconds, microseconds=microseconds)


def _memory_used_ratio(info: Mapping[str, Any]) -> float:
    limit = int(info.get("maxmemory", 0))
    return int(info.get("used_memory", 0)) / limit if limit else 0.0


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
                # The method `evalsha` is refused by redis-py's pipeline of a cluster, although the command works.
                pipeline.execute_command("EVALSHA", self._digest, len(keys), *keys, *arguments)  # type: ignore[no-untyped-call]  # redis-py does not type it
            for command in then:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
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
