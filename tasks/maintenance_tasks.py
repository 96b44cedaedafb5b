"""Periodic tasks. They are safe if two `beat` processes send them, or if none does for a while.

They send no task events: two each second would soon push the payments out of Flower's memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from config.log_config import get_logger
from tasks.app import app
from tasks.dispatch import dispatch, redeliver_overdue_outcomes
from worker import flow
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE
from worker.ledger.retention import DeleteNotPermitted
from worker.quiltt import subscriptions
from worker.runtime import runtime, subscriptions_client

log = get_logger(__name__)


@app.task(name="payments.expire", send_events=False)
def expire_or_check_due_payments() -> None:
    """Fail payments at their deadline, and poll balances shortly before."""
    has_more = True
    with _skip_if_database_unavailable():
        while has_more:
            checked = flow.expire_poll_or_rejoin_due_payments(runtime())
            dispatch(checked.follow_up)
            has_more = checked.has_more


@app.task(name="payments.sweep", send_events=False)
def sweep() -> None:
    """Retry lost calls, balances and deliveries. Announce the API key to the role `dashboard`."""
    flow.announce_api_key(runtime())
    with _skip_if_database_unavailable():
        redeliver_overdue_outcomes()
        dispatch(flow.sweep_refreshes_and_balances(runtime()))


@app.task(name="webhooks.check_subscription", send_events=False)
def check_subscription() -> None:
    """Check that the provider has a working webhook subscription for `PAYREADY_WEBHOOK_URL`."""
    url = runtime().settings.webhook_url
    if url is not None:
        with subscriptions_client(runtime().settings) as client:
            subscriptions.log_subscription_problems_and_set_metric(client, url)


@app.task(name="quarantine.prune", send_events=False)
def prune_quarantine() -> None:
    """Delete quarantined events and dead letters beyond the limits of age, number and bytes."""
    for prune in (flow.prune_quarantine_beyond_limits, flow.prune_dead_letters_beyond_limits):
        try:
            prune(runtime())
        except DeleteNotPermitted as error:
            log.warning("retention.skipped", table=error.table, reason="delete_not_permitted")


@contextmanager
def _skip_if_database_unavailable() -> Iterator[None]:
    """Log one line instead of a traceback each second. The next run of the task tries again."""
    try:
        yield
    except DATABASE_UNAVAILABLE as error:
        log.error("maintenance.skipped", reason="database_unavailable", error=error_summary(error))
