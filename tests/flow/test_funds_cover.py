"""No balance covers more releases than its amount, in any order of jobs and balances."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.in_process import InProcessSystem, MakeSystem

amounts = st.sampled_from(["30.00", "50.00", "80.00"])
events = st.one_of(
    st.tuples(st.just("job"), amounts, st.sampled_from([0, 5, 60, 300])),
    st.tuples(st.just("balance"), st.integers(0, 20), st.sampled_from(["50.00", "100.00", "120.00"])),
    st.tuples(st.just("work"), st.none(), st.none()),
    st.tuples(st.just("lose"), st.none(), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([1, 8, 70]), st.none()),
)


@settings(max_examples=25, deadline=None)
@given(events_in_order=st.lists(events, min_size=4, max_size=25))
def test_releases_never_exceed_the_balance_in_any_order_of_events(
    make_sqlite_system: MakeSystem, events_in_order: list[tuple[str, Any, Any]]
) -> None:
    """A balance covers all releases on the account from its time to the last release by it."""
    with make_sqlite_system() as payready:
        for number, (kind, first, second) in enumerate(events_in_order):
            payready.clock.advance(0.001)
            if kind == "job":
                payready.initiate(f"p{number}", "acct_a", amount=first, max_balance_age_s=second)
            elif kind == "balance":
                payready.balance("acct_a", second, at=payready.clock.now - timedelta(seconds=first))
            elif kind == "work":
                payready.run_tasks()
            elif kind == "lose":
                payready.drop_tasks()
            else:
                payready.clock.advance(first)
                payready.run_maintenance()
        payready.run_tasks()
        _assert_balances_cover_releases(payready)


def _assert_balances_cover_releases(payready: InProcessSystem) -> None:
    released = payready.rows(
        "SELECT p.balance_id, p.amount, p.resolved_at, b.at, b.available FROM payment p "
        "JOIN balance b USING (balance_id) WHERE p.state = 'released'"
    )
    for balance_id in {row["balance_id"] for row in released}:
        own = [row for row in released if row["balance_id"] == balance_id]
        last = max(row["resolved_at"] for row in own)
        since = [row for row in released if own[0]["at"] <= row["resolved_at"] <= last]
        assert sum(Decimal(row["amount"]) for row in since) <= Decimal(own[0]["available"])


def test_release_during_the_call_is_deducted_from_its_balance(make_sqlite_system: MakeSystem) -> None:
    """The amounts may be older than the balance's time: as old as the call."""
    with make_sqlite_system() as payready:
        payready.initiate("own", "acct_a", amount="80.00", max_balance_age_s=0)
        payready.run_tasks()
        payready.clock.advance(5)
        payready.initiate("early", "acct_a", amount="80.00", max_balance_age_s=300)
        payready.balance("acct_a", "100.00", at=payready.clock.now - timedelta(seconds=100))
        payready.run_tasks()
        assert payready.state_or_reason("early") == "released"
        payready.clock.advance(20)
        payready.balance("acct_a", "100.00")
        payready.run_tasks()
        assert payready.outcome("own")["detail"].startswith("needed 80.00 USD, available 20.00 USD; ")
