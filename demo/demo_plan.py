"""The demo's plan: its jobs with their expected outcomes, and the expected calls of each account.

The account's name selects the simulator's scenario; `python -m simulator --list` prints all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DEMO_TIMINGS = {"slow_s": 4.0, "late_s": 8.0}
"""The simulator's delays. The plan's timeouts and delays have seconds to spare, for slow machines."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Expected outcome of a job."""

    state: Literal["released", "failed", "rejected"]
    """`rejected`: the job itself is rejected, so it has no payment."""
    reason: str
    """The verdict of a released payment, else the failure reason or the name of the exception."""
    fee: Literal["posted", "pending", "void", "reused"] | None = None
    """State of the payment's fee share; None without one."""
    shared_by: int = 1
    """Number of payments that share the calls."""


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """A job that the payments service sends."""

    name: str
    description: str
    account_id: str
    expected: Expected
    payment_id: str
    job: Mapping[str, Any] = field(default_factory=dict)
    after_s: float = 0.0
    """Delay after the start of the service."""
    joins: str | None = None
    """Name of another job: this job is sent when the payment of that job is waiting."""
    follows: str | None = None
    """Name of another job: this job is sent after the callback of that job."""
    is_cancelled: bool = False
    """The service cancels it some seconds after it is waiting, when its call has been made."""


@dataclass(frozen=True, kw_only=True)
class CallCountsByFeeState:
    """Number of an account's calls by the final state of their fee entry."""

    posted: int = 0
    pending: int = 0
    void: int = 0

    def __str__(self) -> str:
        return f"{self.posted} posted, {self.pending} pending, {self.void} void"


def _job(
    name: str,
    description: str,
    account_id: str,
    expected: Expected,
    *,
    payment_id: str | None = None,
    after_s: float = 0.0,
    joins: str | None = None,
    follows: str | None = None,
    is_cancelled: bool = False,
    **job: Any,
) -> DemoJob:
    return DemoJob(
        name=name,
        description=description,
        account_id=account_id,
        expected=expected,
        payment_id=payment_id or f"pay_{name}",
        job={"amount": "25.00", "timeout_s": 20, **job},
        after_s=after_s,
        joins=joins,
        follows=follows,
        is_cancelled=is_cancelled,
    )


def _released_with_posted_fee(verdict: str = "sufficient", shared_by: int = 1) -> Expected:
    return Expected(state="released", reason=verdict, fee="posted", shared_by=shared_by)


def _released_by_reused_balance() -> Expected:
    return Expected(state="released", reason="sufficient", fee="reused", shared_by=0)


def _failed(reason: str, fee: Literal["posted", "pending", "void"] | None = "posted", shared_by: int = 1) -> Expected:
    return Expected(state="failed", reason=reason, fee=fee, shared_by=shared_by)


def _provider_unavailable_with_pending_fee() -> Expected:
    return _failed("provider_unavailable", "pending")


def _rejected(reason: str) -> Expected:
    return Expected(state="rejected", reason=reason)


DEMO_JOBS: tuple[DemoJob, ...] = (
    _job("plain", "the balance arrives at once", "acct_prompt01", _released_with_posted_fee()),
    _job("again", "reuses the same balance", "acct_prompt01", _released_by_reused_balance(), follows="plain"),
    _job(
        "fresh",
        "maximum balance age 0",
        "acct_prompt01",
        _released_with_posted_fee(),
        follows="again",
        max_balance_age_s=0,
    ),
    _job("share-1", "three payments, one call", "acct_slow01", _released_with_posted_fee(shared_by=3)),
    _job("share-2", "three payments, one call", "acct_slow01", _released_with_posted_fee(shared_by=3)),
    _job("share-3", "three payments, one call", "acct_slow01", _released_with_posted_fee(shared_by=3)),
    _job("big-1", "needs 300 of 500", "acct_slow02", _released_with_posted_fee(shared_by=2), amount="300.00"),
    _job(
        "big-2",
        "needs 300 of remaining 200",
        "acct_slow02",
        _failed("insufficient_funds", shared_by=2),
        joins="big-1",
        amount="300.00",
    ),
    _job("twin-1", "one payment, sent twice", "acct_slow03", _released_with_posted_fee(), payment_id="pay_twin"),
    _job("twin-2", "one payment, sent twice", "acct_slow03", _released_with_posted_fee(), payment_id="pay_twin"),
    _job(
        "conflict",
        "same id, different content",
        "acct_slow03",
        _rejected("conflict"),
        payment_id="pay_twin",
        joins="twin-1",
        amount="99.00",
    ),
    _job("negative", "an amount below zero", "acct_prompt02", _rejected("InvalidJob"), amount="-5.00"),
    _job("misspelt", "an unknown field", "acct_prompt02", _rejected("InvalidJob"), timeout="20"),
    _job("poor", "available is 1.00", "acct_poor01", _failed("insufficient_funds")),
    _job("null", "available is null", "acct_nullavail01", _failed("funds_unknown")),
    _job(
        "null-ok",
        "null, check not required",
        "acct_nullavail02",
        _released_with_posted_fee("unchecked"),
        funds_check="enabled",
    ),
    _job("gone", "404", "acct_gone01", _failed("account_not_found", "void")),
    _job("inactive", "403", "acct_inactive01", _failed("connection_inactive", "void")),
    _job("loan", "400", "acct_badreq01", _failed("account_unsupported", "void")),
    _job("throttled", "429, then 202", "acct_throttled01", _released_with_posted_fee()),
    _job("lost", "accepted, response lost", "acct_lost01", _released_with_posted_fee()),
    _job("silent", "no response, twice", "acct_silent01", _provider_unavailable_with_pending_fee(), timeout_s=13),
    _job("twice", "the event arrives 3 times", "acct_twice01", _released_with_posted_fee()),
    _job("early", "the event before the 202", "acct_early01", _released_with_posted_fee()),
    _job("batch", "event among invalid ones", "acct_batch01", _released_with_posted_fee()),
    _job("forged", "a wrong signature", "acct_forged01", _failed("timeout"), timeout_s=5),
    _job("never", "202, then no event", "acct_never01", _failed("timeout"), timeout_s=5),
    _job("cancelled", "cancelled while waiting", "acct_never02", _failed("cancelled"), is_cancelled=True),
    _job(
        "read",
        "event lost, poll finds it",
        "acct_unsent01",
        _released_with_posted_fee(),
        timeout_s=8,
        profile_id="p_demo",
    ),
    _job("late", "balance after the deadline", "acct_late01", _failed("timeout"), timeout_s=4),
    _job("later", "reuses the late balance", "acct_late01", _released_by_reused_balance(), after_s=14.0),
)

EXPECTED_CALLS: Mapping[str, CallCountsByFeeState] = {
    "acct_prompt01": CallCountsByFeeState(posted=2),
    "acct_prompt02": CallCountsByFeeState(),
    "acct_slow01": CallCountsByFeeState(posted=1),
    "acct_slow02": CallCountsByFeeState(posted=1),
    "acct_slow03": CallCountsByFeeState(posted=1),
    "acct_poor01": CallCountsByFeeState(posted=1),
    "acct_nullavail01": CallCountsByFeeState(posted=1),
    "acct_nullavail02": CallCountsByFeeState(posted=1),
    "acct_gone01": CallCountsByFeeState(void=1),
    "acct_inactive01": CallCountsByFeeState(void=1),
    "acct_badreq01": CallCountsByFeeState(void=1),
    "acct_throttled01": CallCountsByFeeState(posted=1, void=1),
    "acct_lost01": CallCountsByFeeState(posted=1),
    "acct_silent01": CallCountsByFeeState(pending=2),
    "acct_twice01": CallCountsByFeeState(posted=1),
    "acct_early01": CallCountsByFeeState(posted=1),
    "acct_batch01": CallCountsByFeeState(posted=1),
    "acct_forged01": CallCountsByFeeState(posted=1),
    "acct_never01": CallCountsByFeeState(posted=1),
    "acct_never02": CallCountsByFeeState(posted=1),
    "acct_unsent01": CallCountsByFeeState(posted=1),
    "acct_late01": CallCountsByFeeState(posted=1),
}
"""Expected calls of every account in the plan."""
