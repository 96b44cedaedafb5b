"""What the provider decides: who may call, how a call is answered, which balance and which deliveries it causes."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from simulator import messages
from simulator.delivery import Courier, Parcel
from simulator.log import Call, Log
from simulator.messages import Account, Json
from simulator.scenarios import ACCOUNT_ID, SCENARIOS, Defaults, Reply, Scenario, Sends, drawn, scenario_of

ACCEPTED = 202
_STALE_AGE_S = 600
_TWICE_GAP_S = 0.2
_SPURIOUS_TRIES = 3  # a forger, or a replay, gives up sooner than the provider
_SYNC_AGE_S = 3600


@dataclass(frozen=True, slots=True)
class Ruling:
    """How one call ends. `first`, if set, is waited for before the answer."""

    call: Call
    reply: Reply
    status: int
    headers: Mapping[str, str]
    first: asyncio.Event | None = None


class Quota:
    """Counts calls per whole second against a limit."""

    def __init__(self) -> None:
        self._second = 0
        self._used = 0

    def take(self, limit: int, now: float) -> bool:
        """Count one call; False if it is above the limit."""
        if int(now) != self._second:
            self._second, self._used = int(now), 0
        self._used += 1
        return self._used <= limit

    def headers(self, limit: int, now: float) -> dict[str, str]:
        """The Ratelimit headers; the reset is the next whole second."""
        remaining = max(0, limit - self._used)
        values = {"Limit": limit, "Remaining": remaining, "Reset": int(now) + 1}
        return {f"Ratelimit-{name}": str(value) for name, value in values.items()}


@dataclass(slots=True)
class Provider:
    """The accounts of one environment and the key to them."""

    api_key: str
    mode: str
    rng: Random
    log: Log
    courier: Courier
    defaults: Defaults = field(default_factory=Defaults)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    _latest: dict[str, Json] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _quota: Quota = field(default_factory=Quota)
    _started_at: float = field(default_factory=time.time)

    def set_defaults(self, defaults: Defaults) -> None:
        """Use these settings from the next call and the next retry on."""
        self.defaults = self.courier.defaults = defaults

    def knows(self, key: str) -> bool:
        """Whether this is the API key."""
        return hmac.compare_digest(key.encode(), self.api_key.encode())

    def refresh(self, account_id: str, *, authenticated: bool, now: float) -> Ruling:
        """Decide one refresh call, log it, and set in motion what it causes."""
        scenario, account = self._account(account_id)
        acted, pace = drawn(scenario, self.rng)
        status = self._status(account_id, acted, now) if authenticated else 401
        call = self.log.enter_call(
            account_id=account_id,
            started_at=now,
            authenticated=authenticated,
            scenario=scenario.name,
            acted_as=acted.name,
            accepted=status == ACCEPTED,
        )
        headers = self._quota.headers(self.defaults.rate_limit_per_s, now)
        if not call.accepted:
            return Ruling(call, Reply.ANSWER, status, headers)
        delay_s = account.delay_s if account.delay_s is not None else self.defaults.delay_s(pace, self.rng)
        tried = self._set_in_motion(call, acted, account, delay_s)
        return Ruling(call, acted.reply, status, headers, tried if acted.early else None)

    def read(self, account_id: str) -> Json | None:
        """What GraphQL shows of an account, with its newest balance: until a refresh, one of a sync an hour ago."""
        scenario, account = self._account(account_id)
        if scenario.status == 404:
            return None
        balance = self._latest.get(account_id) or messages.balance(
            messages.sibling_id("bal", account_id), account_id, account, "SYNC", self._started_at - _SYNC_AGE_S
        )
        shown = ("id", "at", "source", "available", "current", "limit")
        return {
            "id": account_id,
            "currencyCode": account.currency_code,
            "kind": account.kind,
            "state": account.state,
            "connection": {
                "id": messages.sibling_id("conn", account_id),
                "status": account.connection_status,
                "provider": "PLAID",
            },
            "balance": {name: balance[name] for name in shown},
        }

    def _account(self, account_id: str) -> tuple[Scenario, Account]:
        if not ACCOUNT_ID.fullmatch(account_id):
            return SCENARIOS["gone"], Account()
        chosen = dict(self.overrides.get(account_id, {}))
        name = chosen.pop("scenario", None)
        scenario = SCENARIOS[name] if name else scenario_of(account_id)
        return scenario, Account(**{**scenario.account, **chosen})

    def _status(self, account_id: str, acted: Scenario, now: float) -> int:
        if not self._quota.take(self.defaults.rate_limit_per_s, now):
            return 429
        if acted.refuses_first and account_id not in self._refused:
            self._refused.add(account_id)
            return 429
        self._refused.discard(account_id)
        return acted.status

    def _set_in_motion(self, call: Call, acted: Scenario, account: Account, delay_s: float) -> asyncio.Event | None:
        if acted.sends is Sends.NOTHING and not acted.readable:
            return None
        call.balance_id = messages.new_id("bal")
        return self.courier.schedule(delay_s, partial(self._pack, call.account_id, call.balance_id, acted, account))

    def _pack(self, account_id: str, balance_id: str, acted: Scenario, account: Account) -> list[Parcel]:
        """Make the balance, now, and the deliveries that tell of it."""
        now = time.time()
        balance = messages.balance(balance_id, account_id, account, "REFRESH", now)
        if acted.readable:
            self._latest[account_id] = balance
        right = messages.event("balance.created", balance, account_id, now)
        match acted.sends:
            case Sends.EVENT:
                return [self._parcel(right)]
            case Sends.NOTHING:
                return []
            case Sends.TWICE:
                return [self._parcel(right, right), self._parcel(right, wait_s=_TWICE_GAP_S)]
            case Sends.FORGED:
                return [self._parcel(right, secret="not-the-secret", max_tries=_SPURIOUS_TRIES)]
            case Sends.STALE:
                return [self._parcel(right, age_s=_STALE_AGE_S, max_tries=_SPURIOUS_TRIES)]
            case Sends.BATCH:
                return [self._parcel(*messages.batch(right, account_id, now))]

    def _parcel(self, *events: Json, **how: Any) -> Parcel:
        return Parcel(messages.envelope(events, self.mode), **how)
