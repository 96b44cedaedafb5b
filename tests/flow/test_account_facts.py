"""Account facts: an account is read, free of charge, before its first paid call. Some accounts release no payment."""

import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.support.in_process import START, InProcessSystem
from tests.support.statements import collected_statements
from worker import flow
from worker.errors import CallNotSent
from worker.flow import RefreshCall
from worker.ledger import accounts
from worker.ledger.engine import transaction
from worker.quiltt.messages import PolledAccount
from worker.rules.account_facts import FACTS_LIFETIME, AccountFacts

A = "acct_a"
READ = (A, "p_1")
A_DAY_S = round(FACTS_LIFETIME.total_seconds())


def show_account(payready: InProcessSystem, kind: str | None = "DEPOSITORY", currency: str | None = "USD") -> None:
    """Make reads of the account return this kind and currency."""
    payready.provider.accounts[A] = PolledAccount.model_validate({"kind": kind, "currencyCode": currency})


def initiate(payready: InProcessSystem, payment_id: str = "p1", **job: Any) -> None:
    payready.initiate(payment_id, A, **{"profile_id": "p_1", "amount": "80.00", **job})


def stored_facts(payready: InProcessSystem) -> AccountFacts | None:
    with transaction(payready.engine) as tx:
        return accounts.find(tx, [A]).result().get(A)


def store_facts(
    payready: InProcessSystem, kind: str | None, *, read_s_ago: int = 0, currency: str | None = None
) -> None:
    read_at = payready.clock.now - timedelta(seconds=read_s_ago)
    with transaction(payready.engine) as tx:
        accounts.store(tx, AccountFacts(account_id=A, kind=kind, currency=currency, read_at=read_at))


# --- before the call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "currency", "detail"),
    [
        ("CREDIT", "USD", "the account is of kind CREDIT: its balance is a debt, not available money"),
        ("LOAN", None, "the account is of kind LOAN: its balance is a debt, not available money"),
        ("DEPOSITORY", "EUR", "the currency of the account is EUR, the currency of the payment is USD"),
        (None, "EUR", "the currency of the account is EUR, the currency of the payment is USD"),
    ],
)
def test_unsupported_account_fails_its_payments_without_a_call(
    payready: InProcessSystem, kind: str | None, currency: str | None, detail: str
) -> None:
    show_account(payready, kind, currency)
    initiate(payready)
    initiate(payready, "p2", max_balance_age_s=0)
    payready.run_tasks()
    assert {payready.state_or_reason(payment) for payment in ("p1", "p2")} == {"account_unsupported"}
    assert payready.outcome("p1")["detail"] == detail
    assert (payready.provider.calls, payready.fees(A)) == ([], [])
    payready.pass_time(20)
    assert (payready.provider.calls, payready.refreshes(A)) == ([], [])


@pytest.mark.parametrize(("kind", "currency"), [("DEPOSITORY", "USD"), ("DEPOSITORY", None), (None, None)])
def test_supported_or_unknown_account_is_called_once_after_its_read(
    payready: InProcessSystem, kind: str | None, currency: str | None
) -> None:
    show_account(payready, kind, currency)
    initiate(payready)
    payready.run_tasks()
    assert (payready.provider.reads, payready.provider.calls) == ([READ], [A])
    payready.balance(A)
    payready.run_tasks()
    assert payready.outcome("p1")["verdict"] == "sufficient"
    assert payready.fees(A) == ["1 pending", "1 posted"]


def test_read_uses_no_slot_and_opens_no_fee_entry(payready: InProcessSystem) -> None:
    initiate(payready)
    claimed = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls)
    assert (claimed.claims, payready.fees(A), payready.provider.calls) == ([], [], [])
    [read] = claimed.follow_up.account_reads
    assert (read.account_id, read.profile_id) == READ
    payready.run_tasks()
    assert payready.provider.calls == [A]


def test_facts_are_kept_for_a_day(payready: InProcessSystem) -> None:
    show_account(payready)
    for number, passed_s in enumerate([0, 1, A_DAY_S - 2, 1]):
        payready.clock.advance(passed_s)
        initiate(payready, f"p{number}", max_balance_age_s=0, timeout_s=60)
        payready.run_tasks()
        payready.balance(A, "1000.00")
        payready.run_tasks()
        assert payready.state_or_reason(f"p{number}") == "released"
    assert (len(payready.provider.reads), len(payready.provider.calls)) == (2, 4)


def test_account_that_becomes_unsupported_is_not_called_after_a_day(payready: InProcessSystem) -> None:
    store_facts(payready, "DEPOSITORY", read_s_ago=A_DAY_S)
    show_account(payready, "CREDIT")
    initiate(payready)
    payready.run_tasks()
    assert (payready.state_or_reason("p1"), payready.provider.calls) == ("account_unsupported", [])


def test_stored_facts_fail_payments_without_a_read_or_a_call(payready: InProcessSystem) -> None:
    store_facts(payready, "CREDIT", read_s_ago=A_DAY_S - 1)
    initiate(payready)
    initiate(payready, "p2", profile_id=None)
    payready.run_tasks()
    assert {payready.state_or_reason(payment) for payment in ("p1", "p2")} == {"account_unsupported"}
    assert (payready.provider.reads, payready.provider.calls) == ([], [])
    assert payready.account_hash(A).requested is None, "the next payment requests a refresh of its own"


def test_payment_without_a_funds_check_still_gets_its_call(payready: InProcessSystem) -> None:
    show_account(payready, "CREDIT")
    initiate(payready)
    initiate(payready, "p2", funds_check="disabled")
    payready.run_tasks()
    payready.balance(A)
    payready.run_tasks()
    assert [payready.state_or_reason(payment) for payment in ("p1", "p2")] == ["account_unsupported", "released"]
    assert payready.outcome("p2")["shared_by"] == 1


@pytest.mark.parametrize("job", [{"profile_id": None}, {"amount": None}, {"funds_check": "disabled"}])
def test_payment_that_needs_no_facts_costs_no_read_and_no_statement(
    payready: InProcessSystem, job: dict[str, Any]
) -> None:
    with collected_statements(payready.engine) as statements:
        initiate(payready, **job)
        payready.run_tasks()
        payready.balance(A)
        payready.run_tasks()
    assert payready.state_or_reason("p1") == "released"
    assert payready.provider.reads == []
    assert statements
    assert [text for text, _ in statements if re.search("(FROM|INTO) account", text)] == []


# --- reads that fail or are lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("account", [CallNotSent("no connection"), None])
def test_call_is_made_after_a_read_that_failed(payready: InProcessSystem, account: CallNotSent | None) -> None:
    if account is not None:
        payready.provider.accounts[A] = account
    initiate(payready)
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert stored_facts(payready) == AccountFacts(account_id=A, kind=None, currency=None, read_at=START)


def test_account_is_read_again_a_minute_after_a_failed_read(payready: InProcessSystem) -> None:
    payready.provider.accounts[A] = CallNotSent("no connection")
    for number, passed_s in enumerate([0, 59, 1]):
        payready.clock.advance(passed_s)
        initiate(payready, f"p{number}", max_balance_age_s=0, timeout_s=30)
        payready.run_tasks()
        payready.balance(A, "1000.00")
        payready.run_tasks()
    assert (len(payready.provider.reads), len(payready.provider.calls)) == (2, 3)


def test_delayed_call_is_made_although_its_read_failed_long_ago(payready: InProcessSystem) -> None:
    """Otherwise a queue that is slower than a minute would read the account again and again."""
    payready.provider.accounts[A] = CallNotSent("no connection")
    initiate(payready, timeout_s=600)
    call = payready.queue.calls[0]
    [read] = flow.claim_and_call(payready.rt, A, call.refresh_id).account_reads
    after_read = flow.read_account_and_call_if_needed(payready.rt, read.account_id, read.profile_id, read.refresh_id)
    payready.clock.advance(90)
    assert after_read.calls == [call]
    assert flow.claim_and_call(payready.rt, A, call.refresh_id).account_reads == []
    assert payready.provider.calls == [A]


@pytest.mark.parametrize("empties_redis", [False, True])
def test_lost_read_is_recovered(payready: InProcessSystem, *, empties_redis: bool) -> None:
    """Maintenance joins the payment to its refresh again."""
    show_account(payready, "CREDIT")
    initiate(payready, timeout_s=60)
    call = payready.queue.calls[0]
    assert flow.claim_and_call(payready.rt, A, call.refresh_id).account_reads, "this message is lost"
    payready.drop_tasks()
    if empties_redis:
        payready.flush()
    payready.pass_time(7)
    assert payready.state_or_reason("p1") == "account_unsupported"
    assert (payready.provider.reads, payready.provider.calls) == ([READ], [])


def test_lost_call_after_a_read_is_recovered(payready: InProcessSystem) -> None:
    show_account(payready)
    initiate(payready, timeout_s=60)
    call = payready.queue.calls[0]
    assert flow.read_account_and_call_if_needed(payready.rt, A, "p_1", call.refresh_id).calls == [call]
    payready.drop_tasks()
    payready.pass_time(7)
    assert (payready.provider.reads, payready.provider.calls) == ([READ], [A])


def test_lost_read_of_a_deferred_call_is_recovered_by_the_sweep(payready: InProcessSystem) -> None:
    """The refresh stays requested."""
    payready.provider.script[A] = [CallNotSent("no connection")]
    initiate(payready, timeout_s=120, profile_id=None)
    payready.run_tasks()
    initiate(payready, "p2", timeout_s=120)
    payready.clock.advance(1)
    follow_up = flow.sweep_refreshes_and_balances(payready.rt)
    [call] = follow_up.calls
    assert flow.claim_and_call(payready.rt, A, call.refresh_id, has_slot=True).account_reads, "this message is lost"
    payready.drop_tasks()
    payready.pass_time(16)
    assert (payready.provider.reads, payready.provider.calls) == ([READ], [A, A])


def test_doubled_read_message_reads_once_and_calls_once(payready: InProcessSystem) -> None:
    show_account(payready)
    initiate(payready)
    [call] = payready.queue.calls
    payready.drop_tasks()
    for _ in range(2):
        payready.queue.add(flow.read_account_and_call_if_needed(payready.rt, A, "p_1", call.refresh_id))
    assert payready.queue.calls == [call, call]
    payready.run_tasks()
    assert (payready.provider.reads, payready.provider.calls) == ([READ], [A])


def test_late_read_does_not_end_a_refresh_in_flight(payready: InProcessSystem) -> None:
    """A payment without a check was called for meanwhile, and is cancelled. Its call stays in flight."""
    initiate(payready, funds_check="disabled")
    refresh_id = payready.queue.calls[0].refresh_id
    payready.run_tasks()
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p1"]))
    payready.run_tasks()
    assert flow.read_account_and_call_if_needed(payready.rt, A, "p_1", refresh_id).calls == []
    assert payready.refreshes(A) == ["accepted"]
    assert payready.account_hash(A).in_flight == refresh_id


def test_read_abandons_a_requested_refresh_that_no_payment_needs(payready: InProcessSystem) -> None:
    payready.provider.script[A] = [CallNotSent("no connection")]
    initiate(payready, funds_check="disabled", timeout_s=120)
    refresh_id = payready.queue.calls[0].refresh_id
    payready.run_tasks()
    payready.queue.add(flow.fail_waiting_as_cancelled_with_fee_share(payready.rt, ["p1"]))
    payready.run_tasks()
    assert flow.read_account_and_call_if_needed(payready.rt, A, "p_1", refresh_id).calls == []
    assert payready.refreshes(A) == ["abandoned"]
    assert payready.account_hash(A).requested is None


# --- after the call ---------------------------------------------------------------------------------------------------


def test_balance_releases_no_later_payment_of_an_unsupported_account(payready: InProcessSystem) -> None:
    """The call was made for a payment without a funds check. Payments that join it, or reuse its balance, fail."""
    show_account(payready, "CREDIT")
    initiate(payready, "read")
    initiate(payready, "unchecked", funds_check="disabled")
    payready.run_tasks()
    initiate(payready, "joins", amount="10.00")
    payready.balance(A, "4000.00")
    payready.run_tasks()
    initiate(payready, "reuses", amount="10.00")
    payready.run_tasks()
    assert payready.provider.calls == [A]
    assert payready.state_or_reason("unchecked") == "released"
    assert {payready.state_or_reason(payment) for payment in ("read", "joins", "reuses")} == {"account_unsupported"}


def test_poll_stores_the_facts(payready: InProcessSystem) -> None:
    initiate(payready, timeout_s=60)
    payready.run_tasks()
    show_account(payready, "DEPOSITORY", "USD")
    payready.pass_time(60)
    facts = stored_facts(payready)
    assert facts is not None
    assert (facts.kind, facts.currency, facts.read_at) == ("DEPOSITORY", "USD", START + timedelta(seconds=50))


# --- the table --------------------------------------------------------------------------------------------------------


def read_result(minute: int, kind: str | None) -> AccountFacts:
    return AccountFacts(account_id=A, kind=kind, currency=None, read_at=START + timedelta(minutes=minute))


A_DAY_MIN = A_DAY_S // 60


@pytest.mark.parametrize(
    ("reads", "stored"),
    [
        ([(0, "CREDIT")], (0, "CREDIT")),
        ([(0, "CREDIT"), (1, "DEPOSITORY")], (1, "DEPOSITORY")),
        ([(1, "CREDIT"), (0, "DEPOSITORY")], (1, "CREDIT")),
        ([(0, None), (1, None)], (1, None)),
        ([(0, None), (1, "CREDIT")], (1, "CREDIT")),
        ([(0, "CREDIT"), (1, None)], (0, "CREDIT")),
        ([(0, "CREDIT"), (A_DAY_MIN, None)], (A_DAY_MIN, None)),
    ],
)
def test_later_result_replaces_an_earlier_one_unless_it_loses_facts(
    payready: InProcessSystem, reads: list[tuple[int, str | None]], stored: tuple[int, str | None]
) -> None:
    for minute, kind in reads:
        with transaction(payready.engine) as tx:
            accounts.store(tx, read_result(minute, kind))
    assert stored_facts(payready) == read_result(*stored)


def test_batch_reads_each_account_that_needs_it(payready: InProcessSystem) -> None:
    """The other calls of the batch are claimed."""
    for number in range(4):
        payready.initiate(f"p{number}", f"acct_{number}", amount="1.00", profile_id="p_1" if number % 2 else None)
    claimed = flow.claim_delay_or_reject_calls(payready.rt, payready.queue.calls)
    assert [claim.refresh.account_id for claim in claimed.claims] == ["acct_0", "acct_2"]
    assert [read.account_id for read in claimed.follow_up.account_reads] == ["acct_1", "acct_3"]
    assert claimed.follow_up.calls == list[RefreshCall]()


def test_credit_line_releases_without_a_profile(payready: InProcessSystem) -> None:
    """A documented limit: the event of a balance does not state the kind of its account."""
    show_account(payready, "CREDIT")
    initiate(payready, profile_id=None)
    payready.run_tasks()
    payready.balance(A, str(Decimal(4000)))
    payready.run_tasks()
    assert payready.outcome("p1")["verdict"] == "sufficient"


def test_facts_of_an_earlier_read_count_while_reads_fail(payready: InProcessSystem) -> None:
    """An account seldom changes its kind. It is read again after a minute."""
    show_account(payready, kind="CREDIT")
    initiate(payready, "p1")
    payready.run_tasks()
    payready.clock.advance(A_DAY_S + 60)
    payready.provider.accounts[A] = CallNotSent("no connection")
    initiate(payready, "p2")
    payready.run_tasks()
    assert payready.state_or_reason("p2") == "account_unsupported"
    assert payready.provider.calls == []
    show_account(payready)
    payready.clock.advance(60)
    initiate(payready, "p3")
    payready.run_tasks()
    assert payready.provider.calls == [A]
