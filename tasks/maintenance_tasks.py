"""What time brings, on every beat. Two beats at once, or none for a while, do no harm.

No events are sent of them: two a second would soon push the payments out of what Flower remembers.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.app import app
from tasks.dispatch import deliver_overdue, dispatch
from worker import flow
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.quiltt import subscriptions
from worker.runtime import runtime
from worker.runtime import subscriptions_client as provider_subscriptions

log = logging.getLogger(__name__)


@app.task(name="payments.expire", send_events=False)
def expire() -> None:
    """Fail payments whose deadline has passed."""
    more = True
    with _skip_if_database_unavailable():
        while more:
            todo = flow.expire_due_payments(runtime())
            dispatch(todo)
            more = todo.has_more


@app.task(name="payments.sweep", send_events=False)
def sweep() -> None:
    """Make good what was lost on the way: calls, balances, deliveries."""
    with _skip_if_database_unavailable():
        deliver_overdue()
        dispatch(flow.sweep(runtime()))


@app.task(name="webhooks.check_subscription", send_events=False)
def check_subscription() -> None:
    """See whether the provider still delivers to us."""
    url = runtime().settings.webhook_url
    if url is not None:
        with provider_subscriptions(runtime().settings) as provider:
            subscriptions.check_subscription(provider, url)


@app.task(name="quarantine.prune", send_events=False)
def prune_quarantine() -> None:
    """Keep the quarantine within its bounds."""
    flow.prune_quarantine(runtime())


@contextmanager
def _skip_if_database_unavailable() -> Iterator[None]:
    """Say in a line that it does not: the next tick tries again, and a traceback a second would drown all else."""
    try:
        yield
    except DATABASE_UNAVAILABLE as error:
        log.error("upkeep stands still, the database is away: %s", " ".join(str(getattr(error, "orig", error)).split()))
