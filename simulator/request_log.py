"""The referee's log: every call and every delivery attempt since the start or the last reset, in memory.

A call is entered when it comes in, and its status is filled in when it is answered; a delivery attempt is entered when
it is over. Sequence numbers start at 1 and go on across resets. All times are Unix seconds.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from simulator.quiltt_records import BodyIds


@dataclass(slots=True)
class LoggedCall:
    """One refresh call. `accepted`: the provider would bill it. `status` is null while, and when, it has no answer."""

    seq: int
    account_id: str
    started_at: float
    authenticated: bool
    scenario: str
    effective_scenario: str  # differs from the scenario for `mix` only
    accepted: bool
    balance_id: str | None = None  # of the balance this call will make
    status: int | None = None


@dataclass(frozen=True, slots=True)
class LoggedDelivery:
    """One attempt to deliver. `signed_rightly` says nothing of the timestamp's age: compare it with `sent_at`."""

    seq: int
    event_ids: tuple[str, ...]
    balance_ids: tuple[str, ...]
    account_ids: tuple[str, ...]
    attempt: int
    sent_at: float
    timestamp: int  # as in Quiltt-Timestamp
    signature_valid: bool
    status: int | None
    error: str | None


_FIELD_NAMES = {kind: tuple(column.name for column in fields(kind)) for kind in (LoggedCall, LoggedDelivery)}


def _as_dict(entry: LoggedCall | LoggedDelivery) -> dict[str, Any]:
    """As `dataclasses.asdict`, which copies deeply and takes five times as long: the whole log is asked for at once."""
    return {name: getattr(entry, name) for name in _FIELD_NAMES[type(entry)]}


class RequestLog:
    """Append-only until `reset`. With a path, each finished entry is also appended there as a line of JSON."""

    def __init__(self, path: Path | None = None) -> None:
        self.calls: list[LoggedCall] = []
        self.deliveries: list[LoggedDelivery] = []
        self._last_call_seq = 0
        self._last_delivery_seq = 0
        self._file = path.open("a", buffering=1) if path else None

    def add_call(
        self,
        *,
        account_id: str,
        started_at: float,
        authenticated: bool,
        scenario: str,
        effective_scenario: str,
        accepted: bool,
    ) -> LoggedCall:
        """Enter a call that just came in; its status is not known yet."""
        self._last_call_seq += 1
        call = LoggedCall(
            self._last_call_seq, account_id, started_at, authenticated, scenario, effective_scenario, accepted
        )
        self.calls.append(call)
        return call

    def finish_call(self, call: LoggedCall, status: int | None) -> None:
        """The call's request is over: answered with this status, or never answered."""
        call.status = status
        self._write_line("call", call)

    def add_delivery(
        self,
        *,
        ids: BodyIds,
        attempt: int,
        sent_at: float,
        timestamp: int,
        signature_valid: bool,
        status: int | None,
        error: str | None,
    ) -> None:
        """Enter a delivery attempt that is over."""
        self._last_delivery_seq += 1
        names = (ids.events, ids.balances, ids.accounts)
        entry = LoggedDelivery(
            self._last_delivery_seq, *names, attempt, sent_at, timestamp, signature_valid, status, error
        )
        self.deliveries.append(entry)
        self._write_line("delivery", entry)

    def entries_after(self, call_seq: int, delivery_seq: int, account_id: str | None) -> dict[str, Any]:
        """The entries with higher sequence numbers, of one account if it is given."""
        calls = self.calls[bisect_right(self.calls, call_seq, key=lambda entry: entry.seq) :]
        deliveries = self.deliveries[bisect_right(self.deliveries, delivery_seq, key=lambda entry: entry.seq) :]
        if account_id is not None:
            calls = [call for call in calls if call.account_id == account_id]
            deliveries = [entry for entry in deliveries if account_id in entry.account_ids]
        return {"calls": [_as_dict(call) for call in calls], "deliveries": [_as_dict(entry) for entry in deliveries]}

    def summary(self) -> dict[str, Any]:
        """Counts. An unanswered call counts under `none`, a delivery without a status under its error."""
        return {
            "calls": len(self.calls),
            "accepted": sum(call.accepted for call in self.calls),
            "calls_by_scenario": Counter(call.scenario for call in self.calls),
            "calls_by_status": Counter(str(call.status or "none") for call in self.calls),
            "deliveries": len(self.deliveries),
            "deliveries_by_status": Counter(str(entry.status or entry.error) for entry in self.deliveries),
        }

    def reset(self) -> None:
        """Forget all entries; the file keeps its lines."""
        self.calls.clear()
        self.deliveries.clear()

    def _write_line(self, kind: str, entry: LoggedCall | LoggedDelivery) -> None:
        if self._file:
            self._file.write(json.dumps({"entry": kind, **_as_dict(entry)}) + "\n")
