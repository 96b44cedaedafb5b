"""JSON of the ledger without what its row has anyway: half of a settled payment would be stored twice.

A value that equals what the other columns and the usual values give is left out, and is put back on reading. A row that
an earlier version wrote has all values, and is read as it is. What is usual must never change: it is the meaning of
stored rows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from worker.rules.decimals import decimal_text
from worker.rules.json_values import is_same_json

Json = dict[str, Any]


# --- job and continuation ---------------------------------------------------------------------------------------------


def compact_job(job: Json, *, payment_id: str, account_id: str, amount: Decimal | None) -> Json:
    """Return the job without its ids and its amount."""
    return _without(job, _job_columns(payment_id, account_id, amount))


def full_job(stored: Json, *, payment_id: str, account_id: str, amount: Decimal | None) -> Json:
    """Return the job that was stored in the row with these columns."""
    return {**_job_columns(payment_id, account_id, amount), **stored}


def _job_columns(payment_id: str, account_id: str, amount: Decimal | None) -> Json:
    columns = {"payment_id": payment_id, "account_id": account_id}
    return columns if amount is None else {**columns, "amount": decimal_text(amount)}


def compact_continuation(continuation: Json) -> Json:
    """Return the continuation of a task without its id and usual values. One that lacks any of them stays whole."""
    usual = _usual_continuation(continuation["id"])
    return _without(continuation, usual) if usual.keys() <= continuation.keys() else continuation


def full_continuation(stored: Json, task_id: str) -> Json:
    """Return the continuation that was stored for this task."""
    return stored if "id" in stored else {**_usual_continuation(task_id), **stored}


def _usual_continuation(task_id: str) -> Json:
    return {
        "version": 1,
        "id": task_id,
        "task": "payments.initiate",
        "root_id": task_id,
        "stamps": {},
        "priority": 0,
    }


# --- outcome ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OutcomeColumns:
    """Columns of a released payment that its outcome has too."""

    payment_id: str
    amount: Decimal | None
    requested_at: datetime
    resolved_at: datetime
    refresh_id: str | None
    balance_id: str | None
    metadata: Json
    """The metadata of the job."""


def compact_outcome(outcome: Json, columns: OutcomeColumns) -> Json:
    """Return the outcome of a released payment without what its row has, or as it is if it could not be restored."""
    if not _has_balance_and_fee(outcome):
        return outcome
    stored = _without(outcome, _usual_outcome(columns, outcome))
    is_restored = json.dumps(full_outcome(stored, columns)) == json.dumps(outcome)
    return stored if is_restored else outcome


def full_outcome(stored: Json, columns: OutcomeColumns) -> Json:
    """Return the outcome that was stored in the row with these columns."""
    return _with(stored, _usual_outcome(columns, stored)) if _is_compact(stored) else stored


def _is_compact(stored: Json) -> bool:
    return "payment_id" not in stored and _has_balance_and_fee(stored)


def _has_balance_and_fee(outcome: Json) -> bool:
    return all(isinstance(outcome.get(name), dict) for name in ("balance", "fee"))


def _usual_outcome(columns: OutcomeColumns, outcome: Json) -> Json:
    """Return the values of an outcome whose balance covers the amount. The balance's amounts and the fee are given."""
    amount = None if columns.amount is None else decimal_text(columns.amount)
    available, currency = outcome["balance"].get("available"), outcome["fee"].get("currency")
    waited_ms = round((columns.resolved_at - columns.requested_at).total_seconds() * 1000)
    return {
        "payment_id": columns.payment_id,
        "state": "released",
        "verdict": "sufficient",
        "funds_calculation": {
            "amount": amount,
            "multiplier": "1",
            "fixed": "0",
            "needed": amount,
            "available": available,
            "limit": None,
            "held": "0",
            "held_count": 0,
            "held_until": None,
            "available_after_holds": available,
            "currency": currency,
        },
        # `None` keeps the place of a name, so that every delivery of an outcome is the same text.
        "balance": {
            "id": columns.balance_id,
            "at": None,
            "source": "REFRESH",
            "available": None,
            "current": None,
            "limit": None,
        },
        "requested_at": _time_text(columns.requested_at),
        "resolved_at": _time_text(columns.resolved_at),
        "waited_ms": max(0, waited_ms),
        "refresh_id": columns.refresh_id,
        "shared_by": 1,
        "fee": {"amount": None, "currency": None, "state": "posted"},
        "metadata": columns.metadata,
    }


def _time_text(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")


# --- both directions --------------------------------------------------------------------------------------------------


def _without(value: Json, usual: Mapping[str, Any]) -> Json:
    """Return the entries that are not as usual; of objects within, only their unusual entries."""
    unusual: Json = {}
    for name, part in value.items():
        if name not in usual:
            unusual[name] = part
        elif not is_same_json(part, usual[name]):
            both_objects = isinstance(part, dict) and isinstance(usual[name], dict)
            unusual[name] = _without(part, usual[name]) if both_objects else part
    return unusual


def _with(stored: Json, usual: Mapping[str, Any]) -> Json:
    """Return the stored entries with the usual ones that they lack, also in objects within."""
    full = {**usual, **stored}
    for name, part in stored.items():
        if isinstance(part, dict) and isinstance(usual.get(name), dict):
            full[name] = _with(part, usual[name])
    return full
