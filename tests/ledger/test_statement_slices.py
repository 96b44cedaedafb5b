"""A month's statement that is read in slices equals the one of the command line, whatever the times of the calls."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, insert

from tests.support.databases import Databases
from worker.ledger import statement_slices
from worker.ledger.archived_months import GROUPS
from worker.ledger.engine import Tx, open_engine, read_snapshot, transaction
from worker.ledger.period_statement import read_statement
from worker.ledger.tables import FEE_ENTRY, PAYMENT, REFRESH
from worker.rules.months import month_of
from worker.rules.statement_period import StatementPeriod

NOVEMBER = month_of(datetime(2026, 11, 1, tzinfo=UTC))
NEAR_BOUNDARIES_H = st.sampled_from([-30, -1, 0, 3, 4, 23, 24, 25, 47, 30 * 24 - 1, 30 * 24, 30 * 24 + 1])
"""Hours since the start of November."""


@st.composite
def _refreshes(draw: st.DrawFn) -> list[tuple[list[tuple[int, str | None, str, str]], int, int]]:
    """Return refreshes: their calls (hour, final state, currency, price), and the numbers of sharers and of reusers."""
    call = st.tuples(
        NEAR_BOUNDARIES_H,
        st.sampled_from([None, "posted", "void"]),
        st.sampled_from(["USD", "CAD"]),
        st.sampled_from(["0.10", "0.25"]),
    )
    refresh = st.tuples(st.lists(call, min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 2))
    return draw(st.lists(refresh, max_size=8))


@pytest.fixture(scope="module")
def engine(databases: Databases) -> Iterator[Engine]:
    engine = open_engine(databases.new(), connections=2)
    yield engine
    engine.dispose()


@contextmanager
def _rolled_back(engine: Engine) -> Iterator[Tx]:
    """Open a transaction that leaves nothing behind."""
    with suppress(_EndOfExample), transaction(engine) as tx:
        yield tx
        raise _EndOfExample


class _EndOfExample(Exception):
    pass


@given(refreshes=_refreshes(), entries_per_slice=st.integers(1, 6))
@example(refreshes=[([(0, None, "CAD", "0.10"), (4, None, "USD", "0.10")], 0, 1)], entries_per_slice=1)
@example(refreshes=[([(3, "posted", "USD", "0.10"), (3, "void", "USD", "0.25")], 2, 1)] * 3, entries_per_slice=2)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_slices_add_up_to_the_statement(
    engine: Engine, refreshes: list[tuple[list[tuple[int, str | None, str, str]], int, int]], entries_per_slice: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, _rolled_back(engine) as tx:
        patch.setattr(statement_slices, "ENTRIES_PER_SLICE", entries_per_slice)
        _insert(tx, refreshes)
        for by in GROUPS:
            expected = read_statement(tx, StatementPeriod(months=(NOVEMBER,)), by)
            assert statement_slices.read_month(tx, NOVEMBER, by) == expected
        days = [statement_slices.read_day(tx, day) for day in statement_slices.days_of(NOVEMBER, NOVEMBER.until)]
        assert [line for day in days for line in day.lines] == expected.lines


def _insert(tx: Tx, refreshes: list[tuple[list[tuple[int, str | None, str, str]], int, int]]) -> None:
    for number, (calls, sharers, reusers) in enumerate(refreshes):
        refresh_id, account_id = f"ref_{number}", f"acct_{number % 3}"
        tx.execute(insert(REFRESH).values(refresh_id=refresh_id, account_id=account_id, state="answered"))
        for place, (hour, state, currency, price) in enumerate(calls):
            called_at = NOVEMBER.since + timedelta(hours=hour)
            row = {
                "call_id": f"call_{number}_{place}",
                "refresh_id": refresh_id,
                "account_id": account_id,
                "price": Decimal(price),
                "currency": currency,
                "price_list": "2026-01-01",
                "called_at": called_at,
                "recorded_at": called_at,
            }
            mode = {"mode": "TEST"} if number % 2 else {}
            tx.execute(insert(FEE_ENTRY).values(**row, state="pending", evidence=mode))
            if state is not None:
                tx.execute(insert(FEE_ENTRY).values(**row, state=state, evidence={}))
        for place in range(sharers + reusers):
            at = NOVEMBER.since + timedelta(seconds=place)
            tx.execute(
                insert(PAYMENT).values(
                    payment_id=f"pay_{number}_{place}",
                    account_id=account_id,
                    state="released",
                    job={},
                    requested_at=at,
                    min_balance_at=at,
                    deadline=at,
                    due_at=at,
                    resolved_at=at,
                    refresh_id=refresh_id,
                    reused=place >= sharers,
                )
            )


def test_months_with_calls_are_named_newest_first(engine: Engine) -> None:
    with _rolled_back(engine) as tx:
        _insert(tx, [([(0, None, "USD", "0.10"), (-30, None, "USD", "0.10"), (24 * 90, None, "USD", "0.10")], 0, 0)])
        assert statement_slices.months_with_calls(tx) == ["2027-01", "2026-11", "2026-10"]


def test_months_of_an_empty_ledger_are_none(engine: Engine) -> None:
    with read_snapshot(engine) as tx:
        assert statement_slices.months_with_calls(tx) == []
