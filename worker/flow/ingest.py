"""Ingest events of the provider: store balances and apply them, quarantine events, apply connection updates."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from config.log_config import get_logger
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import FailureReason, error_summary
from worker.flow.attribution import AttributedBalance, attribute_balance
from worker.flow.balance_inputs import LedgerReplies, by_account_id, send_loads_of_locked
from worker.flow.follow_up import FollowUp
from worker.flow.resolution import add_to_correlation_and_resolve_payments, fail_payments_with_fee_share
from worker.ledger import balances, payment_connections, quarantine
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, transaction
from worker.ledger.locks import try_lock_accounts
from worker.ledger.quarantine import QuarantinedEvent
from worker.quiltt.messages import BalanceWithEventId, UnparsedEvent
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.runtime import Runtime

log = get_logger(__name__)


def ingest_events_and_resolve_payments(
    rt: Runtime,
    received_balances: Sequence[BalanceWithEventId],
    unparsed_events: Sequence[UnparsedEvent] = (),
    connection_updates: Sequence[ConnectionUpdate] = (),
    *,
    is_poll: bool = False,
) -> FollowUp:
    """Store balances and quarantine unparseable events. Fail payments whose connection or profile is lost.

    `is_poll`: the balances were polled. Their arrival says nothing about their age, so it is never believed.

    Everything is committed on return. Repeating the call changes nothing. Balances resolve waiting payments at once,
    except on locked accounts: for those the `FollowUp` asks for a later apply.
    """
    now = rt.clock()
    follow_up = FollowUp()
    if unparsed_events or connection_updates:
        with transaction(rt.engine) as tx:
            quarantine.insert_events(tx, unparsed_events, now)
            follow_up = follow_up.plus(_move_or_fail_affected_payments(rt, tx, connection_updates))
    if received_balances:
        follow_up = follow_up.plus(
            _store_and_apply_newest_by_account_or_only_store(
                rt, _new_records(rt, received_balances, now, is_poll=is_poll)
            )
        )
    return follow_up


def _new_records(
    rt: Runtime, received_balances: Sequence[BalanceWithEventId], received_at: datetime, *, is_poll: bool = False
) -> list[BalanceRecord]:
    believe_arrival = rt.settings.refresh_balance_time == "arrival" and not is_poll
    return [
        balances.new_unapplied_record(received.event_id, received.balance, received_at, believe_arrival=believe_arrival)
        for received in received_balances
    ]


def _store_and_apply_newest_by_account_or_only_store(rt: Runtime, records: Sequence[BalanceRecord]) -> FollowUp:
    """Store balances and apply them in one transaction. If that fails for any reason, only store them.

    Only the newest balance of each account is applied, if it is new and no other transaction has locked the account.

    1. Try to lock the accounts, and load what the ledger has of them.
    2. Attribute the newest balance of each locked account, if it is not stored yet.
    3. Insert all balances in one statement: two transactions that insert the same balances must not deadlock.
    4. Resolve waiting payments with the attributed balances.
    """
    records = list({record.balance_id: record for record in records}.values())
    newest_by_account = {record.account_id: record for record in sorted(records, key=lambda record: record.age_rank)}
    try:
        with transaction(rt.engine) as tx:
            locked = try_lock_accounts(tx, newest_by_account)
            replies = send_loads_of_locked(
                tx, list(newest_by_account.values()), records, clock_skew=rt.settings.clock_skew, now=rt.clock()
            )
            attributed = _attribute_new_of_locked(rt, newest_by_account, locked.result(), replies)
            balances.insert_balances(tx, [*(balance.applied_record for balance in attributed), *records])
            result = add_to_correlation_and_resolve_payments(rt, tx, attributed, replies)
    except (*DATABASE_UNAVAILABLE, *REDIS_UNAVAILABLE) as error:
        log.warning("balance.apply_postponed", count=len(records), error=error_summary(error))
        return _store_for_later_apply(rt, records)
    except Exception:  # no error may lose a balance
        log.exception("balance.apply_failed", count=len(records))
        return _store_for_later_apply(rt, records)
    result.observe()
    not_applied = [record.balance_id for record in records if record.balance_id not in result.balance_ids]
    return result.follow_up.plus(FollowUp(balances_to_apply=not_applied))


def _attribute_new_of_locked(
    rt: Runtime,
    newest_by_account: Mapping[str, BalanceRecord],
    locked: Collection[str],
    replies: LedgerReplies,
) -> list[AttributedBalance]:
    stored_ids = {record.balance_id for record in replies.stored.result()}
    account_refreshes = by_account_id(replies.refreshes.result())
    return [
        attribute_balance(record, account_refreshes.get(account_id, ()), None, rt.settings.clock_skew)
        for account_id, record in newest_by_account.items()
        if account_id in locked and record.balance_id not in stored_ids
    ]


def _store_for_later_apply(rt: Runtime, records: Sequence[BalanceRecord]) -> FollowUp:
    with transaction(rt.engine) as tx:
        balances.insert_balances(tx, records)
    return FollowUp(balances_to_apply=[record.balance_id for record in records])


def _move_or_fail_affected_payments(rt: Runtime, tx: Tx, updates: Sequence[ConnectionUpdate]) -> FollowUp:
    """Apply connection updates in the order in which they occurred."""
    payment_connections.lock_payments_of_updates(tx, updates)
    follow_up = FollowUp()
    for update in sorted(updates, key=lambda update: update.at):
        if isinstance(update, AccountMoved):
            payment_connections.set_connection_of_waiting_if_newer(
                tx, update, max_requested_at=update.at + rt.settings.clock_skew
            )
        else:
            follow_up = follow_up.plus(_fail_payments_requested_before_loss(rt, tx, update))
    return follow_up


def _fail_payments_requested_before_loss(rt: Runtime, tx: Tx, lost: ConnectionLost) -> FollowUp:
    """Fail the payments of a lost connection or profile that were requested before it was lost."""
    requested_by = lost.at + rt.settings.clock_skew
    waiting = payment_connections.lock_waiting_by_connection(tx, lost, max_requested_at=requested_by)
    return FollowUp(
        deliveries=fail_payments_with_fee_share(rt, tx, waiting, FailureReason.CONNECTION_LOST, lost.detail)
    )


# --- quarantine -------------------------------------------------------------------------------------------------------


def store_balances_and_delete_quarantined(
    rt: Runtime, event: QuarantinedEvent, received_balances: Sequence[BalanceWithEventId]
) -> FollowUp:
    """Move an event that can be parsed now out of quarantine: store its balances as received when the event was."""
    with transaction(rt.engine) as tx:
        balances.insert_balances(tx, _new_records(rt, received_balances, event.received_at))
        quarantine.delete_events(tx, [event.quarantine_id])
    return FollowUp(balances_to_apply=[received.balance.id for received in received_balances])


def prune_quarantine_beyond_limits(rt: Runtime) -> None:
    """Delete the oldest events beyond the limits of the quarantine."""
    with transaction(rt.engine) as tx:
        count = quarantine.prune(tx, rt.clock())
    if count:
        log.error("quarantine.pruned", count=count)
