"""A lost connection fails its waiting payments at once; events from before the payment do not."""

import itertools
import threading
from datetime import timedelta
from typing import Any

import pytest

from tests.support.in_process import InProcessSystem
from worker import flow
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate

A, B = "acct_a", "acct_b"


def lose_connection(payready: InProcessSystem, *, age_s: float = 0, **whose: str) -> None:
    """Ingest an event of this age about a connection or a profile."""
    at = payready.clock() - timedelta(seconds=age_s)
    payready.queue.merge(
        flow.ingest_events(payready.rt, [], connection_updates=[ConnectionLost("connection deleted", at, **whose)])
    )
    payready.run_tasks()


def test_lost_connection_fails_its_payments_with_their_fee_share(
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
    assert [payready.state(f"p{n}") for n in (1, 2, 3, 4)] == [
        "connection_lost",
        "connection_lost",
        "waiting",
        "waiting",
    ]
    assert payready.outcome("p1")["detail"] == "connection deleted"
    shares = payready.rows("SELECT refresh_id, reused FROM payment WHERE reason = 'connection_lost'")
    assert all(row["refresh_id"] and not row["reused"] for row in shares)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p4") == "released"
    assert payready.state("p1") == "connection_lost"


def test_deleted_profile_fails_its_payments(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, profile_id="p_1")
    payready.initiate("p2", B, profile_id="p_2")
    lose_connection(payready, profile_id="p_1")
    assert [payready.state("p1"), payready.state("p2")] == ["connection_lost", "waiting"]


@pytest.mark.parametrize("age_s", [6, 3600])
def test_repeated_event_does_not_fail_newer_payments(payready: InProcessSystem, age_s: float) -> None:
    payready.initiate("p1", A, connection_id="conn_1", profile_id="p_1")
    lose_connection(payready, age_s=age_s, connection_id="conn_1")
    lose_connection(payready, age_s=age_s, profile_id="p_1")
    assert payready.state("p1") == "waiting"


def test_call_without_a_waiting_payment_is_not_made(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, connection_id="conn_1")
    later, payready.queue = payready.queue, flow.FollowUp()
    lose_connection(payready, connection_id="conn_1")
    payready.queue.merge(later)
    payready.run_tasks()
    assert payready.provider.calls == []


@pytest.mark.parametrize(
    ("moved", "states"),
    [
        ((A, "conn_2"), ["connection_lost", "waiting", "waiting"]),
        (("acct_z", "conn_2"), ["waiting", "waiting", "waiting"]),
    ],
)
def test_moved_account_moves_its_payments_to_the_new_connection(
    payready: InProcessSystem, moved: tuple[str, str], states: list[Any]
) -> None:
    """Payments of other accounts and payments without a connection do not move."""
    payready.initiate("p1", A, connection_id="conn_1")
    payready.initiate("p2", B, connection_id="conn_1")
    payready.initiate("p3", A)
    payready.queue.merge(
        flow.ingest_events(payready.rt, [], connection_updates=[AccountMoved(*moved, payready.clock())])
    )
    lose_connection(payready, connection_id="conn_2")
    assert [payready.state(f"p{n}") for n in (1, 2, 3)] == states


@pytest.mark.parametrize("arrivals", [*itertools.permutations((0, 1, 2)), (0, 1, 2, 0), (2, 1, 0, 1, 0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_latest_move_of_an_account_wins_in_any_order(
    payready: InProcessSystem, arrivals: tuple[int, ...], *, at_once: bool
) -> None:
    """Events may be repeated, late, or in one delivery."""
    payready.initiate("p1", A, connection_id="conn_1")
    began = payready.clock()
    moves = [AccountMoved(A, f"conn_{n}", began + timedelta(seconds=n)) for n in (1, 2, 3)]
    deliveries: list[list[ConnectionUpdate]] = (
        [[moves[n] for n in arrivals]] if at_once else [[moves[n]] for n in arrivals]
    )
    for updates in deliveries:
        flow.ingest_events(payready.rt, [], connection_updates=updates)
    assert payready.payment("p1")["connection_id"] == "conn_3"


def test_repeated_old_move_does_not_affect_newer_payments(payready: InProcessSystem) -> None:
    """The payments service knew the move when it requested them."""
    at = payready.clock() - timedelta(seconds=6)
    payready.initiate("p1", A, connection_id="conn_1")
    flow.ingest_events(payready.rt, [], connection_updates=[AccountMoved(A, "conn_2", at)])
    assert payready.payment("p1")["connection_id"] == "conn_1"


@pytest.mark.parametrize(
    ("news", "state"),
    [
        (("moved 1", "broken 2"), "waiting"),
        (("broken 2", "moved 1"), "waiting"),
        (("moved 2", "broken 1"), "connection_lost"),
        (("broken 1", "moved 2"), "connection_lost"),
        (("moved 1", "broken 1"), "waiting"),
        (("broken 1", "moved 1"), "connection_lost"),
    ],
)
def test_events_of_one_delivery_apply_in_time_order(
    payready: InProcessSystem, news: tuple[str, ...], state: str
) -> None:
    """Events of the same time apply in the order of the delivery."""
    payready.initiate("p1", A, connection_id="conn_1")

    def happened(one: str) -> ConnectionUpdate:
        what, at = one.split(maxsplit=1)[0], payready.clock() + timedelta(seconds=int(one[-1]))
        return (
            AccountMoved(A, "conn_2", at)
            if what == "moved"
            else ConnectionLost("connection deleted", at, connection_id="conn_1")
        )

    payready.queue.merge(flow.ingest_events(payready.rt, [], connection_updates=[happened(one) for one in news]))
    payready.run_tasks()
    assert payready.state("p1") == state


def test_call_claimed_during_a_connection_loss_has_a_sharer(payready: InProcessSystem) -> None:
    """The claim locks the waiting payments, so the other transaction sees the call."""
    payready.initiate("p1", A, connection_id="conn_1")
    at = payready.clock()
    cut_off = threading.Thread(
        target=lambda: flow.ingest_events(
            payready.rt, [], connection_updates=[ConnectionLost("gone", at, connection_id="conn_1")]
        )
    )

    def meanwhile() -> int:
        cut_off.start()
        cut_off.join(10)
        return 202

    payready.provider.script[A] = [meanwhile]
    payready.run_tasks()
    assert payready.state("p1") == "connection_lost"
    assert payready.payment("p1")["refresh_id"] is not None
