"""The bank: true balances, debits that it pays or cannot pay, and the balances that webhooks show."""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from random import Random
from typing import Any

import pytest

from simulator.bank import Bank, BankSettings, UnknownBankAccount
from tests.support.simulator import Simulator, WebhookInbox, eventually

Accounts = Callable[[str], str]
ACCOUNT = "acct_1"


def opened(balance: str, **settings: Any) -> Bank:
    bank = Bank()
    bank.open_accounts({ACCOUNT: BankSettings(balance=Decimal(balance), **settings)}, now=0.0)
    return bank


def test_debit_lowers_the_true_balance_until_it_does_not_cover() -> None:
    """A debit of the whole balance is paid. One that is not paid changes nothing."""
    bank = opened("100.00")
    debits = [
        bank.debit_once(f"pay_{number}", ACCOUNT, Decimal(amount), now=1.0)
        for number, amount in enumerate(["70.00", "30.01", "30.00", "0.01"])
    ]
    assert [debit.paid for debit in debits] == [True, False, True, False]
    assert debits[1].balance_before == Decimal("30.00")
    assert bank.balance(ACCOUNT) == Decimal("0.00")


def test_repeated_debit_of_a_payment_changes_nothing() -> None:
    """It returns the first result, also if the bank could pay now."""
    bank = opened("10.00")
    first = bank.debit_once("pay_1", ACCOUNT, Decimal("20.00"), now=1.0)
    assert bank.credit(ACCOUNT, Decimal("50.00"), now=2.0) == Decimal("60.00")
    assert bank.debit_once("pay_1", ACCOUNT, Decimal("20.00"), now=3.0) == first
    assert bank.balance(ACCOUNT) == Decimal("60.00")


@pytest.mark.parametrize("balance_time", ["read", "record"])
def test_read_shows_the_balance_of_its_time(balance_time: Any) -> None:
    """The read is at a random time from the call to the record. `at` is the time of the read, or of the record."""
    bank, rng = opened("100.00", balance_time=balance_time), Random(1)
    bank.debit_once("pay_1", ACCOUNT, Decimal("60.00"), now=15.0)
    reads = [bank.read(ACCOUNT, 10.0, 20.0, rng) for _ in range(100)]
    shown = {(read.balance, read.record_at < 15.0) for read in reads if read}
    if balance_time == "read":
        assert shown == {(Decimal("100.00"), True), (Decimal("40.00"), False)}
    else:
        assert shown == {(Decimal("100.00"), False), (Decimal("40.00"), False)}
        assert {read.record_at for read in reads if read} == {20.0}


def test_account_without_a_true_balance_is_not_read() -> None:
    """A debit of it is an error."""
    bank = Bank()
    assert (bank.read(ACCOUNT, 0.0, 1.0, Random(1)), bank.balance(ACCOUNT)) == (None, None)
    with pytest.raises(UnknownBankAccount):
        bank.debit_once("pay_1", ACCOUNT, Decimal(1), now=1.0)
    with pytest.raises(UnknownBankAccount):
        bank.credit(ACCOUNT, Decimal(1), now=1.0)


def test_irregular_webhooks_are_late_or_repeated() -> None:
    """Without the setting, each event is sent once and at once."""
    regular, irregular, rng = opened("1"), opened("1", max_late_s=10.0), Random(2)
    assert all(regular.draw_webhook_timing(account_id, rng).late_s == 0 for account_id in (ACCOUNT, "acct_2"))
    drawn = [irregular.draw_webhook_timing(ACCOUNT, rng) for _ in range(100)]
    assert {timing.late_s > 0 for timing in drawn} == {True, False}
    assert {timing.repeat_after_s is None for timing in drawn} == {True, False}


def test_refresh_shows_the_true_balance(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """A debit after the first refresh shows in the second one, in the webhook and in GraphQL."""
    account_id = account("prompt")
    simulator.put("bank", **{account_id: {"balance": "100.25"}})
    assert simulator.graphql_account(account_id)["balance"]["available"] == 100.25
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    debit = simulator.post(f"bank/{account_id}/debit", payment_id=f"pay_of_{account_id}", amount="70.05")
    assert (debit["paid"], debit["balance_before"]) == (True, "100.25")
    simulator.refresh(account_id)
    simulator.wait_for_webhooks()
    shown = [record["available"] for request in inbox.requests_about(account_id) for record in request.records()]
    assert shown == [100.25, 30.2]
    assert simulator.graphql_account(account_id)["balance"]["available"] == 30.2


def test_webhook_may_show_an_older_balance(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """A debit between the read and the webhook does not show. `at` is then the time of the read."""
    account_id = account("slow")
    simulator.put("defaults", slow_s=0.5)
    for _ in range(20):
        simulator.put("bank", **{account_id: {"balance": "100.00", "balance_time": "read"}})
        simulator.refresh(account_id)
        simulator.post(f"bank/{account_id}/credit", amount="1.00")
        [record] = inbox.wait_for_requests_about(account_id)[-1].records()
        inbox.received.clear()
        if record["available"] == 101.0:
            break
    assert record["available"] == 101.0
    [call] = simulator.calls(account_id)[-1:]
    assert int(call["started_at"]) <= datetime.fromisoformat(record["at"]).timestamp() <= call["started_at"] + 0.5


def test_unknown_available_stays_unknown(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The provider knows no available balance of the account, though the bank has a true one."""
    account_id = account("nullavail")
    simulator.put("bank", **{account_id: {"balance": "5.00"}})
    simulator.refresh(account_id)
    [record] = inbox.wait_for_requests_about(account_id)[0].records()
    assert record["available"] is None


def test_irregular_account_gets_repeated_events(simulator: Simulator, inbox: WebhookInbox, account: Accounts) -> None:
    """The same balance arrives in a second delivery."""
    accounts = [account("prompt") for _ in range(30)]
    simulator.put("bank", **{account_id: {"balance": "5.00", "max_late_s": 0.2} for account_id in accounts})
    for account_id in accounts:
        simulator.refresh(account_id)

    def repeated() -> list[str]:
        return [account_id for account_id in accounts if len(inbox.requests_about(account_id)) > 1]

    again = eventually(repeated)[0]
    assert len({record["id"] for request in inbox.requests_about(again) for record in request.records()}) == 1


def test_bank_lists_balances_and_debits(simulator: Simulator, account: Accounts) -> None:
    """A debit that the bank could not pay is marked."""
    account_id, payment_id = account("prompt"), "pay_listed"
    simulator.put("bank", **{account_id: {"balance": "5.00"}})
    simulator.post(f"bank/{account_id}/debit", payment_id=payment_id, amount="5.01")
    listed = simulator.http.get("/control/bank").json()
    assert listed["balances"][account_id] == "5.00"
    [debit] = [debit for debit in listed["debits"] if debit["payment_id"] == payment_id]
    assert (debit["account_id"], debit["amount"], debit["paid"]) == (account_id, "5.01", False)


@pytest.mark.parametrize(
    ("method", "path", "wrong", "named"),
    [
        ("PUT", "bank", {"acct_1": {}}, "acct_1"),
        ("PUT", "bank", {"acct_1": {"balance": 5}}, "balance"),
        ("PUT", "bank", {"acct_1": {"balance": "NaN"}}, "balance"),
        ("PUT", "bank", {"acct_1": {"balance": "5", "balance_time": "now"}}, "balance_time"),
        ("PUT", "bank", {"acct_1": "5"}, "object"),
        ("POST", "bank/acct_1/debit", {"amount": "5"}, "payment_id"),
        ("POST", "bank/acct_1/debit", {"payment_id": "p", "amount": "-5"}, "amount"),
        ("POST", "bank/acct_unopened/debit", {"payment_id": "p", "amount": "5"}, "acct_unopened"),
        ("POST", "bank/acct_unopened/credit", {"amount": "5"}, "acct_unopened"),
    ],
)
def test_invalid_bank_request_is_rejected(simulator: Simulator, method: str, path: str, wrong: Any, named: str) -> None:
    """The error names what is wrong."""
    response = simulator.http.request(method, f"/control/{path}", json=wrong)
    assert response.status_code == 422
    assert named in response.json()["error"]
