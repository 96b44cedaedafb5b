"""The search for payments: each condition, pages by key, and a bounded amount of work."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import insert, text

from tests.support.databases import Databases
from tests.support.in_process import START
from tests.support.statements import collected_statements
from worker.errors import FailureReason
from worker.ledger import payment_search
from worker.ledger.engine import Engine, Tx, open_engine, read_snapshot, transaction
from worker.ledger.payment_search import DeliveryProblem, PageKey, PaymentFilter, PaymentPage, search_payments
from worker.ledger.tables import OUTCOME_DELIVERY, PAYMENT
from worker.rules.states import PaymentState

COUNT = 2000
MINUTE = timedelta(minutes=1)
METADATA: Mapping[int, Any] = {
    1990: {"order": "A-17", "paid": True, "count": 5, "ünï": "é", 'a"b.c': "quoted", "$": "root", "none": None},
    1975: {"order": "A-17", "nul": "\0", "half": "\ud800"},
    1970: {"order": "😀"},
    5: {"order": "oldest"},
}


def _row(number: int) -> dict[str, Any]:
    """Return a payment of one of 100 accounts. The last 20 wait; of the others each 10th failed."""
    at = START + number * MINUTE
    is_waiting, is_failed = number >= COUNT - 20, number % 10 == 0
    return {
        "payment_id": f"p{number}",
        "account_id": f"acct_{number % 100}",
        "state": "waiting" if is_waiting else "failed" if is_failed else "released",
        "job": {"payment_id": f"p{number}", "currency": "EUR", "metadata": METADATA.get(number, {})},
        "amount": Decimal(f"{number}.50"),
        "requested_at": at,
        "min_balance_at": at,
        "deadline": at,
        "due_at": at,
        "resolved_at": None if is_waiting else at,
        "reason": "timeout" if is_failed and not is_waiting else None,
        "hold_until": None if is_waiting or is_failed or number % 7 == 0 else at,
        "reused": False,
        "outcome": None if is_waiting else {"verdict": "sufficient"},
    }


@pytest.fixture(scope="module")
def engine(databases: Databases) -> Iterator[Engine]:
    engine = open_engine(databases.new(), connections=2)
    with transaction(engine) as tx:
        tx.execute(insert(PAYMENT), [_row(number) for number in range(COUNT)])
        tasks: list[dict[str, Any]] = [
            {"task_id": f"t{n}", "payment_id": f"p{n}", "continuation": {}} for n in range(COUNT)
        ]
        tasks[3]["due_at"], tasks[5]["undeliverable"] = START, "the callback is unknown"
        tx.execute(insert(OUTCOME_DELIVERY), [{"due_at": None, "undeliverable": None, **task} for task in tasks])
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    yield engine
    engine.dispose()


def search(engine: Engine, conditions: PaymentFilter, **options: Any) -> PaymentPage:
    with read_snapshot(engine) as tx:
        return search_payments(tx, conditions, **options)


def ids(page: PaymentPage) -> list[str]:
    return [line.payment_id for line in page.payments]


def numbers(*, state: str | None = None, **values: Any) -> list[str]:
    """Return the ids of the payments with these values, the last requested first."""
    rows = [_row(number) for number in reversed(range(COUNT))]
    expected = values | ({"state": state} if state else {})
    return [row["payment_id"] for row in rows if all(row[name] == value for name, value in expected.items())]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (PaymentFilter(), numbers()[:50]),
        (PaymentFilter(payment_id="p7"), ["p7"]),
        (PaymentFilter(payment_id="p7", account_id="acct_8"), []),
        (PaymentFilter(payment_id="unknown"), []),
        (PaymentFilter(task_id="t7"), ["p7"]),
        (PaymentFilter(task_id="t7", payment_id="p8"), []),
        (PaymentFilter(account_id="acct_7"), numbers(account_id="acct_7")),
        (PaymentFilter(account_id="acct_90"), numbers(account_id="acct_90")),
        (
            PaymentFilter(account_id="acct_90", state=PaymentState.FAILED),
            numbers(account_id="acct_90", state="failed"),
        ),
        (PaymentFilter(account_id="acct_90", state=PaymentState.WAITING), ["p1990"]),
        (PaymentFilter(state=PaymentState.WAITING), numbers(state="waiting")),
        (PaymentFilter(state=PaymentState.RELEASED), numbers(state="released")[:50]),
        (PaymentFilter(reason=FailureReason.TIMEOUT), numbers(reason="timeout")[:50]),
        (PaymentFilter(reason=FailureReason.CANCELLED), []),
        (PaymentFilter(amount=Decimal("17.5")), ["p17"]),
        (PaymentFilter(since=START + 5 * MINUTE, until=START + 7 * MINUTE), ["p6", "p5"]),
        (PaymentFilter(since=START + 99 * MINUTE, account_id="acct_99", until=START + 200 * MINUTE), ["p199", "p99"]),
        (PaymentFilter(resolved_since=START + 5 * MINUTE, resolved_until=START + 7 * MINUTE), ["p6", "p5"]),
        (PaymentFilter(resolved_since=START + 1979 * MINUTE), ["p1979"]),
        (PaymentFilter(resolved_until=START + 2 * MINUTE, account_id="acct_1"), ["p1"]),
        (PaymentFilter(delivery=DeliveryProblem.UNDELIVERED), ["p3"]),
        (PaymentFilter(delivery=DeliveryProblem.UNDELIVERABLE), ["p5"]),
        (PaymentFilter(delivery=DeliveryProblem.UNDELIVERABLE, account_id="acct_3"), []),
        (PaymentFilter(metadata={"order": "A-17"}, state=PaymentState.WAITING), ["p1990"]),
        (PaymentFilter(metadata={"order": "A-17", "paid": "true", "count": "5"}), ["p1990"]),
        (PaymentFilter(metadata={"order": "A-17", "paid": "false"}), []),
        (PaymentFilter(metadata={"ünï": "é", 'a"b.c': "quoted", "$": "root"}), ["p1990"]),
        (PaymentFilter(metadata={"order": "😀"}), ["p1970"]),
        (PaymentFilter(metadata={"order": "oldest"}), ["p5"]),
        (PaymentFilter(metadata={"missing": "x"}), []),
        (PaymentFilter(metadata={"none": "None"}), []),
    ],
    ids=str,
)
def test_search_finds_the_matching_payments_last_requested_first(
    engine: Engine, conditions: PaymentFilter, expected: list[str]
) -> None:
    assert ids(search(engine, conditions)) == expected


def test_metadata_that_postgresql_cannot_read_hides_no_other_payment(engine: Engine) -> None:
    """Its JSON functions raise errors for NUL and for half of a surrogate pair."""
    found = ids(search(engine, PaymentFilter(metadata={"order": "A-17"})))
    assert found == (["p1990", "p1975"] if engine.dialect.name == "sqlite" else ["p1990"])


@pytest.mark.parametrize(
    "conditions",
    [
        PaymentFilter(payment_id="\0"),
        PaymentFilter(task_id="t\0"),
        PaymentFilter(account_id="\ud800"),
        PaymentFilter(metadata={"\0": "x"}),
        PaymentFilter(metadata={"order": "\udfff"}),
        PaymentFilter(amount=Decimal("NaN")),
        PaymentFilter(amount=Decimal("1e999999")),
        PaymentFilter(payment_id="' OR 1=1 --"),
        PaymentFilter(metadata={"') OR 1=1 --": '"'}),
    ],
    ids=repr,
)
def test_value_that_no_payment_can_have_finds_none(engine: Engine, conditions: PaymentFilter) -> None:
    """It is no error: the value comes from a person."""
    assert search(engine, conditions).payments == []


def test_page_has_currency_of_its_payments(engine: Engine) -> None:
    [line] = search(engine, PaymentFilter(payment_id="p7")).payments
    assert (line.amount, line.currency) == (Decimal("7.50"), "EUR")


@pytest.mark.parametrize("conditions", [PaymentFilter(), PaymentFilter(account_id="acct_3")], ids=["all", "account"])
def test_pages_have_each_payment_once(engine: Engine, conditions: PaymentFilter) -> None:
    """Also if several have the same time."""
    with transaction(engine) as tx:
        tx.execute(insert(PAYMENT), [_same_time(number) for number in range(5)])
    try:
        pages, after = [], None
        while True:
            page = search(engine, conditions, after=after, limit=7)
            pages.append(page)
            if page.next_page is None:
                break
            assert len(page.payments) == 7
            after = PageKey.parse(str(page.next_page))
        found = [payment_id for page in pages for payment_id in ids(page)]
        assert len(found) == len(set(found)) == (COUNT if not conditions.account_id else COUNT // 100) + 5
        assert {page.searched_back_to for page in pages} == {None}
    finally:
        with transaction(engine) as tx:
            tx.execute(PAYMENT.delete().where(PAYMENT.c.payment_id.like("same%")))


def _same_time(number: int) -> dict[str, Any]:
    return _row(3) | {"payment_id": f"same{number}"}


def test_search_without_index_stops_and_continues(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It states how far it has come. The next page continues there, until all payments are examined."""
    monkeypatch.setattr(payment_search, "MAX_EXAMINED", 800)
    conditions = PaymentFilter(metadata={"order": "oldest"})
    first = search(engine, conditions)
    assert (first.payments, first.searched_back_to) == ([], START + 1200 * MINUTE)
    second = search(engine, conditions, after=first.next_page)
    assert (second.payments, second.searched_back_to) == ([], START + 400 * MINUTE)
    third = search(engine, conditions, after=second.next_page)
    assert (ids(third), third.next_page, third.searched_back_to) == (["p5"], None, None)
    within = replace(conditions, since=START + 1300 * MINUTE)
    assert search(engine, within) == PaymentPage(payments=[], next_page=None, searched_back_to=None)


def test_account_with_many_payments_is_searched_by_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """To sort all of them for each page would take too long."""
    monkeypatch.setattr(payment_search, "MAX_EXAMINED", 15)
    with collected_statements(engine) as statements:
        page = search(engine, PaymentFilter(account_id="acct_3"))
    assert page.searched_back_to == START + (COUNT - 15) * MINUTE
    assert not any("MATERIALIZED" in statement for statement, _ in statements)


def test_page_key_is_refused_unless_a_page_has_printed_it() -> None:
    key = PageKey(requested_at=datetime(2026, 11, 22, 12, tzinfo=UTC), payment_id="a/b")
    assert (str(key), PageKey.parse(str(key))) == ("2026-11-22T12:00:00Z/a/b", key)
    for text_of_key in ("", "x", "2026-11-22T12:00:00Z", "2026-11-22T12:00:00/p", "0001-01-01T00:00:00+23:00/p"):
        with pytest.raises(ValueError, match="must be the key that the page before has printed"):
            PageKey.parse(text_of_key)


INDEXES_BY_CONDITION = {
    "all": (PaymentFilter(), {"payment_requested"}),
    "period": (PaymentFilter(since=START, until=START + 50 * MINUTE), {"payment_requested"}),
    "id": (PaymentFilter(payment_id="p7"), {"payment_pkey", "sqlite_autoindex_payment_1"}),
    "task": (PaymentFilter(task_id="t7"), {"outcome_delivery_pkey", "sqlite_autoindex_outcome_delivery_1"}),
    "account": (PaymentFilter(account_id="acct_7"), {"payment_waiting", "payment_hold", "payment_without_hold"}),
    "waiting": (PaymentFilter(state=PaymentState.WAITING), {"payment_due_at"}),
    "resolved": (PaymentFilter(resolved_since=START, resolved_until=START + 50 * MINUTE), {"payment_resolved"}),
    "undelivered": (PaymentFilter(delivery=DeliveryProblem.UNDELIVERED), {"outcome_delivery_due_at"}),
    "undeliverable": (PaymentFilter(delivery=DeliveryProblem.UNDELIVERABLE), {"outcome_delivery_undeliverable"}),
    "reason": (PaymentFilter(reason=FailureReason.CANCELLED), {"payment_requested"}),
    "metadata": (PaymentFilter(metadata={"order": "missing"}), {"payment_requested"}),
}


@pytest.mark.parametrize("name", INDEXES_BY_CONDITION)
def test_search_uses_indexes(engine: Engine, name: str) -> None:
    """No plan reads all payments. The plans are those without sequential scans: the table of the test is small."""
    conditions, indexes = INDEXES_BY_CONDITION[name]
    with collected_statements(engine) as statements:
        search(engine, conditions, after=PageKey(requested_at=START + 900 * MINUTE, payment_id="p900"))
    explain = "EXPLAIN " if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with read_snapshot(engine) as tx:
        if engine.dialect.name == "postgresql":
            tx.execute(text("SET LOCAL enable_seqscan = off"))
        plans = "\n".join(
            _plan(tx, explain + sql, given) for sql, given in statements if sql.startswith(("SEL", "WITH"))
        )
    used = {index for index in indexes if index in plans}
    assert len(used) == len([index for index in indexes if not index.startswith("sqlite_")]), plans
    assert not re.search(r"Seq Scan on|SCAN payment$", plans, re.MULTILINE), plans


def _plan(tx: Tx, statement: str, given: Any) -> str:
    return "\n".join(str(row[-1]) for row in tx.connection_after_queue().exec_driver_sql(statement, given))
