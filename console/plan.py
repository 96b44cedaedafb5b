"""What the demo pays, and what must come of it: one line a job, and the calls that each account may cost.

The account's name chooses what the simulator does with it; `python -m simulator --list` tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

CLOCK = {"slow_s": 4.0, "late_s": 8.0}
"""The simulator's delays. Deadlines and waits below leave seconds of room, for machines that have much else to do."""


@dataclass(frozen=True)
class Promise:
    """How a job ends. `word` is the verdict or the reason; `fee` the state of its share, None if it owes nothing."""

    end: Literal["released", "failed", "refused"]
    """`refused`: the job itself, before there is a payment."""
    word: str
    fee: Literal["posted", "pending", "void", "reused"] | None = None
    shared_by: int = 1


@dataclass(frozen=True)
class Order:
    """One job that the payments service sends."""

    name: str
    tells: str
    account_id: str
    promise: Promise
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
class Calls:
    """The calls an account costs, by how they stand in the end."""

    posted: int = 0
    pending: int = 0
    void: int = 0


def _order(
    name: str,
    tells: str,
    account_id: str,
    promise: Promise,
    *,
    payment_id: str | None = None,
    after_s: float = 0.0,
    joins: str | None = None,
    follows: str | None = None,
    is_cancelled: bool = False,
    **job: Any,
) -> Order:
    job = {"amount": "25.00", "timeout_s": 20, **job}
    payment_id = payment_id or f"pay_{name}"
    return Order(name, tells, account_id, promise, payment_id, job, after_s, joins, follows, is_cancelled)


def _released(word: str = "sufficient", shared_by: int = 1) -> Promise:
    return Promise("released", word, "posted", shared_by)


def _reused() -> Promise:
    return Promise("released", "sufficient", "reused", 0)


def _failed(reason: str, fee: Literal["posted", "pending", "void"] | None = "posted", shared_by: int = 1) -> Promise:
    return Promise("failed", reason, fee, shared_by)


def _unavailable() -> Promise:
    return _failed("provider_unavailable", "pending")


def _refused(reason: str) -> Promise:
    return Promise("refused", reason)


PLAN: tuple[Order, ...] = (
    _order("plain", "the balance comes at once", "acct_prompt01", _released()),
    _order("again", "the same balance serves it", "acct_prompt01", _reused(), follows="plain"),
    _order("fresh", "allows no age, gets a call", "acct_prompt01", _released(), follows="again", max_balance_age_s=0),
    _order("share-1", "three payments, one call", "acct_slow01", _released(shared_by=3)),
    _order("share-2", "three payments, one call", "acct_slow01", _released(shared_by=3)),
    _order("share-3", "three payments, one call", "acct_slow01", _released(shared_by=3)),
    _order("big-1", "300 of the 500 there", "acct_slow02", _released(shared_by=2), amount="300.00"),
    _order(
        "big-2",
        "300 of the 200 left",
        "acct_slow02",
        _failed("insufficient_funds", shared_by=2),
        joins="big-1",
        amount="300.00",
    ),
    _order("twin-1", "one payment, sent twice", "acct_slow03", _released(), payment_id="pay_twin"),
    _order("twin-2", "one payment, sent twice", "acct_slow03", _released(), payment_id="pay_twin"),
    _order(
        "conflict",
        "same id, other content",
        "acct_slow03",
        _refused("conflict"),
        payment_id="pay_twin",
        joins="twin-1",
        amount="99.00",
    ),
    _order("negative", "an amount below zero", "acct_prompt02", _refused("InvalidJob"), amount="-5.00"),
    _order("misspelt", "a key nobody knows", "acct_prompt02", _refused("InvalidJob"), timeout="20"),
    _order("poor", "1.00 there", "acct_poor01", _failed("insufficient_funds")),
    _order("null", "available is null", "acct_nullavail01", _failed("funds_unknown")),
    _order("null-ok", "null, but it may be", "acct_nullavail02", _released("unchecked"), funds_check="enabled"),
    _order("gone", "404", "acct_gone01", _failed("account_not_found", "void")),
    _order("inactive", "403", "acct_inactive01", _failed("connection_inactive", "void")),
    _order("loan", "400", "acct_badreq01", _failed("account_unsupported", "void")),
    _order("throttled", "429, then 202", "acct_throttled01", _released()),
    _order("lost", "accepted, the answer lost", "acct_lost01", _released()),
    _order("silent", "no answer at all, twice", "acct_silent01", _unavailable(), timeout_s=13),
    _order("twice", "the event, three times", "acct_twice01", _released()),
    _order("early", "the event before the 202", "acct_early01", _released()),
    _order("batch", "the event among bad ones", "acct_batch01", _released()),
    _order("forged", "a wrong signature", "acct_forged01", _failed("timeout"), timeout_s=5),
    _order("never", "202, and nothing comes", "acct_never01", _failed("timeout"), timeout_s=5),
    _order("cancelled", "cancelled while it waits", "acct_never02", _failed("cancelled"), is_cancelled=True),
    _order(
        "read", "a webhook is lost, a read finds it", "acct_unsent01", _released(), timeout_s=8, profile_id="p_demo"
    ),
    _order("late", "balance after the deadline", "acct_late01", _failed("timeout"), timeout_s=4),
    _order("later", "the late balance serves it", "acct_late01", _reused(), after_s=14.0),
)

COSTS: Mapping[str, Calls] = {
    "acct_prompt01": Calls(posted=2),
    "acct_prompt02": Calls(),
    "acct_slow01": Calls(posted=1),
    "acct_slow02": Calls(posted=1),
    "acct_slow03": Calls(posted=1),
    "acct_poor01": Calls(posted=1),
    "acct_nullavail01": Calls(posted=1),
    "acct_nullavail02": Calls(posted=1),
    "acct_gone01": Calls(void=1),
    "acct_inactive01": Calls(void=1),
    "acct_badreq01": Calls(void=1),
    "acct_throttled01": Calls(posted=1, void=1),
    "acct_lost01": Calls(posted=1),
    "acct_silent01": Calls(pending=2),
    "acct_twice01": Calls(posted=1),
    "acct_early01": Calls(posted=1),
    "acct_batch01": Calls(posted=1),
    "acct_forged01": Calls(posted=1),
    "acct_never01": Calls(posted=1),
    "acct_never02": Calls(posted=1),
    "acct_unsent01": Calls(posted=1),
    "acct_late01": Calls(posted=1),
}
"""Every account of the plan, and the calls it costs."""
