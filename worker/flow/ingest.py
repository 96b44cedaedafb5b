"""Balances come in and meet those who wait for them."""

import logging
from collections.abc import Sequence
from datetime import datetime

from worker.errors import Reason
from worker.flow.attribution import billed_refresh_id, refresh_by_payment
from worker.flow.follow_up import FollowUp
from worker.flow.resolution import failed_resolution, resolve_with_balances
from worker.ledger import balances, payments, quarantine
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Tx, transaction
from worker.ledger.locks import try_lock_accounts
from worker.ledger.quarantine import QuarantinedEvent as SetAside
from worker.quiltt.messages import Balance
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate
from worker.runtime import Runtime

log = logging.getLogger(__name__)


def ingest_events(
    rt: Runtime,
    received_balances: Sequence[tuple[str, Balance]],
    unparsed_events: Sequence[tuple[bytes, str]] = (),
    connection_updates: Sequence[ConnectionUpdate] = (),
) -> FollowUp:
    """Keep balances, given with the ids of their events, and set events aside that nobody understands.

    Payments of connections and profiles that broke down fail: no balance will come for them. When this returns
    everything is safe, and that it was known before changes nothing. Balances settle who waits for them at once, as
    far as that needs no waiting for anybody else.
    """
    now = rt.clock()
    after = FollowUp()
    if unparsed_events or connection_updates:
        with transaction(rt.engine) as tx:
            quarantine.insert_events(tx, unparsed_events, now)
            after.merge(_apply_connection_updates(rt, tx, connection_updates, now))
    if received_balances:
        after.merge(
            _store_and_apply(
                rt, [balances.new_record(event_id, balance, now) for event_id, balance in received_balances]
            )
        )
    return after


def _store_and_apply(rt: Runtime, records: Sequence[BalanceRecord]) -> FollowUp:
    """Keep balances and apply them, in one transaction; should that fail, only keep them.

    Applied are the first one of each account, if it is new, and if nobody else holds the account.
    """
    records = list({balance.balance_id: balance for balance in records}.values())
    first = {balance.account_id: balance for balance in reversed(records)}

    def note(tx: Tx, applied: Sequence[BalanceRecord]) -> set[str]:
        return balances.insert_balances(
            tx, [*applied, *records]
        )  # at once, in one order: or who keeps the same waits for each other

    try:
        with transaction(rt.engine) as tx:
            free = try_lock_accounts(tx, first)
            applied = resolve_with_balances(rt, tx, [b for b in first.values() if b.account_id in free], note)
    except Exception as error:  # noqa: BLE001 - whatever it was: a balance must not be lost over it
        log.warning("balances are kept now, and applied later: %s: %s", type(error).__name__, error)
        with transaction(rt.engine) as tx:
            balances.insert_balances(tx, records)
        return FollowUp(balances_to_apply=[balance.balance_id for balance in records])
    applied.observe_latency()
    applied.follow_up.balances_to_apply += [b.balance_id for b in records if b.balance_id not in applied.balance_ids]
    return applied.follow_up


def requeue_from_quarantine(rt: Runtime, event: SetAside, received_balances: Sequence[tuple[str, Balance]]) -> FollowUp:
    """Take out of quarantine what is understood now: keep its balances, if any are ours, as of when it came."""
    with transaction(rt.engine) as tx:
        balances.insert_balances(tx, [balances.new_record(*one, event.received_at) for one in received_balances])
        quarantine.delete_events(tx, [event.quarantine_id])
    return FollowUp(balances_to_apply=[balance.id for _, balance in received_balances])


def prune_quarantine(rt: Runtime) -> None:
    """Drop the oldest events beyond the quarantine's bounds."""
    with transaction(rt.engine) as tx:
        dropped = quarantine.prune(tx, rt.clock())
    if dropped:
        log.error("%s events were dropped from the quarantine, which is full or has held them for long", dropped)


def _apply_connection_updates(rt: Runtime, tx: Tx, updates: Sequence[ConnectionUpdate], now: datetime) -> FollowUp:
    """Take what happened in the order in which it did, and fail payments by it."""
    payments.lock_affected(tx, updates)
    after = FollowUp()
    for one in sorted(updates, key=lambda one: one.at):
        if isinstance(one, AccountMoved):
            payments.move_to_connection(tx, one, requested_by=one.at + rt.settings.clock_skew)
        else:
            after.merge(_fail_connection(rt, tx, one, now))
    return after


def _fail_connection(rt: Runtime, tx: Tx, connection_lost: ConnectionLost, now: datetime) -> FollowUp:
    """Fail who waits behind it; who was requested later was requested in the knowledge of it, or after its repair."""
    waiting = payments.lock_waiting_by_connection(
        tx, connection_lost, requested_by=connection_lost.at + rt.settings.clock_skew
    )
    by = refresh_by_payment(rt, tx, waiting)
    lost = [
        failed_resolution(w, Reason.CONNECTION_LOST, connection_lost.detail, now, billed_refresh_id(by[w.payment_id]))
        for w in waiting
    ]
    return FollowUp(deliveries=payments.resolve(tx, lost))
