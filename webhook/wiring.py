"""The objects that the endpoint shares between requests. They are built when this module is imported."""

import threading
from collections.abc import Sequence

from tasks.app import app as celery
from tasks.dispatch import dispatch_leaving_callbacks_to_workers
from webhook.events import ParsedDelivery
from webhook.group_commit import GroupCommitter
from webhook.readiness import SharedReadinessCheck
from worker import flow
from worker.flow import FollowUp
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.ledger.server_state import find_write_problem
from worker.runtime import runtime


def _commit(deliveries: Sequence[ParsedDelivery]) -> FollowUp:
    balances = [balance for delivery in deliveries for balance in delivery.balances]
    unparsed = [event for delivery in deliveries for event in delivery.unparsed]
    updates = [update for delivery in deliveries for update in delivery.connection_updates]
    return flow.ingest_events_and_resolve_payments(runtime(), balances, unparsed, updates)


def _dispatch(follow_ups: Sequence[FollowUp]) -> None:
    merged = FollowUp()
    for follow_up in follow_ups:
        merged = merged.plus(follow_up)
    dispatch_leaving_callbacks_to_workers(merged)


def _find_database_problem() -> str | None:
    """Return why events cannot be committed now, or None if they can."""
    try:
        return find_write_problem(runtime().engine)
    except DATABASE_UNAVAILABLE:
        return "the database is unavailable"


# Register payready's tasks: `web` stores results as the suspended task, and Celery needs the task object for that.
celery.loader.import_default_modules()

group_committer = GroupCommitter(
    _commit, _dispatch, unavailable_errors=DATABASE_UNAVAILABLE, is_available=lambda: _find_database_problem() is None
)
readiness = SharedReadinessCheck(_find_database_problem)
draining = threading.Event()
"""Set when the process begins to drain: it is not ready any more."""
