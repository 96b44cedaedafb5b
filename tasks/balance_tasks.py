"""`balances.refresh`: the one paid call; `balances.poll`: the free look, when a webhook may be lost."""

import logging
import threading
from typing import Any

from celery.signals import worker_ready

from tasks.app import app
from tasks.dispatch import dispatch
from worker import flow
from worker.errors import CallFailed
from worker.runtime import runtime

log = logging.getLogger(__name__)


@app.task(name="balances.refresh", Strategy="tasks.batch_strategies:call_strategy")
def refresh(account_id: str, refresh_id: str, has_slot: bool = False) -> None:  # noqa: FBT001, FBT002 - as it is sent
    """Make the refresh's call, unless it was made, or is not needed any more."""
    dispatch(flow.claim_and_call(runtime(), account_id, refresh_id, has_slot=has_slot))


@app.task(name="balances.poll")
def poll(account_id: str, profile_id: str) -> None:
    """Read the account's balance, before payments that wait for it expire."""
    dispatch(flow.poll_balance(runtime(), account_id, profile_id))


@worker_ready.connect
def _prefetch_key_mode(sender: Any, **_: Any) -> None:
    """Find out what calls cost before there is one, and say at once if our key is not to be used here."""
    if any(queue.name == "refreshes" for queue in sender.task_consumer.queues):
        threading.Thread(target=_log_key_mode, daemon=True).start()


def _log_key_mode() -> None:
    try:
        log.info("our key is for the provider's environment %s", runtime().api_key_mode())
    except CallFailed as trouble:
        log.error("no call is made: %s", trouble)
