"""The correlation store: for each account the refresh in flight, the next one, and the newest REFRESH balance.

Who waits is not in here: the ledger knows it, and a second list could only disagree. What is here decides who
shares a call and who leads one, in one atomic step, without a lock in SQL. Losing all of it costs speed: a
refresh is claimed in the ledger, which refuses a second call in flight, and `restore` brings back what it knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from redis import Redis

from worker.correlation.client import EPOCH, microseconds, script, since_epoch

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


class Correlation:
    """The store's operations; each is one Lua script, which documents the keys. Raises `CORRELATION_AWAY`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._join = script(redis, "join")
        self._depart = script(redis, "depart")
        self._answer = script(redis, "answer")
        self._close = script(redis, "close")
        self._restore = script(redis, "restore")

    def ping(self) -> None:
        """Ask Redis for an answer."""
        self._redis.ping()

    def facts(self) -> Mapping[str, Any]:
        """What the server says of itself: the fields of its INFO."""
        return cast(Mapping[str, Any], self._redis.info())

    def memory_used(self) -> float:
        """How much of its `maxmemory` the server uses, as a share of 1; 0 if it has no such limit."""
        facts = self.facts()
        limit = int(facts.get("maxmemory", 0))
        return int(facts.get("used_memory", 0)) / limit if limit else 0.0

    def clock(self) -> datetime:
        """What time it is to the server."""
        whole, rest = self._redis.time()
        return EPOCH + timedelta(seconds=whole, microseconds=rest)

    def join(self, account_id: str, lead: str, *, oldest_balance: datetime | None, oldest_call: datetime) -> Standing:
        """Find or begin what will serve a payment; `lead` is the id of the refresh it would lead."""
        oldest = "" if oldest_balance is None else since_epoch(oldest_balance)
        kind, found = self._join([_key(account_id)], [oldest, since_epoch(oldest_call), lead, TIME_TO_LIVE_S])
        return Standing(kind, found)

    def depart(self, account_id: str, refresh_id: str, now: datetime) -> None:
        """The refresh's call is about to go out."""
        self._depart([_key(account_id)], [refresh_id, since_epoch(now), TIME_TO_LIVE_S])

    def answer(self, account_id: str, balance_id: str, at: datetime, skew: timedelta) -> None:
        """A REFRESH balance came. To be told before anyone is settled by it."""
        self._answer([_key(account_id)], [balance_id, since_epoch(at), microseconds(skew), TIME_TO_LIVE_S])

    def close(self, account_id: str, refresh_id: str) -> None:
        """Nothing more is expected of the refresh."""
        self._close([_key(account_id)], [refresh_id])

    def restore(self, account_id: str, flight: str | None, called_at: datetime | None, requested: str | None) -> None:
        """Take over what the ledger knows of the account's refreshes."""
        called = "" if called_at is None else since_epoch(called_at)
        self._restore([_key(account_id)], [flight or "", called, requested or "", TIME_TO_LIVE_S])


def _key(account_id: str) -> str:
    return f"payready:{{{account_id}}}"  # the braces keep an account's keys on one node of a cluster
