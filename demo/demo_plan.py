"""What the demo pays, and what must come of it: one line a job, and the calls that each account may cost.

The account's name chooses what the simulator does with it; `python -m simulator --list` tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DEMO_TIMINGS = {"slow_s": 4.0, "late_s": 8.0}
"""The simulator's delays. Deadlines and waits below leave seconds of room, for machines that have much else to do."""


@dataclass(frozen=True)
class Expected:
    """How a job ends. `word` is the verdict or the reason; `fee` the state of its share, None if it owes nothing."""

    state: Literal["released", "failed", "refused"]
    """`refused`: the job itself, before there is a payment."""
    reason: str
    fee: Literal["posted", "pending", "void", "reused"] | None = None
    shared_by: int = 1


@dataclass(frozen=True)
class DemoJob:
    """One job that the payments service sends."""

    name: str
    description: str
    account_id: str
    expected: Expected
    payment_id: str
    job: Mapping[str, Any] = field(default_factory=dict)
    after_s: float = 0.0
    """When it is sent, counted from the first."""
    joins: str | None = None
    """Or: sent as soon as this order waits."""
    follows: str | None = None
    """Or: sent as soon as the callback of this order came."""
    is_cancelled: bool = False
    """Cancelled a while after it waits, when its call is sure to have been made."""


@dataclass(frozen=True)
class ExpectedCalls:
    """The calls an account costs, by how they stand in the end."""

    posted: int = 0
    pending: int = 0
    void: int = 0


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
    job = {"amount": "25.00", "timeout_s": 20, **job}
    payment_id = payment_id or f"pay_{name}"
    return DemoJob(name, description, account_id, expected, payment_id, job, after_s, joins, follows, is_cancelled)


def _released(verdict: str = "sufficient", shared_by: int = 1) -> Expected:
    return Expected("released", verdict, "posted", shared_by)


def _reused() -> Expected:
    return Expected("released", "sufficient", "reused", 0)


def _failed(reason: str, fee: Literal["posted", "pending", "void"] | None = "posted", shared_by: int = 1) -> Expected:
    return Expected("failed", reason, fee, shared_by)


def _unavailable() -> Expected:
    return _failed("provider_unavailable", "pending")


def _rejected(reason: str) -> Expected:
    return Expected("refused", reason)


DEMO_JOBS: tuple[DemoJob, ...] = (
    _job("plain", "the balance comes at once", "acct_prompt01", _released()),
    _job("again", "the same balance serves it", "acct_prompt01", _reused(), follows="plain"),
    _job("fresh", "allows no age, gets a call", "acct_prompt01", _released(), follows="again", max_balance_age_s=0),
    _job("share-1", "three payments, one call", "acct_slow01", _released(shared_by=3)),
    _job("share-2", "three payments, one call", "acct_slow01", _released(shared_by=3)),
    _job("share-3", "three payments, one call", "acct_slow01", _released(shared_by=3)),
    _job("big-1", "300 of the 500 there", "acct_slow02", _released(shared_by=2), amount="300.00"),
    _job(
        "big-2",
        "300 of the 200 left",
        "acct_slow02",
        _failed("insufficient_funds", shared_by=2),
        joins="big-1",
        amount="300.00",
    ),
    _job("twin-1", "one payment, sent twice", "acct_slow03", _released(), payment_id="pay_twin"),
    _job("twin-2", "one payment, sent twice", "acct_slow03", _released(), payment_id="pay_twin"),
    _job(
        "conflict",
        "same id, other content",
        "acct_slow03",
        _rejected("conflict"),
        payment_id="pay_twin",
        joins="twin-1",
        amount="99.00",
    ),
    _job("negative", "an amount below zero", "acct_prompt02", _rejected("InvalidJob"), amount="-5.00"),
    _job("misspelt", "a key nobody knows", "acct_prompt02", _rejected("InvalidJob"), timeout="20"),
    _job("poor", "1.00 there", "acct_poor01", _failed("insufficient_funds")),
    _job("null", "available is null", "acct_nullavail01", _failed("funds_unknown")),
    _job("null-ok", "null, but it may be", "acct_nullavail02", _released("unchecked"), funds_check="enabled"),
    _job("gone", "404", "acct_gone01", _failed("account_not_found", "void")),
    _job("inactive", "403", "acct_inactive01", _failed("connection_inactive", "void")),
    _job("loan", "400", "acct_badreq01", _failed("account_unsupported", "void")),
    _job("throttled", "429, then 202", "acct_throttled01", _released()),
    _job("lost", "accepted, the answer lost", "acct_lost01", _released()),
    _job("silent", "no answer at all, twice", "acct_silent01", _unavailable(), timeout_s=13),
    _job("twice", "the event, three times", "acct_twice01", _released()),
    _job("early", "the event before the 202", "acct_early01", _released()),
    _job("batch", "the event among bad ones", "acct_batch01", _released()),
    _job("forged", "a wrong signature", "acct_forged01", _failed("timeout"), timeout_s=5),
    _job("never", "202, and nothing comes", "acct_never01", _failed("timeout"), timeout_s=5),
    _job("cancelled", "cancelled while it waits", "acct_never02", _failed("cancelled"), is_cancelled=True),
    _job("read", "a webhook is lost, a read finds it", "acct_unsent01", _released(), timeout_s=8, profile_id="p_demo"),
    _job("late", "balance after the deadline", "acct_late01", _failed("timeout"), timeout_s=4),
    _job("later", "the late balance serves it", "acct_late01", _reused(), after_s=14.0),
)

EXPECTED_CALLS: Mapping[str, ExpectedCalls] = {
    "acct_prompt01": ExpectedCalls(posted=2),
    "acct_prompt02": ExpectedCalls(),
    "acct_slow01": ExpectedCalls(posted=1),
    "acct_slow02": ExpectedCalls(posted=1),
    "acct_slow03": ExpectedCalls(posted=1),
    "acct_poor01": ExpectedCalls(posted=1),
    "acct_nullavail01": ExpectedCalls(posted=1),
    "acct_nullavail02": ExpectedCalls(posted=1),
    "acct_gone01": ExpectedCalls(void=1),
    "acct_inactive01": ExpectedCalls(void=1),
    "acct_badreq01": ExpectedCalls(void=1),
    "acct_throttled01": ExpectedCalls(posted=1, void=1),
    "acct_lost01": ExpectedCalls(posted=1),
    "acct_silent01": ExpectedCalls(pending=2),
    "acct_twice01": ExpectedCalls(posted=1),
    "acct_early01": ExpectedCalls(posted=1),
    "acct_batch01": ExpectedCalls(posted=1),
    "acct_forged01": ExpectedCalls(posted=1),
    "acct_never01": ExpectedCalls(posted=1),
    "acct_never02": ExpectedCalls(posted=1),
    "acct_unsent01": ExpectedCalls(posted=1),
    "acct_late01": ExpectedCalls(posted=1),
}
"""Every account of the plan, and the calls it costs."""
