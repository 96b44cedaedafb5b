"""A payment whose connection breaks down fails at once, and not because of what happened before it came."""

import itertools
import threading
from datetime import timedelta
from typing import Any

import pytest

from tests.support.in_process import InProcessSystem, TaskQueue
from worker import flow
from worker.rules.connections import AccountMoved, ConnectionLost, ConnectionUpdate

A, B = "acct_a", "acct_b"


def break_down(payready: InProcessSystem, *, age_s: float = 0, **whose: str) -> None:
    """An event of this age comes in about a connection or a profile."""
    at = payready.clock() - timedelta(seconds=age_s)
    payready.queue.add(
        flow.ingest_events_and_resolve_payments(
            payready.rt, [], connection_updates=[ConnectionLost(detail="it is gone", at=at, **whose)]
        )
    )
    payready.run_tasks()


def test_payments_of_a_connection_that_broke_down_fail_at_once_and_share_the_call_that_was_made_for_them(
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
    break_down(payready, connection_id="conn_1")
    assert [payready.state(f"p{n}") for n in (1, 2, 3, 4)] == [
        "connection_lost",
        "connection_lost",
        "waiting",
        "waiting",
    ]
    assert payready.outcome("p1")["detail"] == "it is gone"
    shares = payready.rows("SELECT refresh_id, reused FROM payment WHERE reason = 'connection_lost'")
    assert all(row["refresh_id"] and not row["reused"] for row in shares)
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p4") == "released"
    assert payready.state("p1") == "connection_lost"


def test_payments_of_a_profile_that_was_deleted_fail_at_once(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, profile_id="p_1")
    payready.initiate("p2", B, profile_id="p_2")
    break_down(payready, profile_id="p_1")
    assert [payready.state("p1"), payready.state("p2")] == ["connection_lost", "waiting"]


@pytest.mark.parametrize("age_s", [6, 3600])
def test_an_event_that_is_sent_again_does_not_fail_payments_that_came_since(
    payready: InProcessSystem, age_s: float
) -> None:
    payready.initiate("p1", A, connection_id="conn_1", profile_id="p_1")
    break_down(payready, age_s=age_s, connection_id="conn_1")
    break_down(payready, age_s=age_s, profile_id="p_1")
    assert payready.state("p1") == "waiting"


def test_call_without_a_waiting_payment_is_not_made(payready: InProcessSystem) -> None:
    payready.initiate("p1", A, connection_id="conn_1")
    later, payready.queue = payready.queue, TaskQueue()
    break_down(payready, connection_id="conn_1")
    payready.queue.add(later)
    payready.run_tasks()
    assert payready.provider.calls == []


@pytest.mark.parametrize(
    ("moved", "states"),
    [
        ((A, "conn_2"), ["connection_lost", "waiting", "waiting"]),
        (("acct_z", "conn_2"), ["waiting", "waiting", "waiting"]),
    ],
)
def test_an_account_that_moves_takes_its_payments_along(
    payready: InProcessSystem, moved: tuple[str, str], states: list[Any]
) -> None:
    """But no others, and none that named no connection."""
    payready.initiate("p1", A, connection_id="conn_1")
    payready.initiate("p2", B, connection_id="conn_1")
    payready.initiate("p3", A)
    account_id, connection_id = moved
    update = AccountMoved(account_id=account_id, connection_id=connection_id, at=payready.clock())
    payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=[update]))
    break_down(payready, connection_id="conn_2")
    assert [payready.state(f"p{n}") for n in (1, 2, 3)] == states


@pytest.mark.parametrize("arrivals", [*itertools.permutations((0, 1, 2)), (0, 1, 2, 0), (2, 1, 0, 1, 0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_account_follows_its_last_move_in_any_order_of_events(
    payready: InProcessSystem, arrivals: tuple[int, ...], *, at_once: bool
) -> None:
    """Twice, late, or all at once."""
    payready.initiate("p1", A, connection_id="conn_1")
    began = payready.clock()
    moves = [AccountMoved(account_id=A, connection_id=f"conn_{n}", at=began + timedelta(seconds=n)) for n in (1, 2, 3)]
    deliveries_of_updates: list[list[ConnectionUpdate]] = (
        [[moves[n] for n in arrivals]] if at_once else [[moves[n]] for n in arrivals]
    )
    for news in deliveries_of_updates:
        flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=news)
    assert payready.payment("p1")["connection_id"] == "conn_3"


def test_repeated_old_move_does_not_affect_later_payments(payready: InProcessSystem) -> None:
    """They were requested in the knowledge of it, and of what came after it."""
    at = payready.clock() - timedelta(seconds=6)
    payready.initiate("p1", A, connection_id="conn_1")
    flow.ingest_events_and_resolve_payments(
        payready.rt, [], connection_updates=[AccountMoved(account_id=A, connection_id="conn_2", at=at)]
    )
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
def test_updates_of_one_delivery_apply_in_order_of_their_times(
    payready: InProcessSystem, news: tuple[str, ...], state: str
) -> None:
    """By their times, and with equal times in the order of the delivery."""
    payready.initiate("p1", A, connection_id="conn_1")

    def happened(one: str) -> ConnectionUpdate:
        what, at = one.split(maxsplit=1)[0], payready.clock() + timedelta(seconds=int(one[-1]))
        return (
            AccountMoved(account_id=A, connection_id="conn_2", at=at)
            if what == "moved"
            else ConnectionLost(detail="it is gone", at=at, connection_id="conn_1")
        )

    payready.queue.add(
        flow.ingest_events_and_resolve_payments(payready.rt, [], connection_updates=[happened(one) for one in news])
    )
    payready.run_tasks()
    assert payready.state("p1") == state


def test_a_call_that_is_claimed_while_its_only_payment_is_cut_off_has_a_sharer(payready: InProcessSystem) -> None:
    """The claim locks the waiting payments, so the other transaction sees the call."""
    payready.initiate("p1", A, connection_id="conn_1")
    at = payready.clock()
    cut_off = threading.Thread(
        target=lambda: flow.ingest_events_and_resolve_payments(
            payready.rt, [], connection_updates=[ConnectionLost(detail="gone", at=at, connection_id="conn_1")]
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
