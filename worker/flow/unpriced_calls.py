"""Defer or reject calls whose price is unknown: no call is made without its fee entry."""

from collections.abc import Sequence

from config.log_config import get_logger, log_context
from worker.errors import CallFailed, CallRejected
from worker.flow.follow_up import FollowUp, RefreshCall
from worker.flow.resolution import reject_refresh_and_fail_payments
from worker.ledger import payments, refreshes
from worker.ledger.engine import Tx, transaction
from worker.ledger.locks import lock_accounts
from worker.rules import states
from worker.rules.states import RefreshState
from worker.runtime import Runtime

log = get_logger(__name__)


def defer_or_reject_unpriced_calls(rt: Runtime, calls: Sequence[RefreshCall], error: CallFailed) -> FollowUp:
    """Defer the calls, or reject them if the error is permanent. One transaction a call."""
    follow_up = FollowUp()
    for call in calls:
        with log_context(account_id=call.account_id, refresh_id=call.refresh_id):
            log.warning("refresh_call.not_priced", error=str(error))
        with transaction(rt.engine) as tx:
            lock_accounts(tx, [call.account_id])
            follow_up = follow_up.plus(_defer_or_reject_if_needed(rt, tx, call, error))
    return follow_up


def _defer_or_reject_if_needed(rt: Runtime, tx: Tx, call: RefreshCall, error: CallFailed) -> FollowUp:
    """Defer or reject the call, unless another refresh is in flight or no payment waits."""
    now = rt.clock()
    refresh = refreshes.find(tx, call.refresh_id)
    if (
        refreshes.in_flight_refresh(tx, call.account_id)
        or payments.balance_time_bounds_of_waiting(tx, call.account_id) is None
    ):
        return FollowUp()  # another worker has claimed a call, or no payment needs one
    if refresh is None:
        refresh = refreshes.new_refresh(call.account_id, call.refresh_id, now)
        refreshes.insert_refreshes(tx, [refresh])
    if isinstance(error, CallRejected):
        return reject_refresh_and_fail_payments(rt, tx, refresh, error.reason, str(error), now)
    if refresh.state == RefreshState.REQUESTED:
        refreshes.defer_if_unchanged(tx, refresh, now + states.backoff(refresh.deferral_count), str(error))
    return FollowUp()
