"""Log of all calls and delivery attempts since the start or the last reset, in memory.

A call is added when it is received; its status is set when the response is sent. A delivery attempt is added when it
has ended. Sequence numbers start at 1 and continue after a reset. All times are Unix seconds.
"""

import json
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from simulator.quiltt_records import BodyIds


@dataclass(slots=True, kw_only=True)
class LoggedCall:
    """One refresh call."""

    seq: int
    account_id: str
    started_at: float
    authenticated: bool
    scenario: str
    effective_scenario: str
    """Differs from `scenario` for `mix` only."""
    accepted: bool
    """Whether the provider bills the call."""
    balance_id: str | None = None
    """Id of the balance that this call will create."""
    status: int | None = None
    """None until the response is sent, and without a response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedDelivery:
    """One delivery attempt."""

    seq: int
    event_ids: tuple[str, ...]
    balance_ids: tuple[str, ...]
    account_ids: tuple[str, ...]
    attempt: int
    sent_at: float
    timestamp: int
    """Value of `Quiltt-Timestamp`."""
    signature_valid: bool
    """Whether the secret was right. The age of the timestamp is ignored: compare `timestamp` with `sent_at`."""
    status: int | None
    error: str | None
    """Name of the error, if there was no response."""


_FIELD_NAMES = {kind: tuple(column.name for column in fields(kind)) for kind in (LoggedCall, LoggedDelivery)}


def _as_dict(entry: LoggedCall | LoggedDelivery) -> dict[str, Any]:
    """Convert an entry as `dataclasses.asdict` does. That makes deep copies and takes five times as long."""
    return {name: getattr(entry, name) for name in _FIELD_NAMES[type(entry)]}


class RequestLog:
    """Log in memory, append-only until `reset`. With a path, finished entries are also appended there as JSON lines."""

    def __init__(self, path: Path | None = None) -> None:
        self.calls: list[LoggedCall] = []
        self.deliveries: list[LoggedDelivery] = []
        self._last_call_seq = 0
        self._last_delivery_seq = 0
        self._file = path.open("a", buffering=1) if path else None

    def add_unfinished_call(
        self,
        *,
        account_id: str,
        started_at: float,
        authenticated: bool,
        scenario: str,
        effective_scenario: str,
        accepted: bool,
    ) -> LoggedCall:
        """Add a call that was received. Its status is not known yet."""
        self._last_call_seq += 1
        call = LoggedCall(
            seq=self._last_call_seq,
            account_id=account_id,
            started_at=started_at,
            authenticated=authenticated,
            scenario=scenario,
            effective_scenario=effective_scenario,
            accepted=accepted,
        )
        self.calls.append(call)
        return call

    def finish_and_write_call(self, call: LoggedCall, status: int | None) -> None:
        """Set the status of a call, None if it got no response. Append the call to the file if there is one."""
        call.status = status
        self._write_line_if_file("call", call)

    def add_and_write_delivery_attempt(
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
        """Add a delivery attempt that has ended, and append it to the file if there is one."""
        self._last_delivery_seq += 1
        entry = LoggedDelivery(
            seq=self._last_delivery_seq,
            event_ids=ids.events,
            balance_ids=ids.balances,
            account_ids=ids.accounts,
            attempt=attempt,
            sent_at=sent_at,
            timestamp=timestamp,
            signature_valid=signature_valid,
            status=status,
            error=error,
        )
        self.deliveries.append(entry)
        self._write_line_if_file("delivery", entry)

    def entries_after(self, call_seq: int, delivery_seq: int, account_id: str | None) -> dict[str, Any]:
        """Return the entries with higher sequence numbers, of one account if it is given."""
        calls = self.calls[bisect_right(self.calls, call_seq, key=lambda entry: entry.seq) :]
        deliveries = self.deliveries[bisect_right(self.deliveries, delivery_seq, key=lambda entry: entry.seq) :]
        if account_id is not None:
            calls = [call for call in calls if call.account_id == account_id]
            deliveries = [entry for entry in deliveries if account_id in entry.account_ids]
        return {"calls": [_as_dict(call) for call in calls], "deliveries": [_as_dict(entry) for entry in deliveries]}

    def counts_by_scenario_and_status(self) -> dict[str, Any]:
        """Return counts. A call without a response counts under `none`, a delivery without a status under its error."""
        return {
            "calls": len(self.calls),
            "accepted": sum(call.accepted for call in self.calls),
            "calls_by_scenario": Counter(call.scenario for call in self.calls),
            "calls_by_status": Counter(str(call.status or "none") for call in self.calls),
            "deliveries": len(self.deliveries),
            "deliveries_by_status": Counter(str(entry.status or entry.error) for entry in self.deliveries),
        }

    def delete_entries_in_memory(self) -> None:
        """Delete all entries from memory. The file is not changed."""
        self.calls.clear()
        self.deliveries.clear()

    def _write_line_if_file(self, kind: str, entry: LoggedCall | LoggedDelivery) -> None:
        if self._file:
            self._file.write(json.dumps({"entry": kind, **_as_dict(entry)}) + "\n")
