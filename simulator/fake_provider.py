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

from simulator import quiltt_records
from simulator.quiltt_records import Account, Json
from simulator.request_log import Log, LoggedCall
from simulator.scenarios import (
    ACCOUNT_ID,
    SCENARIOS,
    Defaults,
    ResponseKind,
    Scenario,
    Sends,
    draw_scenario,
    scenario_of,
)
from simulator.webhook_sender import OutgoingDelivery, WebhookSender

ACCEPTED = 202
_STALE_AGE_S = 600
_TWICE_GAP_S = 0.2
_SPURIOUS_TRIES = 3  # a forger, or a replay, gives up sooner than the provider
_SYNC_AGE_S = 3600


@dataclass(frozen=True, slots=True)
class CallDecision:
    """How one call ends. `first`, if set, is waited for before the answer."""

    call: LoggedCall
    response: ResponseKind
    status: int
    headers: Mapping[str, str]
    first: asyncio.Event | None = None


class Quota:
    """Counts calls per whole second against a limit."""

    def __init__(self) -> None:
        self._second = 0
        self._used = 0

    def take_slot(self, limit: int, now: float) -> bool:
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
    webhook_sender: WebhookSender
    defaults: Defaults = field(default_factory=Defaults)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    _latest: dict[str, Json] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _quota: Quota = field(default_factory=Quota)
    _started_at: float = field(default_factory=time.time)

    def set_defaults(self, defaults: Defaults) -> None:
        """Use these settings from the next call and the next retry on."""
        self.defaults = self.webhook_sender.defaults = defaults

    def is_api_key(self, key: str) -> bool:
        """Whether this is the API key."""
        return hmac.compare_digest(key.encode(), self.api_key.encode())

    def refresh(self, account_id: str, *, authenticated: bool, now: float) -> CallDecision:
        """Decide one refresh call, log it, and set in motion what it causes."""
        scenario, account = self._account(account_id)
        acted, pace = draw_scenario(scenario, self.rng)
        status = self._status(account_id, acted, now) if authenticated else 401
        call = self.log.enter_call(
            account_id=account_id,
            started_at=now,
            authenticated=authenticated,
            scenario=scenario.name,
            effective_scenario=acted.name,
            accepted=status == ACCEPTED,
        )
        headers = self._quota.headers(self.defaults.rate_limit_per_s, now)
        if not call.accepted:
            return CallDecision(call, ResponseKind.ANSWER, status, headers)
        delay_s = account.delay_s if account.delay_s is not None else self.defaults.delay_s(pace, self.rng)
        tried = self._schedule_webhooks(call, acted, account, delay_s)
        return CallDecision(call, acted.response, status, headers, tried if acted.early else None)

    def read(self, account_id: str) -> Json | None:
        """What GraphQL shows of an account, with its newest balance: until a refresh, one of a sync an hour ago."""
        scenario, account = self._account(account_id)
        if scenario.status == 404:
            return None
        balance = self._latest.get(account_id) or quiltt_records.balance(
            quiltt_records.sibling_id("bal", account_id), account_id, account, "SYNC", self._started_at - _SYNC_AGE_S
        )
        shown = ("id", "at", "source", "available", "current", "limit")
        return {
            "id": account_id,
            "currencyCode": account.currency_code,
            "kind": account.kind,
            "state": account.state,
            "connection": {
                "id": quiltt_records.sibling_id("conn", account_id),
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
        if not self._quota.take_slot(self.defaults.rate_limit_per_s, now):
            return 429
        if acted.refuses_first and account_id not in self._refused:
            self._refused.add(account_id)
            return 429
        self._refused.discard(account_id)
        return acted.status

    def _schedule_webhooks(
        self, call: LoggedCall, acted: Scenario, account: Account, delay_s: float
    ) -> asyncio.Event | None:
        if acted.sends is Sends.NOTHING and not acted.readable:
            return None
        call.balance_id = quiltt_records.new_id("bal")
        return self.webhook_sender.schedule(
            delay_s, partial(self._new_delivery, call.account_id, call.balance_id, acted, account)
        )

    def _new_delivery(
        self, account_id: str, balance_id: str, acted: Scenario, account: Account
    ) -> list[OutgoingDelivery]:
        """Make the balance, now, and the deliveries that tell of it."""
        now = time.time()
        balance = quiltt_records.balance(balance_id, account_id, account, "REFRESH", now)
        if acted.readable:
            self._latest[account_id] = balance
        right = quiltt_records.event("balance.created", balance, account_id, now)
        match acted.sends:
            case Sends.EVENT:
                return [self._signed_delivery(right)]
            case Sends.NOTHING:
                return []
            case Sends.TWICE:
                return [self._signed_delivery(right, right), self._signed_delivery(right, delay_s=_TWICE_GAP_S)]
            case Sends.FORGED:
                return [self._signed_delivery(right, secret="not-the-secret", max_tries=_SPURIOUS_TRIES)]
            case Sends.STALE:
                return [self._signed_delivery(right, age_s=_STALE_AGE_S, max_tries=_SPURIOUS_TRIES)]
            case Sends.BATCH:
                return [self._signed_delivery(*quiltt_records.surrounding_events(right, account_id, now))]

    def _signed_delivery(self, *events: Json, **how: Any) -> OutgoingDelivery:
        return OutgoingDelivery(quiltt_records.delivery_envelope(events, self.mode), **how)
