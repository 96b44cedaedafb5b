"""The correlation store: for each account the refresh in flight, the next one, and the newest REFRESH balance.

Who waits is not in here: the ledger knows it, and a second list could only disagree. What is here decides who
shares a call and who leads one, in one atomic step, without a lock in SQL. Losing all of it costs speed: a
refresh is claimed in the ledger, which refuses a second call in flight, and `restore` brings back what it knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any, Literal, Self, cast

from redis import Redis, RedisError

CORRELATION_AWAY = (RedisError,)
"""What is raised when Redis cannot be reached, or does not answer in time."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME_TO_LIVE_S = 2 * 3600
"""Of an account's key, from its last use; longer than any refresh is in flight."""


@dataclass(frozen=True)
class Standing:
    """What a payment found when it joined its account.

    `known`: the balance `id` is fresh enough already. `joined`: the refresh `id` will serve it.
    `lead`: nothing will; the caller must have the refresh `id` called.
    """

    kind: Literal["known", "joined", "lead"]
    id: str


def _us(at: datetime) -> int:
    # As exact as the ledger, or the two would disagree on what is fresh; and still a whole number to Lua.
    return (at - EPOCH) // timedelta(microseconds=1)


class Correlation:
    """The store's operations; each is one Lua script, which documents the keys. Raises `CORRELATION_AWAY`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._join = _script(redis, "join")
        self._depart = _script(redis, "depart")
        self._answer = _script(redis, "answer")
        self._close = _script(redis, "close")
        self._restore = _script(redis, "restore")

    @classmethod
    def at(cls, url: str) -> Self:
        """The store at a Redis address; nothing is connected yet."""
        return cls(
            Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=5,
                socket_connect_timeout=5,
                socket_keepalive=True,
                health_check_interval=15,
            )
        )

    def ping(self) -> None:
        """Ask Redis for an answer."""
        self._redis.ping()

    def join(self, account_id: str, lead: str, *, oldest_balance: datetime | None, oldest_call: datetime) -> Standing:
        """Find or begin what will serve a payment; `lead` is the id of the refresh it would lead."""
        oldest = "" if oldest_balance is None else _us(oldest_balance)
        kind, found = self._join([_key(account_id)], [oldest, _us(oldest_call), lead, TIME_TO_LIVE_S])
        return Standing(kind, found)

    def depart(self, account_id: str, refresh_id: str, now: datetime) -> None:
        """The refresh's call is about to go out."""
        self._depart([_key(account_id)], [refresh_id, _us(now), TIME_TO_LIVE_S])

    def answer(self, account_id: str, balance_id: str, at: datetime, skew: timedelta) -> None:
        """A REFRESH balance came. To be told before anyone is settled by it."""
        self._answer([_key(account_id)], [balance_id, _us(at), skew // timedelta(microseconds=1), TIME_TO_LIVE_S])

    def close(self, account_id: str, refresh_id: str) -> None:
        """Nothing more is expected of the refresh."""
        self._close([_key(account_id)], [refresh_id])

    def restore(self, account_id: str, flight: str | None, called_at: datetime | None, requested: str | None) -> None:
        """Take over what the ledger knows of the account's refreshes."""
        called = "" if called_at is None else _us(called_at)
        self._restore([_key(account_id)], [flight or "", called, requested or "", TIME_TO_LIVE_S])


def _key(account_id: str) -> str:
    return f"payready:{{{account_id}}}"  # the braces keep an account's keys on one node of a cluster


def _script(redis: Redis, name: str) -> Callable[[list[str], list[Any]], Any]:
    source = files(__package__).joinpath(f"{name}.lua").read_text()
    return cast(Callable[[list[str], list[Any]], Any], redis.register_script(source))
