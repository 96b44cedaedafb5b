"""Load what the decisions on refresh calls need from the ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from worker.flow.account_funds import accounts_with_needed_facts
from worker.flow.account_support import UnsupportedPayment, unsupported_payments
from worker.flow.claim_decision import AccountInputs, ClaimInputs
from worker.flow.follow_up import RefreshCall
from worker.ledger import accounts, balances, payments, refreshes
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Tx
from worker.ledger.payments import WaitingPayment
from worker.rules.states import IN_FLIGHT_STATES


@dataclass(frozen=True, kw_only=True)
class LoadedClaims:
    """The inputs of the decisions on a batch of calls."""

    inputs: Sequence[ClaimInputs] = ()
    unsupported: Sequence[UnsupportedPayment] = ()
    """Waiting payments that no balance of their account can release. They are in no input."""


def load_claim_inputs_and_lock_payments(
    tx: Tx, calls: Sequence[RefreshCall], now: datetime, clock_skew: timedelta
) -> LoadedClaims:
    """Load the inputs of the decisions on these calls. The accounts must be locked.

    Locks the waiting payments: a transaction that fails one of them must see the call that is made for it. No balance
    can release a payment after its deadline, so no call is made for it.
    """
    if not calls:
        return LoadedClaims()
    account_ids = {call.account_id for call in calls}
    records = refreshes.find_in_flight_or_by_id(tx, account_ids, [call.refresh_id for call in calls]).result()
    by_id = {record.refresh_id: record for record in records}
    in_flight = {record.account_id: record for record in records if record.state in IN_FLIGHT_STATES}
    in_time = {
        account_id: [payment for payment in of_account if payment.deadline > now]
        for account_id, of_account in payments.lock_waiting_by_account(tx, account_ids).result().items()
    }
    facts = accounts.find(tx, accounts_with_needed_facts(in_time)).result()
    unsupported = [
        payment
        for account_id, of_account in in_time.items()
        if (known := facts.get(account_id)) is not None and not known.are_stale(now)  # else they are read again first
        for payment in unsupported_payments(of_account, known)
    ]
    failing = {payment.payment.payment_id for payment in unsupported}
    waiting = {
        account_id: [payment for payment in of_account if payment.payment_id not in failing]
        for account_id, of_account in in_time.items()
    }
    newest_balances = _newest_balances_where_all_accept_reuse(tx, waiting, clock_skew)
    inputs = [
        ClaimInputs(
            account_id=call.account_id,
            refresh_id=call.refresh_id,
            refresh=by_id.get(call.refresh_id),
            account=AccountInputs(
                waiting=waiting.get(call.account_id, ()),
                in_flight=in_flight.get(call.account_id),
                newest_balance=newest_balances.get(call.account_id),
                facts=facts.get(call.account_id),
            ),
        )
        for call in calls
    ]
    return LoadedClaims(inputs=inputs, unsupported=unsupported)


def _newest_balances_where_all_accept_reuse(
    tx: Tx, waiting: Mapping[str, Sequence[WaitingPayment]], clock_skew: timedelta
) -> Mapping[str, BalanceRecord]:
    """Return the newest balances of accounts whose waiting payments all accept a balance from before their requests."""
    candidates = [
        payment
        for of_account in waiting.values()
        if all(payment.job.max_balance_age_s for payment in of_account)
        for payment in of_account
    ]
    if not candidates:
        return {}
    oldest = min(payment.min_balance_at for payment in candidates) - clock_skew
    return balances.newest_refresh_balance_by_account(tx, {payment.account_id for payment in candidates}, oldest)
