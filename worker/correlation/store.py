"""The correlation store in Redis: per account the refresh in flight, the requested refresh and the newest balance.

It decides in one atomic step which payments share a call (request coalescing), without a lock in SQL. Waiting payments
are not stored here: the ledger has them, and a second list could disagree. Losing all of it costs only speed: a refresh
is claimed in the ledger, which refuses a second call in flight, and `restore_account` copies the ledger's state back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from redis import Redis

from worker.correlation.redis_client import LuaScript, RedisCommand, duration_us, epoch_us, from_epoch_us

ACCOUNT_TTL_S = 2 * 3600
"""Time to live of an account's key after its last use. Longer than any refresh is in flight."""
SCAN_COUNT = 1000
"""Keys of one SCAN, which takes about 1 ms of the server."""


@dataclass(frozen=True, kw_only=True)
class JoinResult:
    """How a payment gets its balance.

    `balance`: the stored balance `id` is fresh enough. `joined`: the payment shares the refresh `id` of an earlier
    payment. `leader`: the payment leads the refresh `id`, and the caller must enqueue its call.
    """

    kind: Literal["balance", "joined", "leader"]
    id: str


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """A payment that joins a refresh of its account."""

    account_id: str
    refresh_id: str
    """Id of the refresh that the payment leads if it finds nothing to join."""
    min_balance_at: datetime | None
    """Minimum time of a stored balance. None if the payment accepts no stored balance."""
    min_called_at: datetime
    """Minimum time of a call that the payment may share."""

    def script_args(self) -> list[Any]:
        """Return the arguments of `join.lua`."""
        oldest = "" if self.min_balance_at is None else epoch_us(self.min_balance_at)
        return [oldest, epoch_us(self.min_called_at), self.refresh_id, ACCOUNT_TTL_S]


@dataclass(frozen=True, kw_only=True)
class CalledRefresh:
    """A refresh whose call is about to be made."""

    account_id: str
    refresh_id: str
    called_at: datetime


@dataclass(frozen=True, kw_only=True)
class NewRefreshBalance:
    """A REFRESH balance that was received."""

    account_id: str
    balance_id: str
    at: datetime


@dataclass(frozen=True, kw_only=True)
class AccountState:
    """State of an account in the ledger, to restore the store from."""

    in_flight: str | None = None
    """Id of the refresh in flight."""
    called_at: datetime | None = None
    """When that refresh was called."""
    requested: str | None = None
    """Id of the refresh that is requested and not called yet."""
    newest_balance: NewRefreshBalance | None = None
    """The newest REFRESH balance."""


@dataclass(frozen=True, kw_only=True)
class StoredAccount:
    """An account with its state in the store."""

    account_id: str
    state: AccountState


class CorrelationStore:
    """The operations of the store. Each is one Lua script, which documents its key. All raise `REDIS_UNAVAILABLE`.

    `key_prefix` separates the ledgers that share a Redis: their accounts may have the same ids.
    """

    def __init__(self, redis: Redis, *, key_prefix: str = "") -> None:
        self._redis, self._key_prefix = redis, key_prefix
        self._join = LuaScript(redis, "join")
        self._mark_called = LuaScript(redis, "mark_called")
        self._add_balance = LuaScript(redis, "add_balance")
        self._clear_refresh = LuaScript(redis, "clear_refresh")
        self._restore_account = LuaScript(redis, "restore_account")

    def reuse_balance_or_join_refresh(
        self, requests: Sequence[JoinRequest], then: Sequence[RedisCommand] = ()
    ) -> list[JoinResult]:
        """Join each payment to a balance or a refresh of its account, in this order.

        The commands of `then` are executed after it, in the same round trip.
        """
        calls = [([self._account_key(request.account_id)], request.script_args()) for request in requests]
        return [JoinResult(kind=kind, id=found) for kind, found in self._join.run_many(calls, then)]

    def move_requested_to_in_flight(self, refreshes: Sequence[CalledRefresh]) -> None:
        """Set refreshes in flight instead of requested, just before their calls are made."""
        calls = [
            ([self._account_key(called.account_id)], [called.refresh_id, epoch_us(called.called_at), ACCOUNT_TTL_S])
            for called in refreshes
        ]
        self._mark_called.run_many(calls)

    def add_balances_and_clear_answered_refreshes(
        self, balances: Sequence[NewRefreshBalance], clock_skew: timedelta
    ) -> None:
        """Keep the newest REFRESH balances; clear the refreshes they answer. Call it before they resolve payments."""
        calls = [
            (
                [self._account_key(new.account_id)],
                [new.balance_id, epoch_us(new.at), duration_us(clock_skew), ACCOUNT_TTL_S],
            )
            for new in balances
        ]
        self._add_balance.run_many(calls)

    def clear_requested_or_in_flight_refresh(self, account_id: str, refresh_id: str) -> None:
        """Forget a refresh that no balance will answer, if it is still stored as requested or in flight."""
        self._clear_refresh([self._account_key(account_id)], [refresh_id])

    def restore_account(self, account_id: str, state: AccountState) -> None:
        """Replace the stored state of the account with the ledger's state."""
        called_at = "" if state.called_at is None else epoch_us(state.called_at)
        newest = state.newest_balance
        balance = ["", ""] if newest is None else [newest.balance_id, epoch_us(newest.at)]
        fields = [state.in_flight or "", called_at, state.requested or "", *balance]
        self._restore_account([self._account_key(account_id)], [*fields, ACCOUNT_TTL_S])

    def stored_accounts(self) -> Iterator[StoredAccount]:
        """Yield all accounts of the store, while it changes: an account may be missing or be yielded twice."""
        pattern = self._account_key("*")
        prefix, suffix = pattern.split("*")
        for key in self._redis.scan_iter(match=pattern, count=SCAN_COUNT):
            account_id = key.removeprefix(prefix).removesuffix(suffix)
            fields = cast(dict[str, str], self._redis.hgetall(key))
            yield StoredAccount(account_id=account_id, state=_parse_state(account_id, fields))

    def _account_key(self, account_id: str) -> str:
        # The braces keep an account's keys on one node of a cluster.
        return f"{self._key_prefix}payready:{{{account_id}}}"


def _parse_state(account_id: str, fields: Mapping[str, str]) -> AccountState:
    called_at, balance_at = fields.get("called_at"), fields.get("balance_at")
    balance = (
        NewRefreshBalance(account_id=account_id, balance_id=fields["balance"], at=from_epoch_us(balance_at))
        if balance_at
        else None
    )
    return AccountState(
        in_flight=fields.get("in_flight"),
        called_at=from_epoch_us(called_at) if called_at else None,
        requested=fields.get("requested"),
        newest_balance=balance,
    )
