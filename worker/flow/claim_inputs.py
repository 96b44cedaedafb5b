"""Load what the decisions on refresh calls need from the ledger."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from worker.flow.account_funds import accounts_with_needed_facts
from worker.flow.account_support import UnsupportedPayment, unsupported_payments
from worker.flow.claim_decision import AccountInputs, ClaimInputs
from worker.flow.follow_up import RefreshCall
from worker.ledger import accounts, balances, payments, refreshes
from worker.ledger.engine import Reply, Tx
from worker.ledger.locks import lock_accounts, try_lock_accounts
from worker.ledger.payments import WaitingPayment
from worker.rules.account_facts import AccountFacts
from worker.rules.states import IN_FLIGHT_STATES
from worker.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class LoadedClaims:
    """The inputs of the decisions on a batch of calls. Their accounts are locked."""

    now: datetime
    """Time of the decisions and claims, after the accounts were locked."""
    inputs: Sequence[ClaimInputs]
    unsupported: Sequence[UnsupportedPayment]
    """Waiting payments that no balance of their account can release. They are in no input."""
    contended: Sequence[RefreshCall]
    """Calls of accounts that are locked by another transaction. They have no inputs."""


def lock_and_load_claim_inputs(
    rt: Runtime, tx: Tx, calls: Sequence[RefreshCall], *, wait_for_locks: bool
) -> LoadedClaims:
    """Lock the accounts of these calls, and load the inputs of the decisions on the calls.

    Locks the waiting payments, too: a transaction that fails one of them must see the call that is made for it. No
    balance can release a payment after its deadline, so no call is made for it.

    All this is one round trip, unless account facts are needed.
    """
    account_ids = {call.account_id for call in calls}
    locking = _lock(tx, account_ids, wait_for_locks=wait_for_locks)
    stored = refreshes.find_in_flight_or_by_id(tx, account_ids, [call.refresh_id for call in calls])
    waiting_by_account = payments.lock_waiting_by_account(tx, account_ids)
    newest_balances = balances.newest_refresh_balance_for_waiting(tx, account_ids, rt.settings.clock_skew)
    records, locked = stored.result(), locking.result()
    now = rt.clock()  # after the wait for the locks
    by_id = {record.refresh_id: record for record in records}
    in_flight = {record.account_id: record for record in records if record.state in IN_FLIGHT_STATES}
    in_time = {
        account_id: [payment for payment in of_account if payment.deadline > now]
        for account_id, of_account in waiting_by_account.result().items()
        if account_id in locked
    }
    facts = accounts.find(tx, accounts_with_needed_facts(in_time)).result()
    unsupported = _unsupported(in_time, facts, now)
    failing = {payment.payment.payment_id for payment in unsupported}
    inputs = [
        ClaimInputs(
            account_id=call.account_id,
            refresh_id=call.refresh_id,
            refresh=by_id.get(call.refresh_id),
            account=AccountInputs(
                waiting=[payment for payment in in_time.get(call.account_id, ()) if payment.payment_id not in failing],
                in_flight=in_flight.get(call.account_id),
                newest_balance=newest_balances.result().get(call.account_id),
                facts=facts.get(call.account_id),
            ),
        )
        for call in calls
        if call.account_id in locked
    ]
    contended = [call for call in calls if call.account_id not in locked]
    return LoadedClaims(now=now, inputs=inputs, unsupported=unsupported, contended=contended)


def _lock(tx: Tx, account_ids: Collection[str], *, wait_for_locks: bool) -> Reply[set[str]]:
    """Lock these accounts, or only those that no other transaction has locked. Return the locked ones."""
    if not wait_for_locks:
        return try_lock_accounts(tx, account_ids)
    lock_accounts(tx, account_ids)
    return Reply.known(set(account_ids))


def _unsupported(
    waiting: Mapping[str, Sequence[WaitingPayment]], facts: Mapping[str, AccountFacts], now: datetime
) -> list[UnsupportedPayment]:
    """Return the payments that no balance of their account can release, by facts that are not stale."""
    return [
        payment
        for account_id, of_account in waiting.items()
        if (known := facts.get(account_id)) is not None and not known.are_stale(now)  # else they are read again first
        for payment in unsupported_payments(of_account, known)
    ]
