"""Decisions of the provider: authentication, the response to a call, the balance and the deliveries of the call."""

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from random import Random
from typing import Any

from simulator import quiltt_records
from simulator.bank import Bank
from simulator.quiltt_records import Account, Json
from simulator.request_log import LoggedCall, RequestLog
from simulator.scenarios import (
    ACCOUNT_ID,
    SCENARIOS,
    Defaults,
    ResponseKind,
    Scenario,
    WebhookKind,
    draw_scenario,
    scenario_of,
)
from simulator.webhook_sender import OutgoingDelivery, WebhookSender

ACCEPTED = 202
_STALE_SIGNATURE_AGE_S = 600
_DUPLICATE_DELAY_S = 0.2
_SPURIOUS_ATTEMPTS = 3
"""Attempts of forged and stale deliveries. They end after fewer attempts than genuine ones."""
_SPURIOUS_WEBHOOKS = (WebhookKind.FORGED, WebhookKind.STALE)
_SYNC_BALANCE_AGE_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDecision:
    """Response to one call."""

    call: LoggedCall
    response_kind: ResponseKind
    status: int
    headers: Mapping[str, str]
    first_attempt: asyncio.Event | None = None
    """Event for which the response waits: the first attempt to deliver the webhook."""


class PerSecondQuota:
    """Counter of calls per whole second, compared with a limit."""

    def __init__(self) -> None:
        self._second = 0
        self._used = 0

    def take_slot(self, limit: int, now: float) -> bool:
        """Count one call. Return False if it exceeds the limit."""
        self._reset_in_new_second(now)
        self._used += 1
        return self._used <= limit

    def headers(self, limit: int, now: float) -> dict[str, str]:
        """Return the Ratelimit headers. The reset is the next whole second."""
        self._reset_in_new_second(now)
        remaining = max(0, limit - self._used)
        values = {"Limit": limit, "Remaining": remaining, "Reset": int(now) + 1}
        return {f"Ratelimit-{name}": str(value) for name, value in values.items()}

    def _reset_in_new_second(self, now: float) -> None:
        if int(now) != self._second:
            self._second, self._used = int(now), 0


@dataclass(slots=True, kw_only=True)
class Provider:
    """Accounts of one environment, and its API key."""

    api_key: str
    mode: str
    rng: Random
    log: RequestLog
    webhook_sender: WebhookSender
    bank: Bank = field(default_factory=Bank)
    defaults: Defaults = field(default_factory=Defaults)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    _latest_balances: dict[str, Json] = field(default_factory=dict)
    _rate_limited_accounts: set[str] = field(default_factory=set)
    _quota: PerSecondQuota = field(default_factory=PerSecondQuota)
    _started_at: float = field(default_factory=time.time)

    def set_call_and_retry_defaults(self, defaults: Defaults) -> None:
        """Apply these settings from the next call and the next retry."""
        self.defaults = self.webhook_sender.defaults = defaults

    def is_api_key(self, key: str) -> bool:
        """Return whether `key` is the API key."""
        return hmac.compare_digest(key.encode(), self.api_key.encode())

    def refresh(self, account_id: str, *, authenticated: bool, now: float) -> CallDecision:
        """Decide the response to one refresh call, log the call and schedule its webhooks."""
        scenario, account = self._scenario_and_account_with_overrides(account_id)
        effective, event_delay = draw_scenario(scenario, self.rng)
        status = self._take_slot_and_decide_status(account_id, effective, now) if authenticated else 401
        call = self.log.add_unfinished_call(
            account_id=account_id,
            started_at=now,
            authenticated=authenticated,
            scenario=scenario.name,
            effective_scenario=effective.name,
            accepted=status == ACCEPTED,
        )
        headers = self._quota.headers(self.defaults.rate_limit_per_s, now)
        if not call.accepted:
            return CallDecision(call=call, response_kind=ResponseKind.STATUS, status=status, headers=headers)
        delay_s = account.delay_s if account.delay_s is not None else self.defaults.delay_s(event_delay, self.rng)
        first_attempt = self._schedule_balance_and_webhooks(call, effective, account, delay_s)
        return CallDecision(
            call=call,
            response_kind=effective.response_kind,
            status=status,
            headers=headers,
            first_attempt=first_attempt if effective.webhook_before_response else None,
        )

    def graphql_account(self, account_id: str) -> Json | None:
        """Return the account as GraphQL shows it, with its newest balance.

        Before the first refresh this is the balance of a sync, one hour older than the simulator's start.
        """
        scenario, account = self._scenario_and_account_with_overrides(account_id)
        if scenario.status == 404:
            return None
        balance = self._latest_balances.get(account_id) or quiltt_records.balance_record(
            quiltt_records.replace_id_prefix("bal", account_id),
            account_id,
            _with_available_balance(account, self.bank.balance(account_id)),
            "SYNC",
            self._started_at - _SYNC_BALANCE_AGE_S,
        )
        visible_fields = ("id", "at", "source", "available", "current", "limit")
        return {
            "id": account_id,
            "currencyCode": account.currency_code,
            "kind": account.kind,
            "state": account.state,
            "connection": {
                "id": quiltt_records.replace_id_prefix("conn", account_id),
                "status": account.connection_status,
                "provider": "PLAID",
            },
            "balance": {name: balance[name] for name in visible_fields},
        }

    def _scenario_and_account_with_overrides(self, account_id: str) -> tuple[Scenario, Account]:
        """Return the scenario and account, with overrides applied.

        An account id of an invalid form has scenario `gone`.
        """
        if not ACCOUNT_ID.fullmatch(account_id):
            return SCENARIOS["gone"], Account()
        overrides = dict(self.overrides.get(account_id, {}))
        name = overrides.pop("scenario", None)
        scenario = SCENARIOS[name] if name else scenario_of(account_id)
        return scenario, Account(**{**scenario.account, **overrides})

    def _take_slot_and_decide_status(self, account_id: str, effective: Scenario, now: float) -> int:
        """Count the call against the quota, and return its status: 429, or the status of the scenario."""
        if not self._quota.take_slot(self.defaults.rate_limit_per_s, now):
            return 429
        if effective.rate_limits_first_call and account_id not in self._rate_limited_accounts:
            self._rate_limited_accounts.add(account_id)
            return 429
        self._rate_limited_accounts.discard(account_id)
        return effective.status

    def _schedule_balance_and_webhooks(
        self, call: LoggedCall, effective: Scenario, account: Account, delay_s: float
    ) -> asyncio.Event | None:
        """Give the call its balance id, and schedule the balance and its webhooks.

        Return None if there is no new balance.
        """
        if effective.webhooks is WebhookKind.NOTHING and not effective.shown_in_graphql:
            return None
        call.balance_id = quiltt_records.new_id("bal")
        return self.webhook_sender.schedule(
            delay_s, partial(self._create_balance, call, call.balance_id, effective, account)
        )

    def _create_balance(
        self, call: LoggedCall, balance_id: str, effective: Scenario, account: Account
    ) -> list[OutgoingDelivery]:
        """Create the balance and return the deliveries of its events.

        It is dated now, unless the bank has a true balance of the account and dates it differently.
        """
        now, account_id = time.time(), call.account_id
        read = self.bank.read(account_id, call.started_at, now, self.rng)
        account = _with_available_balance(account, read.balance if read else None)
        balance_at = read.record_at if read else now
        balance = quiltt_records.balance_record(balance_id, account_id, account, "REFRESH", balance_at)
        if effective.shown_in_graphql:
            self._latest_balances[account_id] = balance
        timing = self.bank.draw_webhook_timing(account_id, self.rng)
        deliveries = self._deliveries_of_balance(balance, effective, now)
        repeated = [
            OutgoingDelivery(body=delivery.body, extra_delay_s=timing.repeat_after_s)
            for delivery in deliveries[:1]
            if timing.repeat_after_s is not None and effective.webhooks not in _SPURIOUS_WEBHOOKS
        ]
        for delivery in deliveries:
            delivery.extra_delay_s += timing.late_s
        return [*deliveries, *repeated]

    def _deliveries_of_balance(self, balance: Json, effective: Scenario, now: float) -> list[OutgoingDelivery]:
        account_id = str(balance["accountId"])
        event = quiltt_records.event_record("balance.created", balance, account_id, now)
        match effective.webhooks:
            case WebhookKind.EVENT:
                return [self._outgoing_delivery(event)]
            case WebhookKind.NOTHING:
                return []
            case WebhookKind.TWICE:
                return [
                    self._outgoing_delivery(event, event),
                    self._outgoing_delivery(event, extra_delay_s=_DUPLICATE_DELAY_S),
                ]
            case WebhookKind.FORGED:
                return [self._outgoing_delivery(event, secret="not-the-secret", max_attempts=_SPURIOUS_ATTEMPTS)]
            case WebhookKind.STALE:
                return [
                    self._outgoing_delivery(
                        event, signature_age_s=_STALE_SIGNATURE_AGE_S, max_attempts=_SPURIOUS_ATTEMPTS
                    )
                ]
            case WebhookKind.BATCH:
                return [self._outgoing_delivery(*quiltt_records.mixed_events(event, account_id, now))]

    def _outgoing_delivery(self, *events: Json, **options: Any) -> OutgoingDelivery:
        return OutgoingDelivery(body=quiltt_records.delivery_body(events, self.mode), **options)


def _with_available_balance(account: Account, balance: Decimal | None) -> Account:
    """Return the account with its true balance, unless there is none or the provider does not know the available."""
    if balance is None or account.available is None:
        return account
    return replace(account, available=float(balance), current=float(balance))
