"""Payments that fail, one for each failure reason that a stored payment can have, made by the real flow."""

from collections.abc import Mapping
from typing import Any

import httpx

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.errors import CallNotSent, FailureReason
from worker.quiltt.messages import CONNECTION_LOST_EVENTS, PolledAccount
from worker.quiltt.responses import refresh_error
from worker.rules.connections import ConnectionLost

NEEDED_SETTINGS = {"call_cap_per_account_per_day": 1}
"""Settings of the system: a second call for an account exceeds this cap."""
MUST_ACT: Mapping[FailureReason, str] = {
    FailureReason.TIMEOUT: "us",
    FailureReason.INSUFFICIENT_FUNDS: "payer",
    FailureReason.FUNDS_UNKNOWN: "us",
    FailureReason.ACCOUNT_NOT_FOUND: "us",
    FailureReason.ACCOUNT_UNSUPPORTED: "payer",
    FailureReason.CONNECTION_INACTIVE: "payer",
    FailureReason.CONNECTION_LOST: "payer",
    FailureReason.NOT_AUTHORIZED: "us",
    FailureReason.PROVIDER_UNAVAILABLE: "us",
    FailureReason.FEE_CAP_REACHED: "us",
    FailureReason.CANCELLED: "none",
}
"""The party that must act, by reason. The reason `conflict` has no payment of its own."""


def payment_id_of(reason: FailureReason) -> str:
    """Return the id of the payment that fails with this reason."""
    return f"pay_{reason}"


def fail_for_each_reason(payready: InProcessSystem) -> None:
    """Make a payment fail for each reason of `MUST_ACT`. The system needs `NEEDED_SETTINGS`."""

    def account(reason: FailureReason) -> str:
        return f"acct_{reason.replace('_', '')}"

    def initiate(reason: FailureReason, **job: Any) -> None:
        metadata = {"order": f"order of {reason}"}
        payready.initiate(payment_id_of(reason), account(reason), amount="25.00", metadata=metadata, **job)
        payready.clock.advance(0.04)
        payready.run_tasks()

    for reason, status in {
        FailureReason.ACCOUNT_NOT_FOUND: 404,
        FailureReason.CONNECTION_INACTIVE: 403,
        FailureReason.NOT_AUTHORIZED: 401,
    }.items():
        payready.provider.script[account(reason)] = [refresh_error(httpx.Response(status))]
        initiate(reason)
    unsupported = FailureReason.ACCOUNT_UNSUPPORTED
    payready.provider.accounts[account(unsupported)] = PolledAccount(kind="CREDIT", currencyCode="USD")
    initiate(unsupported, profile_id="p_1")
    for reason, available in {FailureReason.INSUFFICIENT_FUNDS: "10.00", FailureReason.FUNDS_UNKNOWN: None}.items():
        initiate(reason)
        payready.clock.advance(3)
        payready.balance(account(reason), available)
        payready.run_tasks()
    capped = account(FailureReason.FEE_CAP_REACHED)
    payready.initiate("pay_before_cap", capped)
    payready.run_tasks()
    payready.balance(capped)
    payready.run_tasks()
    payready.clock.advance(60)
    initiate(FailureReason.FEE_CAP_REACHED, max_balance_age_s=0)
    initiate(FailureReason.CONNECTION_LOST, connection_id="conn_1")
    payready.clock.advance(2)
    lost = ConnectionLost(
        detail=CONNECTION_LOST_EVENTS["connection.disconnected"],
        at=payready.clock.now,
        connection_id="conn_1",
    )
    payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=[lost]))
    initiate(FailureReason.CANCELLED)
    payready.clock.advance(2)
    cancelled = [payment_id_of(FailureReason.CANCELLED)]
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, cancelled))
    payready.run_tasks()
    unavailable = FailureReason.PROVIDER_UNAVAILABLE
    payready.provider.script[account(unavailable)] = [
        CallNotSent("no connection to Quiltt: connect error") for _ in range(99)
    ]
    initiate(unavailable, timeout_s=20)
    initiate(FailureReason.TIMEOUT, timeout_s=20)
    payready.pass_time(21)
