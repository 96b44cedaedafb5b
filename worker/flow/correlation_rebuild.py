"""Rebuild an account's state in the correlation store from the ledger."""

from datetime import timedelta

from worker.correlation.redis_client import best_effort
from worker.correlation.store import ACCOUNT_TTL_S, AccountState, NewRefreshBalance
from worker.ledger import balances, refreshes
from worker.ledger.engine import Tx
from worker.runtime import Runtime

BALANCE_TTL = timedelta(seconds=ACCOUNT_TTL_S)
"""Maximum age of a balance that is copied: the correlation store would have expired an older one."""


def rebuild_correlation(rt: Runtime, tx: Tx, account_id: str) -> None:
    """Replace the account's state in the correlation store with the ledger's."""
    in_flight, requested = refreshes.in_flight_refresh(tx, account_id), refreshes.requested_refresh(tx, account_id)
    newest = balances.newest_refresh_balance_by_account(tx, [account_id], rt.clock() - BALANCE_TTL).get(account_id)
    state = AccountState(
        in_flight=in_flight.refresh_id if in_flight else None,
        called_at=in_flight.called_at if in_flight else None,
        requested=requested.refresh_id if requested else None,
        newest_balance=(
            NewRefreshBalance(account_id=account_id, balance_id=newest.balance_id, at=newest.as_of) if newest else None
        ),
    )
    best_effort("restore_account", rt.correlation.restore_account, account_id, state)


def clear_refresh_best_effort(rt: Runtime, account_id: str, refresh_id: str) -> None:
    """Remove a refresh that no balance will answer from the correlation store, if Redis is available."""
    best_effort("clear_refresh", rt.correlation.clear_requested_or_in_flight_refresh, account_id, refresh_id)
