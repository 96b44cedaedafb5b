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
@given(story=st.lists(events, min_size=4, max_size=25))
def test_no_order_of_releases_covers_more_than_the_balance(
    made_on_sqlite: MakeSystem, story: list[tuple[str, Any, Any]]
) -> None:
    """All that was released on the account since a balance's time, up to the last release by it, is covered by it."""
    with made_on_sqlite() as payready:
        for number, (what, first, second) in enumerate(story):
            payready.clock.advance(0.001)
            if what == "job":
                payready.initiate(f"p{number}", "acct_a", amount=first, max_balance_age_s=second)
            elif what == "balance":
                payready.balance("acct_a", second, at=payready.clock.now - timedelta(seconds=first))
            elif what == "work":
                payready.run_tasks()
            elif what == "lose":
                payready.drop_tasks()
            else:
                payready.clock.advance(first)
                payready.run_maintenance()
        payready.run_tasks()
        _covered(payready)


def _covered(payready: InProcessSystem) -> None:
    released = payready.rows(
        "SELECT p.balance_id, p.amount, p.resolved_at, b.at, b.available FROM payment p "
        "JOIN balance b USING (balance_id) WHERE p.state = 'released'"
    )
    for balance_id in {row["balance_id"] for row in released}:
        own = [row for row in released if row["balance_id"] == balance_id]
        last = max(row["resolved_at"] for row in own)
        since = [row for row in released if own[0]["at"] <= row["resolved_at"] <= last]
        assert sum(Decimal(row["amount"]) for row in since) <= Decimal(own[0]["available"])


def test_a_release_while_the_call_was_under_way_is_deducted_from_its_balance(made_on_sqlite: MakeSystem) -> None:
    """The balance's time may be that of its record; the bank may have been asked as early as the call went out."""
    with made_on_sqlite() as payready:
        payready.initiate("own", "acct_a", amount="80.00", max_balance_age_s=0)
        payready.run_tasks()
        payready.clock.advance(5)
        payready.initiate("early", "acct_a", amount="80.00", max_balance_age_s=300)
        payready.balance("acct_a", "100.00", at=payready.clock.now - timedelta(seconds=100))
        payready.run_tasks()
        assert payready.state("early") == "released"
        payready.clock.advance(20)
        payready.balance("acct_a", "100.00")
        payready.run_tasks()
        assert payready.outcome("own")["detail"] == "needed 80.00 USD, available 20.00 USD"
