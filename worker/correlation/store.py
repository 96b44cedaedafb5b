"""The correlation store: for each account the refresh in flight, the next one, and the newest REFRESH balance.

Who waits is not in here: the ledger knows it, and a second list could only disagree. What is here decides who
shares a call and who leads one, in one atomic step, without a lock in SQL. Losing all of it costs speed: a
refresh is claimed in the ledger, which refuses a second call in flight, and `restore` brings back what it knows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from redis import Redis

from worker.correlation.client import EPOCH, Script, microseconds, since_epoch

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


@dataclass(frozen=True)
class Arrival:
    """A payment that joins its account."""

    account_id: str
    lead: str
    """The id of the refresh that it would lead."""
    oldest_balance: datetime | None
    """None if no balance that is there already serves it."""
    oldest_call: datetime

    def words(self) -> list[Any]:
        """As the script takes it."""
        oldest = "" if self.oldest_balance is None else since_epoch(self.oldest_balance)
        return [oldest, since_epoch(self.oldest_call), self.lead, TIME_TO_LIVE_S]


@dataclass(frozen=True)
class Known:
    """What the ledger knows of an account."""

    flight: str | None = None
    """The refresh in flight, and when its call went out."""
    called_at: datetime | None = None
    requested: str | None = None
    """The refresh that is wanted and not called yet."""
    balance: tuple[str, datetime] | None = None
    """The newest balance with source REFRESH, and its time."""


class Correlation:
    """The store's operations; each is one Lua script, which documents the keys. Raises `CORRELATION_AWAY`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._join = Script(redis, "join")
        self._depart = Script(redis, "depart")
        self._answer = Script(redis, "answer")
        self._close = Script(redis, "close")
        self._restore = Script(redis, "restore")

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

    def join(self, arrivals: Sequence[Arrival]) -> list[Standing]:
        """Find or begin what will serve each of these payments, in their order."""
        calls = [([_key(arrival.account_id)], arrival.words()) for arrival in arrivals]
        return [Standing(kind, found) for kind, found in self._join.each(calls)]

    def depart(self, departures: Sequence[tuple[str, str, datetime]]) -> None:
        """The calls of refreshes are about to go out: account, refresh, and when."""
        calls = [
            ([_key(account_id)], [refresh_id, since_epoch(called_at), TIME_TO_LIVE_S])
            for account_id, refresh_id, called_at in departures
        ]
        self._depart.each(calls)

    def answer(self, balances: Sequence[tuple[str, str, datetime]], skew: timedelta) -> None:
        """REFRESH balances came: account, balance, and its time. To be told before anyone is settled by them."""
        calls = [
            ([_key(account_id)], [balance_id, since_epoch(at), microseconds(skew), TIME_TO_LIVE_S])
            for account_id, balance_id, at in balances
        ]
        self._answer.each(calls)

    def close(self, account_id: str, refresh_id: str) -> None:
        """Nothing more is expected of the refresh."""
        self._close([_key(account_id)], [refresh_id])

    def restore(self, account_id: str, known: Known) -> None:
        """Take over what the ledger knows of the account."""
        called_at = "" if known.called_at is None else since_epoch(known.called_at)
        newest, at = known.balance or ("", None)
        words = [known.flight or "", called_at, known.requested or "", newest, since_epoch(at) if at else ""]
        self._restore([_key(account_id)], [*words, TIME_TO_LIVE_S])


def _key(account_id: str) -> str:
    return f"payready:{{{account_id}}}"  # the braces keep an account's keys on one node of a cluster
