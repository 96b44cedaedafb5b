"""A lost connection fails the payments that wait at that time, and no later ones."""

import itertools
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from tests.support.databases import Databases
from tests.support.in_process import START, InProcessSystem, TaskQueue
from worker import flow
from worker.ledger import payment_connections, payments
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, transaction
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate

A, B = "acct_a", "acct_b"


def lose_connection(payready: InProcessSystem, *, age_s: float = 0, **ids: str) -> None:
    """Ingest an event of this age about a lost connection or a deleted profile."""
    at = payready.clock() - timedelta(seconds=age_s)
    payready.queue.add(
        flow.ingest_events_and_resolve_payments(
            payready.rt, [], connection_updates=[ConnectionLost(detail="consent expired", at=at, **ids)]
        )
    )
    payready.run_tasks()


def test_lost_connection_fails_its_payments_and_they_share_their_call(
    payready: InProcessSystem,
) -> None:
    for name, account, job in (
        ("p1", A, {"connection_id": "conn_1"}),
        ("p2", A, {"connection_id": "conn_1", "profile_id": "p_1"}),
        ("p3", B, {"connection_id": "conn_2"}),
        ("p4", A, {}),
    ):
        payready.initiate(name, account, **job)
    payready.run_tasks()
    lose_connection(payready, connection_id="conn_1")
    assert [payready.state_or_reason(f"p{n}") for n in (1, 2, 3, 4)] == [
        "connection_lost",
        "connection_lost",
        "waiting",
        "waiting",
    ]
    assert payready.outcome("p1")["detail"] == "consent expired"
    shares = payready.rows("SELECT refresh_id, reused FROM payment WHERE reason = 'connection_lost'")
    assert all(row["refresh_id"] and not row["reused"] for row in shares)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state_or_reason("p4") == "released"
    assert payready.state_or_reason("p1") == "connection_lost"


def test_deleted_profile_fails_its_payments(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, profile_id="p_1")
    payready.initiate("p2", B, profile_id="p_2")
    lose_connection(payready, profile_id="p_1")
    assert [payready.state_or_reason("p1"), payready.state_or_reason("p2")] == ["connection_lost", "waiting"]


@pytest.mark.parametrize("age_s", [6, 3600])
def test_repeated_loss_event_does_not_fail_later_payments(payready: InProcessSystem, age_s: float) -> None:
    payready.initiate("p1", A, connection_id="conn_1", profile_id="p_1")
    lose_connection(payready, age_s=age_s, connection_id="conn_1")
    lose_connection(payready, age_s=age_s, profile_id="p_1")
    assert payready.state_or_reason("p1") == "waiting"


def test_call_without_a_waiting_payment_is_not_made(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, connection_id="conn_1")
    follow_up, payready.queue = payready.queue, TaskQueue()
    lose_connection(payready, connection_id="conn_1")
    payready.queue.add(follow_up)
    payready.run_tasks()
    assert payready.provider.calls == []


@pytest.mark.parametrize(
    ("moved", "states"),
    [
        ((A, "conn_2"), ["connection_lost", "waiting", "waiting"]),
        (("acct_z", "conn_2"), ["waiting", "waiting", "waiting"]),
    ],
)
def test_account_move_changes_the_connection_of_its_payments(
    payready: InProcessSystem, moved: tuple[str, str], states: list[Any]
) -> None:
    """It changes neither payments of other accounts nor payments without a connection."""
    payready.initiate("p1", A, connection_id="conn_1")
    payready.initiate("p2", B, connection_id="conn_1")
    payready.initiate("p3", A)
    account_id, connection_id = moved
    update = AccountMoved(account_id=account_id, connection_id=connection_id, at=payready.clock())
    payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=[update]))
    lose_connection(payready, connection_id="conn_2")
    assert [payready.state_or_reason(f"p{n}") for n in (1, 2, 3)] == states


@pytest.mark.parametrize("arrivals", [*itertools.permutations((0, 1, 2)), (0, 1, 2, 0), (2, 1, 0, 1, 0)])
@pytest.mark.parametrize("in_one_delivery", [True, False])
def test_account_follows_its_last_move_in_any_order_of_events(
    payready: InProcessSystem, arrivals: tuple[int, ...], *, in_one_delivery: bool
) -> None:
    """The events arrive repeatedly, late, or in one delivery."""
    payready.initiate("p1", A, connection_id="conn_1")
    start = payready.clock()
    moves = [AccountMoved(account_id=A, connection_id=f"conn_{n}", at=start + timedelta(seconds=n)) for n in (1, 2, 3)]
    deliveries_of_updates: list[list[ConnectionUpdate]] = (
        [[moves[n] for n in arrivals]] if in_one_delivery else [[moves[n]] for n in arrivals]
    )
    for updates in deliveries_of_updates:
        flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=updates)
    assert payready.payment("p1")["connection_id"] == "conn_3"


def test_repeated_old_move_does_not_affect_later_payments(payready: InProcessSystem) -> None:
    """Their jobs were sent after the move, and name the present connection."""
    at = payready.clock() - timedelta(seconds=6)
    payready.initiate("p1", A, connection_id="conn_1")
    flow.ingest_events_and_resolve_payments(
        payready.rt, [], connection_updates=[AccountMoved(account_id=A, connection_id="conn_2", at=at)]
    )
    assert payready.payment("p1")["connection_id"] == "conn_1"


@pytest.mark.parametrize(
    ("updates", "state"),
    [
        (("moved 1", "lost 2"), "waiting"),
        (("lost 2", "moved 1"), "waiting"),
        (("moved 2", "lost 1"), "connection_lost"),
        (("lost 1", "moved 2"), "connection_lost"),
        (("moved 1", "lost 1"), "waiting"),
        (("lost 1", "moved 1"), "connection_lost"),
    ],
)
def test_updates_of_one_delivery_apply_in_order_of_their_times(
    payready: InProcessSystem, updates: tuple[str, ...], state: str
) -> None:
    """Updates with equal times apply in the order of the delivery."""
    payready.initiate("p1", A, connection_id="conn_1")

    def parse(text: str) -> ConnectionUpdate:
        kind, at = text.split(maxsplit=1)[0], payready.clock() + timedelta(seconds=int(text[-1]))
        return (
            AccountMoved(account_id=A, connection_id="conn_2", at=at)
            if kind == "moved"
            else ConnectionLost(detail="consent expired", at=at, connection_id="conn_1")
        )

    payready.queue.add(
        flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=[parse(text) for text in updates])
    )
    payready.run_tasks()
    assert payready.state_or_reason("p1") == state


@pytest.mark.parametrize(
    "update",
    [
        AccountMoved(account_id=A, connection_id="conn_2", at=START),
        ConnectionLost(connection_id="conn_1", detail="consent expired", at=START),
    ],
)
def test_update_does_not_deadlock_over_a_payment_that_is_stored_meanwhile(
    payready: InProcessSystem, databases: Databases, monkeypatch: pytest.MonkeyPatch, update: ConnectionUpdate
) -> None:
    """Another transaction locks the new payment, and then waits for one that the update has locked."""
    if databases.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    payready.initiate("p2", A, connection_id="conn_1")
    lock_payments, errors = payment_connections.lock_payments_of_updates, list[Exception]()

    def lock_all() -> None:
        try:
            with transaction(payready.engine) as tx:
                payments.lock_waiting(tx, ["p1", "p2"])
        except DATABASE_UNAVAILABLE as error:
            errors.append(error)

    other = threading.Thread(target=lock_all)

    def lock_then_store_and_lock_another(tx: Tx, updates: Sequence[ConnectionUpdate]) -> None:
        lock_payments(tx, updates)
        payready.initiate("p1", A, connection_id="conn_1")
        other.start()
        other.join(0.3)
        assert other.is_alive()

    monkeypatch.setattr(payment_connections, "lock_payments_of_updates", lock_then_store_and_lock_another)
    flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=[update])
    other.join()
    assert not errors


def test_payment_of_a_connection_lost_during_the_call_shares_its_fee(payready: InProcessSystem) -> None:
    """The claim locks the waiting payments, so the transaction that fails them sees the call."""
    payready.initiate("p1", A, connection_id="conn_1")
    at = payready.clock()
    losing = threading.Thread(
        target=lambda: flow.ingest_events_and_resolve_payments(
            payready.rt,
            [],
            connection_updates=[ConnectionLost(detail="consent expired", at=at, connection_id="conn_1")],
        )
    )

    def lose_during_call() -> int:
        losing.start()
        losing.join(10)
        return 202

    payready.provider.script[A] = [lose_during_call]
    payready.run_tasks()
    assert payready.state_or_reason("p1") == "connection_lost"
    assert payready.payment("p1")["refresh_id"] is not None
