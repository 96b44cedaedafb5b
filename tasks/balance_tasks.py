"""`balances.refresh` makes the billed call. `accounts.read` before it and `balances.poll` after it are free reads."""

import threading
from typing import Any

from celery.signals import worker_ready

from config.log_config import get_logger
from config.settings import settings
from tasks.app import app
from tasks.dispatch import dispatch
from worker import flow
from worker.errors import CallFailed, CallRejected
from worker.runtime import runtime

log = get_logger(__name__)


@app.task(name="balances.refresh")
def make_refresh_call_if_needed(account_id: str, refresh_id: str, has_slot: bool = False) -> None:  # noqa: FBT001, FBT002 - as sent
    """Make the call of the refresh, unless it was made or no payment needs it."""
    dispatch(flow.claim_and_call(runtime(), account_id, refresh_id, has_slot=has_slot))


@app.task(name="balances.poll")
def poll_balance_and_fail_unsupported_accounts(account_id: str, profile_id: str) -> None:
    """Read and ingest the account's balance before its payments expire. Fail payments that no balance can release."""
    dispatch(flow.poll_balance_and_resolve_payments(runtime(), account_id, profile_id))


@app.task(name="accounts.read")
def read_account_and_enqueue_call(account_id: str, profile_id: str, refresh_id: str) -> None:
    """Read the account's kind and currency, fail payments that no balance can release, and enqueue the call."""
    dispatch(flow.read_account_and_call_if_needed(runtime(), account_id, profile_id, refresh_id))


@worker_ready.connect
def _prefetch_key_mode_in_refresh_role(sender: Any, **_: Any) -> None:
    """Detect the mode of the API key, which sets the price of calls, before the first call."""
    refreshes = f"{settings().name_prefix}refreshes"
    if any(queue.name == refreshes for queue in sender.task_consumer.queues):
        threading.Thread(target=_detect_and_log_key_mode, daemon=True).start()


def _detect_and_log_key_mode() -> None:
    """Detect the mode of the API key, which is then cached, and log it, or log why no call is made yet."""
    try:
        log.info("api_key.mode_detected", mode=runtime().fetch_allowed_api_key_mode_once())
    except CallRejected as error:
        log.error("api_key.rejected", error=str(error))
    except CallFailed as error:  # each call tries again
        log.warning("api_key.check_failed", error=str(error))
