"""Parse quarantined events again, with the present version."""

from dataclasses import dataclass
from enum import StrEnum

from tasks.celery_connection import enqueue_apply
from tasks.celery_errors import CeleryUnavailable
from webhook import events
from worker import flow
from worker.ledger.quarantine import QuarantinedEvent
from worker.runtime import Runtime


class ReplayResult(StrEnum):
    """Result of parsing a quarantined event again."""

    APPLIED = "applied"
    """The event has balances: they are stored, and removed from quarantine."""
    IRRELEVANT = "irrelevant"
    """The event parses and has nothing for payready: removed."""
    STILL_UNPARSEABLE = "still_unparseable"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of an event that was parsed again."""

    result: ReplayResult
    problem: str | None = None
    """Why the tasks that apply its balances were not enqueued. The sweep applies them then."""


def replay_only_balances(rt: Runtime, event: QuarantinedEvent) -> Replay:
    """Parse an event again.

    If it parses, store and apply its balances, drop the rest, and remove it from quarantine.
    """
    try:
        parsed = events.parse_quarantined(event.event, event.received_at)
    except events.UnparseableEvent:
        return Replay(result=ReplayResult.STILL_UNPARSEABLE)
    # Only balances are applied: a connection update of a quarantined delivery is out of date.
    follow_up = flow.store_balances_and_delete_quarantined(rt, event, parsed.balances)
    result = ReplayResult.APPLIED if parsed.balances else ReplayResult.IRRELEVANT
    try:
        enqueue_apply(rt.settings, follow_up.balances_to_apply)
    except CeleryUnavailable as error:
        return Replay(result=result, problem=str(error))
    return Replay(result=result)
