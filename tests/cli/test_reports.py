"""Reports from the ledger, with the same results on both databases."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError

from tests.cli.conftest import DIME, NOON, LedgerBuilder
from worker.ledger import fee_calls, fee_statement, payment_report, payments
from worker.ledger.engine import open_engine, read_snapshot, transaction
from worker.ledger.fee_statement import Savings, StatementLine
from worker.ledger.payment_search import PaymentFilter, search_payments
from worker.ledger.payment_shares import payment_shares_and_unshared_fees
from worker.ledger.tables import PAYMENT
from worker.rules.job import Job
from worker.rules.pricing import EntryState, Price, split_share
from worker.rules.states import PaymentState

pytestmark = pytest.mark.slow

NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)
DECIDED_BY: dict[str, Any] = {
    "clock_skew": timedelta(seconds=5),
    "default_hold_s": 86_400,
    "callback_queue": "celery",
}
_numbers = itertools.count()


def test_fee_shares_add_up_to_the_calls_that_are_not_void(history: LedgerBuilder) -> None:
    """Three payments share two calls of 0.10. The first two pay the remainder. A pending call makes them pending."""
    with read_snapshot(history.engine) as tx:
        fees = payment_report.fee_shares_by_payment(tx, ["ref_a", "ref_b"])
    assert {key: fee.amount for key, fee in fees.items()} == {
        "pay_1": Decimal("0.066667"),
        "pay_2": Decimal("0.066667"),
        "pay_3": Decimal("0.066666"),
        "pay_refused": Decimal(0),
    }
    assert sum(fee.amount for fee in fees.values()) == Decimal("0.200000")
    assert {fee.state for key, fee in fees.items() if key != "pay_refused"} == {EntryState.PENDING}
    assert fees["pay_refused"].state == EntryState.VOID
    assert fees["pay_1"].shared_by == 3


def test_payments_are_listed_newest_first(history: LedgerBuilder) -> None:
    """A released payment has a verdict, a failed one a reason."""
    with read_snapshot(history.engine) as tx:
        lines = search_payments(tx, PaymentFilter()).payments
        waiting = search_payments(tx, PaymentFilter(state=PaymentState.WAITING)).payments
        two = search_payments(tx, PaymentFilter(), limit=2).payments
    assert [(line.payment_id, line.verdict, line.reason) for line in lines] == [
        ("pay_waits", None, None),
        ("pay_refused", None, "account_not_found"),
        ("pay_reused", "not_requested", None),
        ("pay_3", None, "insufficient_funds"),
        ("pay_2", "sufficient", None),
        ("pay_1", "sufficient", None),
    ]
    assert [line.payment_id for line in waiting] == ["pay_waits"]
    assert two == lines[:2]
    assert lines[2].fee is None
    assert lines[2].reused


def test_timeline_has_every_step_of_a_payment(history: LedgerBuilder) -> None:
    """Job, calls with their fees, balance, verdict, deliveries."""
    with read_snapshot(history.engine) as tx:
        timeline = payment_report.payment_timeline(tx, "pay_3", **DECIDED_BY)
    assert timeline is not None
    assert timeline.job["metadata"] == {"order": 3}
    assert [(call.state, call.finalized_at) for call in timeline.calls] == [
        (EntryState.POSTED, NOON + timedelta(seconds=5)),
        (EntryState.PENDING, None),
    ]
    assert timeline.balance is not None
    assert timeline.balance.available == Decimal("60.00")
    assert timeline.funds_calculation is not None
    assert timeline.funds_calculation["available_after_holds"] == "10.00"
    assert [(delivery.task_id, delivery.delivered_at) for delivery in timeline.deliveries] == [("task-pay_3", None)]


def test_timeline_of_a_waiting_payment_has_the_refresh_of_its_account(history: LedgerBuilder) -> None:
    """A refresh is linked to a payment only when it resolves. An unknown payment has no timeline."""
    with read_snapshot(history.engine) as tx:
        timeline = payment_report.payment_timeline(tx, "pay_waits", **DECIDED_BY)
        assert payment_report.payment_timeline(tx, "pay_unknown", **DECIDED_BY) is None
    assert timeline is not None
    assert timeline.refresh is not None
    assert timeline.refresh.refresh_id == "ref_c"
    assert [call.state for call in timeline.calls] == [EntryState.POSTED]


def test_statement_counts_the_calls_of_its_month_in_their_present_state(history: LedgerBuilder) -> None:
    """A call belongs to the month in which it was made. The end of a month is part of the next one."""
    december = datetime(2026, 12, 1, tzinfo=UTC)
    history.call("ref_late", "acct_d", EntryState.POSTED, december - timedelta(microseconds=1))
    history.call("ref_next", "acct_e", EntryState.POSTED, december)
    with read_snapshot(history.engine) as tx:
        november = fee_statement.statement_lines(tx, NOVEMBER, december, "price")
        after = fee_statement.statement_lines(tx, december, datetime(2027, 1, 1, tzinfo=UTC), "price")
    dime = DIME.per_call
    line = StatementLine(
        key="2026-11-22",
        price=dime,
        currency="USD",
        calls=5,
        posted=3,
        pending=1,
        void=1,
        posted_amount=3 * dime,
        pending_amount=dime,
    )
    assert november == [line]
    assert after == [replace(line, calls=1, posted=1, pending=0, void=0, posted_amount=dime, pending_amount=Decimal(0))]


def test_statement_sums_are_exact(ledger: LedgerBuilder) -> None:
    """Three calls of 0.1 are 0.3. Each price, currency and price list has its own line."""
    for number in range(3):
        ledger.call(f"ref_{number}", f"acct_{number}", EntryState.POSTED)
    ledger.call(
        "ref_dear",
        "acct_x",
        EntryState.POSTED,
        price=Price(per_call=Decimal("0.333333"), currency="USD", price_list="2027-01-01"),
    )
    ledger.call(
        "ref_euro",
        "acct_y",
        EntryState.POSTED,
        price=Price(per_call=Decimal("0.100000"), currency="EUR", price_list="2026-11-22"),
    )
    with read_snapshot(ledger.engine) as tx:
        lines = fee_statement.statement_lines(tx, NOON, NOON + timedelta(days=1), "price")
    assert [(line.currency, line.calls, line.posted_amount) for line in lines] == [
        ("EUR", 1, Decimal("0.100000")),
        ("USD", 3, Decimal("0.300000")),
        ("USD", 1, Decimal("0.333333")),
    ]


def test_statement_shows_savings_by_account_and_day(history: LedgerBuilder) -> None:
    """Three payments shared two calls of 0.10, which saved 0.40. A reused balance saved another call."""
    ledger, day = history, timedelta(days=1)
    ledger.call("ref_next", "acct_d", EntryState.POSTED, NOON + day)
    saved = Savings(shared=2, by_sharing=Decimal("0.400000"), reused=1, by_reuse=Decimal("0.100000"))
    with read_snapshot(ledger.engine) as tx:
        accounts = fee_statement.statement_lines(tx, NOVEMBER, NOON + 2 * day, "account")
        days = fee_statement.statement_lines(tx, NOVEMBER, NOON + 2 * day, "day")
        savings = fee_statement.savings_by_currency(tx, NOVEMBER, NOON + 2 * day)
    assert [(line.key, line.calls, line.posted, line.pending, line.void) for line in accounts] == [
        ("acct_a", 2, 1, 1, 0),
        ("acct_b", 1, 0, 0, 1),
        ("acct_c", 1, 1, 0, 0),
        ("acct_d", 1, 1, 0, 0),
    ]
    assert [line.saved for line in accounts] == [saved, Savings(), Savings(), Savings()]
    assert [(line.key, line.calls) for line in days] == [("2026-11-22", 4), ("2026-11-23", 1)]
    assert [line.saved for line in days] == [saved, Savings()]
    assert savings == {"USD": saved}


def test_statement_by_payment_adds_up_to_the_calls_and_has_each_fee_share(history: LedgerBuilder) -> None:
    """A payment with a reused balance owes nothing. A call that no resolved payment shares has its own line."""
    with read_snapshot(history.engine) as tx:
        shares = list(payment_shares_and_unshared_fees(tx, NOVEMBER, NOON + timedelta(days=1)))
        fees = payment_report.fee_shares_by_payment(tx, ["ref_a", "ref_b"])
        lines = fee_statement.statement_lines(tx, NOVEMBER, NOON + timedelta(days=1), "price")
    by_payment = {share.payment_id: share for share in shares}
    assert {key: by_payment[key].fee for key in fees} == {key: fee.amount for key, fee in fees.items()}
    assert {key: by_payment[key].state for key in fees} == {key: fee.state for key, fee in fees.items()}
    assert (by_payment["pay_reused"].fee, by_payment["pay_reused"].saved) == (Decimal(0), Decimal("0.100000"))
    assert (by_payment[None].account_id, by_payment[None].fee) == ("acct_c", Decimal("0.100000"))
    assert sum(share.fee for share in shares) == sum(line.posted_amount + line.pending_amount for line in lines)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prices=st.lists(st.decimals(0, 10**6, places=6), min_size=1, max_size=3), sharers=st.integers(1, 7))
def test_shares_computed_by_the_database_equal_those_of_the_rules(
    ledger: LedgerBuilder, prices: list[Decimal], sharers: int
) -> None:
    """For any price, each payment gets the same millionths."""
    mark = f"{next(_numbers)}"
    for number in range(sharers):
        ledger.payment(f"p{number}_{mark}", f"acct_{mark}", NOON)
    for price in prices:
        ledger.call(
            f"ref_{mark}",
            f"acct_{mark}",
            EntryState.POSTED,
            NOON,
            Price(per_call=price, currency="USD", price_list="x"),
        )
    for number in range(sharers):
        end = NOON + timedelta(seconds=number)
        ledger.resolve(f"p{number}_{mark}", PaymentState.FAILED, end, reason="timeout", refresh_id=f"ref_{mark}")
    with read_snapshot(ledger.engine) as tx:
        shares = [
            s for s in payment_shares_and_unshared_fees(tx, NOON, NOON + timedelta(1)) if s.refresh_id == f"ref_{mark}"
        ]
    assert [s.fee for s in shares] == [split_share(sum(prices, Decimal(0)), sharers, index) for index in range(sharers)]


MONTH_END = datetime(2026, 12, 1, tzinfo=UTC)
JANUARY = datetime(2027, 1, 1, tzinfo=UTC)
prices = st.decimals(0, 10, places=6)
entry_states = st.sampled_from([None, EntryState.POSTED, EntryState.VOID])
times_near_month_end = st.integers(-90, 90).map(lambda seconds: MONTH_END + timedelta(seconds=seconds))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.tuples(prices, entry_states, times_near_month_end), min_size=1, max_size=4),
    sharers=st.integers(1, 5),
)
def test_refresh_with_calls_in_two_months_is_shared_once(
    ledger: LedgerBuilder, calls: list[tuple[Decimal, EntryState | None, datetime]], sharers: int
) -> None:
    """Each month adds up to its own calls. Over both, a payment owes its fee share, and reuse saved one call."""
    mark = f"{next(_numbers)}"
    account_id, refresh_id = f"acct_{mark}", f"ref_{mark}"
    calls.sort(key=lambda call: call[2])
    for price, end, at in calls:
        ledger.call(refresh_id, account_id, end, at, Price(per_call=price, currency="USD", price_list="x"))
    for number in range(sharers + 1):
        ledger.payment(f"p{number}_{mark}", account_id, calls[0][2])
        end_at, reused = MONTH_END + timedelta(hours=1, seconds=number), number == sharers
        ledger.resolve(f"p{number}_{mark}", PaymentState.RELEASED, end_at, refresh_id=refresh_id, reused=reused)
    with read_snapshot(ledger.engine) as tx:
        shares = payment_report.fee_shares_by_payment(tx, [refresh_id])
        months = [
            list(payment_shares_and_unshared_fees(tx, *span)) for span in ((NOVEMBER, MONTH_END), (MONTH_END, JANUARY))
        ]
        lines = [
            fee_statement.statement_lines(tx, *span, "account")
            for span in ((NOVEMBER, MONTH_END), (MONTH_END, JANUARY))
        ]
    months = [[share for share in month if share.refresh_id == refresh_id] for month in months]
    for month, month_lines in zip(months, lines, strict=True):
        account_lines = [line for line in month_lines if line.key == account_id]
        assert sum(s.fee for s in month) == sum(line.posted_amount + line.pending_amount for line in account_lines)
        assert all(s.fee >= 0 for s in month)
    for number in range(sharers):
        total = sum(s.fee for month in months for s in month if s.payment_id == f"p{number}_{mark}")
        assert total == shares[f"p{number}_{mark}"].amount
    saved = [s.saved for month in months for s in month if s.state == "reused" and s.saved]
    by_account = [line.saved for month_lines in lines for line in month_lines if line.key == account_id and line.saved]
    assert saved == [savings.by_reuse for savings in by_account if savings.by_reuse]
    assert len(saved) == (1 if shares[f"p0_{mark}"].total else 0)


currencies = st.sampled_from(["EUR", "USD"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    refreshes=st.lists(
        st.tuples(
            st.lists(
                st.tuples(prices, entry_states, times_near_month_end, st.sampled_from(["EUR", "USD"])), max_size=3
            ),
            st.lists(st.booleans(), max_size=4),
        ),
        max_size=5,
    )
)
def test_statement_by_payment_follows_the_rules_on_any_ledger(
    ledger: LedgerBuilder,
    refreshes: list[tuple[list[tuple[Decimal, EntryState | None, datetime, str]], list[bool]]],
) -> None:
    """Refreshes have any calls and payments. The shares are those of a few lines of Python, in their order."""
    mark = f"{next(_numbers)}"
    expected: list[tuple[str, str | None, str, Decimal, str, Decimal]] = []
    for place, (calls, reuses) in enumerate(refreshes):
        refresh_id, account_id = f"ref_{mark}_{place}", f"acct_{mark}x{place}"
        for price, end, at, currency in calls:
            ledger.call(refresh_id, account_id, end, at, Price(per_call=price, currency=currency, price_list="x"))
        for number, reused in enumerate(reuses if calls else []):
            payment_id, at = f"p{number}_{mark}_{place}", MONTH_END + timedelta(hours=1, seconds=number)
            ledger.payment(payment_id, account_id, MONTH_END)
            ledger.resolve(payment_id, PaymentState.RELEASED, at, refresh_id=refresh_id, reused=reused)
        for currency in ("EUR", "USD"):
            of_currency = [call for call in calls if call[3] == currency]
            earlier = [call for call in of_currency if call[2] < MONTH_END]
            if later := [call for call in of_currency if call[2] >= MONTH_END]:
                before, fee = (
                    sum((c[0] for c in of if c[1] != EntryState.VOID), Decimal(0)) for of in (earlier, later)
                )
                ends = {call[1] for call in later}
                state = "pending" if None in ends else "posted" if EntryState.POSTED in ends else "void"
                saved_by_reuse = max(call[0] for call in later) if fee and not before else Decimal(0)
                sharers = [number for number, reused in enumerate(reuses) if not reused]
                for index, number in enumerate(sharers):
                    shares = [split_share(total, len(sharers), index) for total in (before, before + fee)]
                    share = shares[1] - shares[0]
                    expected.append((refresh_id, f"p{number}_{mark}_{place}", currency, share, state, fee - share))
                if not sharers and fee:
                    expected.append((refresh_id, None, currency, fee, state, Decimal(0)))
                expected += [
                    (refresh_id, f"p{number}_{mark}_{place}", currency, Decimal(0), "reused", saved_by_reuse)
                    for number, reused in enumerate(reuses)
                    if reused
                ]
    with read_snapshot(ledger.engine) as tx:
        found = [
            (share.refresh_id, share.payment_id, share.currency, share.fee, share.state, share.saved)
            for share in payment_shares_and_unshared_fees(tx, MONTH_END, JANUARY)
            if share.account_id.startswith(f"acct_{mark}x")
        ]
    assert found == expected


@pytest.mark.parametrize("apart", [timedelta(seconds=20), timedelta(days=6), timedelta(days=8), timedelta(days=25)])
def test_shares_are_exact_however_far_apart_the_calls_are(ledger: LedgerBuilder, apart: timedelta) -> None:
    """A refresh has a call in each of two months. Both together are 0.20, which three payments share exactly."""
    at = MONTH_END + timedelta(seconds=10)
    for called_at in (at - apart, at):
        ledger.call("ref_1", "acct_1", EntryState.POSTED, called_at)
    for number in range(4):
        ledger.payment(f"p{number}", "acct_1", at)
        end_at = at + timedelta(seconds=number)
        ledger.resolve(f"p{number}", PaymentState.RELEASED, end_at, refresh_id="ref_1", reused=number == 3)
    months = ((NOVEMBER, MONTH_END), (MONTH_END, JANUARY))
    with read_snapshot(ledger.engine) as tx:
        shares = [share for month in months for share in payment_shares_and_unshared_fees(tx, *month)]
        savings = [fee_statement.savings_by_currency(tx, *month).get("USD", Savings()) for month in months]
    fees = {f"p{n}": sum(share.fee for share in shares if share.payment_id == f"p{n}") for n in range(3)}
    assert fees == {f"p{n}": split_share(Decimal("0.20"), 3, n) for n in range(3)}
    assert [share.saved for share in shares if share.payment_id == "p3"] == [Decimal("0.1"), Decimal(0)]
    assert [(each.shared, each.reused, each.by_reuse) for each in savings] == [(2, 1, Decimal("0.1")), (0, 0, 0)]


def test_pending_calls_are_listed_oldest_first(history: LedgerBuilder) -> None:
    """They were made before the given time."""
    history.call("ref_later", "acct_d", None, NOON + timedelta(hours=5))
    with read_snapshot(history.engine) as tx:
        early = fee_calls.pending_calls(tx, NOON + timedelta(hours=1))
        both = fee_calls.pending_calls(tx, NOON + timedelta(hours=6))
        assert fee_calls.pending_calls(tx, NOON) == []
    assert [(call.account_id, call.price) for call in early] == [("acct_a", DIME.per_call)]
    assert [call.account_id for call in both] == ["acct_a", "acct_d"]


def test_calls_are_counted_by_account_and_state(history: LedgerBuilder) -> None:
    """An account without calls is left out."""
    with read_snapshot(history.engine) as tx:
        calls = payment_report.call_counts_by_account(tx, ["acct_a", "acct_c", "acct_unknown"])
    assert calls == {"acct_a": {EntryState.POSTED: 1, EntryState.PENDING: 1}, "acct_c": {EntryState.POSTED: 1}}


def test_all_payments_with_the_given_ids_are_found(ledger: LedgerBuilder) -> None:
    """Unknown ids are ignored."""
    ids = [f"pay_{number:03}" for number in range(101)]
    with transaction(ledger.engine) as tx:
        jobs = [Job(payment_id=payment_id, account_id="acct_a") for payment_id in ids]
        payments.insert_payments(
            tx, [payments.new_payment(job, NOON + timedelta(seconds=second)) for second, job in enumerate(jobs)]
        )
        found = payment_report.find_payments(tx, [*ids[::-1], "pay_unknown"])
    assert [line.payment_id for line in found] == ids[::-1]


def test_reports_of_an_empty_ledger_are_empty(ledger: LedgerBuilder) -> None:
    with read_snapshot(ledger.engine) as tx:
        assert search_payments(tx, PaymentFilter()).payments == []
        assert payment_report.find_payments(tx, []) == []
        assert fee_statement.statement_lines(tx, NOON, NOON + timedelta(days=1), "day") == []
        assert list(payment_shares_and_unshared_fees(tx, NOON, NOON + timedelta(days=1))) == []


def test_reader_blocks_no_writer(ledger: LedgerBuilder) -> None:
    """It sees the ledger as of its first query."""
    ledger.payment("pay_1", "acct_a")
    with read_snapshot(ledger.engine) as tx:
        before = search_payments(tx, PaymentFilter())
        ledger.payment("pay_2", "acct_a")
        assert search_payments(tx, PaymentFilter()) == before
    with read_snapshot(ledger.engine) as tx:
        assert len(search_payments(tx, PaymentFilter()).payments) == 2


def test_read_snapshot_commits_no_write(ledger: LedgerBuilder) -> None:
    """PostgreSQL rejects the write, and SQLite rolls it back. The next transaction on the connection can write."""
    ledger.payment("pay_1", "acct_a")
    engine = open_engine(ledger.url, connections=1)
    with read_snapshot(engine) as tx:
        if tx.dialect.name == "postgresql":
            with pytest.raises(DBAPIError, match="read-only"):
                tx.execute(PAYMENT.update().values(reason="y"))
        else:
            tx.execute(PAYMENT.update().values(reason="y"))
    with transaction(engine) as tx:
        assert tx.execute(PAYMENT.select()).one().reason is None
        assert tx.execute(PAYMENT.update().values(reason="x")).rowcount == 1
    engine.dispose()
