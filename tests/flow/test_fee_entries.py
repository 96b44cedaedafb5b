"""Invariant 4: every attempted call has an entry that was written before it; entries are only added."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support.in_process import PRICES, START, InProcessSystem
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.ledger import fee_entries
from worker.ledger.engine import transaction
from worker.ledger.fee_entries import FinalEntry
from worker.rules.pricing import EntryState, parse_price_list

A = "acct_fees"


def test_pending_entry_is_committed_before_the_call(payready: InProcessSystem) -> None:
    """During the call, another connection sees the entry with its price and price list."""
    seen: list[dict[str, object]] = []

    def read_ledger() -> int:
        seen.extend(payready.rows("SELECT state, price, currency, price_list, account_id FROM fee_entry"))
        return 202

    payready.provider.script[A] = [read_ledger]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert [(row["state"], Decimal(str(row["price"]))) for row in seen] == [("pending", Decimal("0.100000"))]
    assert (seen[0]["currency"], seen[0]["price_list"], seen[0]["account_id"]) == ("USD", "test", A)


@pytest.mark.parametrize(
    ("result", "entries"),
    [
        (202, ["1 pending", "1 posted"]),
        (CallRejected(404, FailureReason.ACCOUNT_NOT_FOUND, "unknown"), ["1 pending", "1 void"]),
        (RateLimited("rate limit", None), ["1 pending", "1 void"]),
        (CallNotSent("no connection"), ["1 pending", "1 void"]),
        (CallResultUnknown("read timeout"), ["1 pending"]),
        (CallResultUnknown("500", 500), ["1 pending"]),
    ],
)
def test_call_result_determines_the_final_entry(
    payready: InProcessSystem, result: int | CallFailed, entries: list[str]
) -> None:
    """Accepted is posted, rejected is void, and an unknown result stays pending."""
    payready.provider.script[A] = [result]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.fees(A) == entries


def test_balance_posts_an_uncertain_call(payready: InProcessSystem) -> None:
    """The balance proves that the call was accepted; the entry names the event as evidence."""
    payready.provider.script[A] = [CallResultUnknown("read timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.clock.advance(2)
    balance_id = payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert balance_id in str(payready.rows("SELECT evidence FROM fee_entry WHERE state = 'posted'")[0]["evidence"])
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}


def test_balance_before_the_response_posts_once(payready: InProcessSystem) -> None:
    """The webhook arrives before the 202: one posted entry, and the refresh stays answered."""

    def webhook_first() -> int:
        payready.balance(A)
        payready.run_tasks()
        return 202

    payready.provider.script[A] = [webhook_first]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.refreshes(A) == ["answered"]


def test_balance_posts_neither_of_two_uncertain_calls(payready: InProcessSystem) -> None:
    """Both stay pending, and the outcome has a pending fee."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(16)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "2 pending"]
    assert payready.outcome("p1")["fee"] == {"amount": "0.200000", "currency": "USD", "state": "pending"}


def test_late_balance_posts_its_call_and_serves_the_next_payment(payready: InProcessSystem) -> None:
    """After the deadline the first payment stays failed. The next one needs no call and owes nothing."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), CallNotSent("no connection")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(10)
    assert payready.state("p1") == "provider_unavailable"
    payready.clock.advance(20)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.state("p1") == "provider_unavailable"
    payready.clock.advance(5)
    payready.initiate("p2", A)
    payready.run_tasks()
    outcome = payready.outcome("p2")
    assert outcome["state"] == "released"
    assert outcome["fee"] == {"amount": "0", "currency": "USD", "state": "reused"}
    assert outcome["shared_by"] == 0
    assert payready.provider.calls == [A]


def test_balance_after_the_window_answers_the_refresh(payready: InProcessSystem) -> None:
    """`unanswered` is not final: a late balance still posts the fee."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(80)
    assert payready.refreshes(A) == ["unanswered"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.refreshes(A) == ["answered"]
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_balance_from_before_the_call_does_not_post_it(payready: InProcessSystem) -> None:
    """It is older than the call by more than the clock skew."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A, max_balance_age_s=60)
    payready.run_tasks()
    payready.balance(A, at=START - timedelta(seconds=6))
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert payready.fees(A) == ["1 pending"]
    assert payready.refreshes(A) == ["uncertain"]


def test_late_balance_posts_the_call_of_an_abandoned_refresh(payready: InProcessSystem) -> None:
    """The second call was deferred until no payment was waiting; the first one had been accepted."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), *[CallNotSent("no connection")] * 9]
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(25)
    assert payready.refreshes(A) == ["abandoned"]
    payready.balance(A)
    payready.run_tasks()
    assert payready.refreshes(A) == ["answered"]
    assert payready.fees(A)[-1] == "1 posted"
    assert payready.fees(A).count("1 pending") == 1


def test_late_balance_posts_the_call_before_a_rejected_one(payready: InProcessSystem) -> None:
    """The provider may have accepted the earlier call."""
    payready.provider.script[A] = [
        CallResultUnknown("timeout"),
        CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"),
    ]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(16)
    assert payready.state("p1") == "connection_inactive"
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "2 pending", "2 void", "1 posted"]


def test_balance_does_not_answer_a_refresh_without_an_accepted_call(payready: InProcessSystem) -> None:
    """The balance has another cause."""
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.refreshes(A) == ["rejected"]
    assert payready.fees(A) == ["1 pending", "1 void"]


@pytest.mark.parametrize(("later_s", "entries"), [(120, ["2 pending"]), (3600, ["2 pending", "2 posted"])])
def test_ambiguous_balance_does_not_post_the_later_call(
    payready: InProcessSystem, later_s: int, entries: list[str]
) -> None:
    """The first call was accepted without a balance. For an hour, a balance may be its late response."""
    payready.provider.script[A] = [202, CallResultUnknown("timeout")]
    payready.initiate("p1", A, timeout_s=10)
    payready.run_tasks()
    payready.pass_time(61)
    payready.clock.advance(later_s - 61)
    payready.initiate("p2", A, timeout_s=10)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p2") == "released"
    assert payready.fees(A) == ["1 pending", "1 posted", *entries]


BILLABLE = PRICES.replace('["accepted"]', '["accepted", "account_not_found", "rate_limited"]')


def test_billable_rejection_is_posted(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """The failed payments share its fee. A rejection that is not billable stays free."""
    payready.rt.price_list = parse_price_list(BILLABLE)
    for reason, status, account in (
        (FailureReason.ACCOUNT_NOT_FOUND, 404, A),
        (FailureReason.CONNECTION_INACTIVE, 403, "acct_free"),
    ):
        payready.provider.script[account] = [CallRejected(status, reason, "no")]
        for number in range(3):
            payready.initiate(f"{account}{number}", account)
        payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted"]
    assert payready.fees("acct_free") == ["1 pending", "1 void"]
    assert sum(share_of(payready, f"{A}{number}") for number in range(3)) == Decimal("0.1")
    assert share_of(payready, "acct_free0") == 0


def test_billable_rate_limited_call_does_not_make_attribution_ambiguous(
    payready: InProcessSystem,
) -> None:
    """No balance can belong to it, so the balance posts the other call."""
    payready.rt.price_list = parse_price_list(BILLABLE)
    payready.provider.script[A] = [RateLimited("rate limit", None), CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.pass_time(2)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 posted", "2 pending", "2 posted"]


def test_accepted_call_is_void_if_the_price_list_does_not_bill_it(payready: InProcessSystem) -> None:
    """The call still has an entry."""
    payready.rt.price_list = parse_price_list(PRICES.replace('["accepted"]', "[]"))
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "1 void"]
    assert payready.outcome("p1")["fee"] == {"amount": "0.000000", "currency": "USD", "state": "void"}


def test_entry_keeps_its_price_after_a_price_list_change(payready: InProcessSystem) -> None:
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.rt.price_list = parse_price_list(PRICES.replace('"test"', '"dear"').replace("0.100000", "0.9"))
    payready.balance(A)
    payready.run_tasks()
    payready.initiate("p2", "acct_other")
    payready.run_tasks()
    rows = payready.rows("SELECT price, price_list, state FROM fee_entry ORDER BY entry_id")
    entries = [(Decimal(str(row["price"])), row["price_list"], row["state"]) for row in rows]
    dime, dear = Decimal("0.1"), Decimal("0.9")
    assert entries == [
        (dime, "test", "pending"),
        (dime, "test", "posted"),
        (dear, "dear", "pending"),
        (dear, "dear", "posted"),
    ]


@pytest.mark.parametrize(
    "statement",
    ["UPDATE fee_entry SET price = '9'", "UPDATE fee_entry SET state = 'void'", "DELETE FROM fee_entry"],
)
def test_database_rejects_an_update_or_delete_of_an_entry(payready: InProcessSystem, statement: str) -> None:
    payready.initiate("p1", A)
    payready.run_tasks()
    before = payready.rows("SELECT * FROM fee_entry")
    assert len(before) == 2
    with pytest.raises(DBAPIError, match="fee_entry is append-only"), payready.engine.begin() as tx:
        tx.execute(text(statement))
    assert payready.rows("SELECT * FROM fee_entry") == before


def test_database_rejects_a_truncate_of_the_fee_ledger(payready: InProcessSystem) -> None:
    """TRUNCATE bypasses row triggers; a statement trigger rejects it. SQLite has no such command."""
    payready.initiate("p1", A)
    payready.run_tasks()
    truncate = "TRUNCATE fee_entry" if payready.engine.dialect.name == "postgresql" else "DELETE FROM fee_entry"
    with pytest.raises(DBAPIError, match="fee_entry is append-only"), payready.engine.begin() as tx:
        tx.execute(text(truncate))


EURO = PRICES.replace('"USD"', '"EUR"').replace("0.100000", "0.2")


def test_fee_share_has_the_currency_of_its_call(payready: InProcessSystem) -> None:
    """A later price list has no effect, also not on the zero fee of a reused balance."""
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.rt.price_list = parse_price_list(EURO)
    payready.balance(A)
    payready.run_tasks()
    payready.clock.advance(1)
    payready.initiate("p2", A)
    payready.run_tasks()
    assert payready.outcome("p1")["fee"] == {"amount": "0.100000", "currency": "USD", "state": "posted"}
    assert payready.outcome("p2")["fee"] == {"amount": "0", "currency": "USD", "state": "reused"}


def test_fee_share_has_one_currency(payready: InProcessSystem) -> None:
    """The outcome has the share of the calls in the last call's currency."""
    payready.provider.script[A] = [CallResultUnknown("timeout"), 202]
    payready.initiate("p1", A)
    payready.run_tasks()
    payready.rt.price_list = parse_price_list(EURO)
    payready.pass_time(16)
    payready.balance(A)
    payready.run_tasks()
    assert payready.fees(A) == ["1 pending", "2 pending", "2 posted"]
    assert payready.outcome("p1")["fee"] == {"amount": "0.200000", "currency": "EUR", "state": "posted"}


COLUMNS = "call_id, refresh_id, account_id, state, price, currency, price_list, evidence, called_at, recorded_at"


def entry_like(state: str, **other: str) -> str:
    """Return an INSERT, without its verb, of an entry like the first one with these columns changed."""
    values = {name: name for name in COLUMNS.split(", ")} | {"state": f"'{state}'"} | other
    return f"INTO fee_entry ({', '.join(values)}) SELECT {', '.join(values.values())} FROM fee_entry LIMIT 1"


def assert_rejected(payready: InProcessSystem, statement: str, why: str) -> None:
    """Assert that the database rejects the statement and changes nothing."""
    before = payready.rows("SELECT * FROM fee_entry")
    with pytest.raises(DBAPIError, match=why), payready.engine.begin() as tx:
        tx.execute(text(statement))
    assert payready.rows("SELECT * FROM fee_entry") == before


def test_database_rejects_an_entry_that_replaces_another(payready: InProcessSystem) -> None:
    """SQLite's REPLACE removes rows without a delete trigger."""
    payready.initiate("p1", A)
    payready.run_tasks()
    if payready.engine.dialect.name == "sqlite":
        for statement in (
            "INSERT OR REPLACE " + entry_like("pending", price="'9'"),
            "INSERT OR REPLACE " + entry_like("posted"),
            "INSERT OR REPLACE " + entry_like("void"),
            "INSERT OR REPLACE " + entry_like("pending", entry_id="2", call_id="'call_new'"),
        ):
            assert_rejected(payready, statement, "append-only")
    else:
        again = " ON CONFLICT (call_id, state) DO UPDATE SET price = 9"
        assert_rejected(payready, "INSERT " + entry_like("pending") + again, "append-only")


@pytest.mark.parametrize(
    "other",
    [
        {"price": "'0.2'"},
        {"currency": "'EUR'"},
        {"price_list": "'x'"},
        {"account_id": "'x'"},
        {"call_id": "'call_never_opened'"},
        {"called_at": "'2026-11-22 12:00:01.000000'"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_database_rejects_a_final_entry_that_differs_from_the_pending_one(
    payready: InProcessSystem, other: dict[str, str]
) -> None:
    """Price, currency and time must equal those of the one pending entry."""
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert_rejected(payready, "INSERT " + entry_like("posted", **other), "does not match its pending entry")
    with payready.engine.begin() as tx:
        tx.execute(text("INSERT " + entry_like("posted")))
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_database_rejects_an_unknown_entry_state(payready: InProcessSystem) -> None:
    payready.provider.script[A] = [CallResultUnknown("timeout")]
    payready.initiate("p1", A)
    payready.run_tasks()
    assert_rejected(payready, "INSERT " + entry_like("paid"), "fee_entry_state")


@pytest.mark.parametrize("second", [EntryState.POSTED, EntryState.VOID])
def test_second_final_entry_of_a_call_is_rejected(payready: InProcessSystem, second: EntryState) -> None:
    """The ledger's query skips it, and the database rejects it."""
    payready.initiate("p1", A)
    payready.run_tasks()
    refresh_id = payready.rows("SELECT refresh_id FROM fee_entry")[0]["refresh_id"]
    with transaction(payready.engine) as tx:
        [call] = fee_entries.calls_of_refreshes(tx, [refresh_id])
        assert call.state == EntryState.POSTED
        assert not fee_entries.post_or_void(tx, [FinalEntry(call=call, state=second, evidence={})], START)
    assert payready.fees(A) == ["1 pending", "1 posted"]
    columns = "call_id, refresh_id, account_id, price, currency, price_list, evidence, called_at, recorded_at"
    with pytest.raises(DBAPIError), payready.engine.begin() as tx:
        tx.execute(
            text(f"INSERT INTO fee_entry (state, {columns}) SELECT :state, {columns} FROM fee_entry LIMIT 1"),
            {"state": second.value},
        )


def test_entry_requires_a_refresh(payready: InProcessSystem) -> None:
    """A foreign key guarantees it in both databases."""
    call = fee_entries.new_call(
        "call_1", "ref_unknown", A, payready.rt.price_list.price_for("TEST", START.date()), START
    )
    with pytest.raises(DBAPIError), transaction(payready.engine) as tx:
        fee_entries.open_entries(tx, [call])


@pytest.mark.parametrize("resolved_by", ["balance", "deadline", "refusal"])
@pytest.mark.parametrize("sharers", [1, 3, 7])
def test_fee_shares_add_up_to_the_fee_of_the_call(
    payready: InProcessSystem, sharers: int, resolved_by: str, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """This is true for every kind of resolution, to the last decimal place."""
    payready.initiate("p0", A, timeout_s=30)
    payready.provider.script[A] = [
        CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive") if resolved_by == "refusal" else 202
    ]
    for number in range(1, sharers):
        payready.initiate(f"p{number}", A, timeout_s=30)
    payready.run_tasks()
    if resolved_by == "balance":
        payready.balance(A)
        payready.run_tasks()
    elif resolved_by == "deadline":
        payready.pass_time(30)
    fee = Decimal("0.1") if resolved_by != "refusal" else Decimal(0)
    assert payready.provider.calls == [A]
    assert sum(share_of(payready, f"p{number}") for number in range(sharers)) == fee


def test_fee_shares_add_up_when_payments_fail_before_the_balance(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """Expired and cancelled payments pay their share of the call."""
    for number in range(3):
        payready.initiate(f"p{number}", A, timeout_s=10)
    for number in range(3, 7):
        payready.initiate(f"p{number}", A, timeout_s=60)
    payready.run_tasks()
    payready.pass_time(9)
    payready.queue.add(flow.cancel_waiting(payready.rt, ["p1"]))
    payready.pass_time(1)
    payready.balance(A)
    payready.run_tasks()
    assert [payready.state(payment_id) for payment_id in ("p0", "p1")] == ["timeout", "cancelled"]
    assert payready.outcome("p6")["shared_by"] == 7
    assert sum(share_of(payready, f"p{number}") for number in range(7)) == Decimal("0.1")


def test_payment_pays_its_own_call_and_not_an_earlier_rejected_one(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    payready.provider.script[A] = [CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"), 202]
    payready.initiate("p1", A, timeout_s=20)
    payready.run_tasks()
    payready.clock.advance(5)
    payready.initiate("p2", A, timeout_s=20)
    payready.run_tasks()
    payready.pass_time(20)
    assert payready.outcome("p2") == {
        "payment_id": "p2",
        "reason": "timeout",
        "detail": "no balance arrived within 20 s",
    }
    assert share_of(payready, "p1") == 0
    assert share_of(payready, "p2") == Decimal("0.1")


def test_balance_between_two_calls_posts_the_first_call(
    payready: InProcessSystem, share_of: Callable[[InProcessSystem, str], Decimal]
) -> None:
    """The second call is claimed after the balance was stored and before it was applied."""
    payready.provider.script[A] = [CallResultUnknown("timed out")]
    payready.initiate("p1", A, timeout_s=120)
    payready.run_tasks()
    payready.clock.advance(payready.rt.settings.uncertain_grace_s)
    payready.queue.add(flow.sweep_refreshes_and_balances(payready.rt))  # repeats: the call is enqueued
    assert payready.queue.calls
    payready.balance(A)
    payready.run_tasks()
    assert payready.state("p1") == "released"
    assert payready.provider.calls == [A]
    assert (payready.fees(A), payready.refreshes(A)) == (["1 pending", "1 posted"], ["answered"])
    assert share_of(payready, "p1") == Decimal("0.1")
