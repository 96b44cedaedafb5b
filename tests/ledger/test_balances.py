"""Balances of the ledger: the newest one that a claim may apply instead of its call."""

from datetime import datetime, timedelta
from decimal import Decimal

from tests.support.in_process import START
from worker.ledger import balances, payments
from worker.ledger.balances import BalanceRecord
from worker.ledger.engine import Engine, transaction
from worker.rules.job import Job

SKEW = timedelta(seconds=5)


def received(account_id: str, received_at: datetime, *, source: str = "REFRESH") -> BalanceRecord:
    """Return a balance that is as of its arrival."""
    balance_id = f"bal_{account_id}_{received_at.isoformat()}"
    return BalanceRecord(
        balance_id=balance_id,
        event_id=f"evt_{balance_id}",
        account_id=account_id,
        at=received_at,
        as_of=received_at,
        source=source,
        available=Decimal(1),
        current=None,
        limit=None,
        received_at=received_at,
        due_at=None,
    )


def test_newest_balance_for_a_claim_is_not_too_old_for_each_waiting_payment_of_its_account(engine: Engine) -> None:
    """The account's earliest waiting payment sets the bound, less the clock skew. Others are not loaded."""
    ages = {"acct_exact": 60, "acct_older": 60, "acct_younger": 0, "acct_free": 60, "acct_several": 60}
    bound, moment = START - timedelta(seconds=60) - SKEW, timedelta(microseconds=1)
    stored = {
        "acct_exact": received("acct_exact", bound),
        "acct_older": received("acct_older", bound - moment),
        "acct_younger": received("acct_younger", bound),
        "acct_free": received("acct_free", START, source="PROFILE"),
        "acct_idle": received("acct_idle", START),
        "acct_several": received("acct_several", START),
    }
    with transaction(engine) as tx:
        for account_id, age_s in ages.items():
            for suffix, max_age_s in (("a", age_s), ("b", 0)):
                job = Job(payment_id=f"pay_{account_id}_{suffix}", account_id=account_id, max_balance_age_s=max_age_s)
                payments.insert_payments(tx, [payments.new_payment(job, START)])
        balances.insert_balances(tx, [*stored.values(), received("acct_several", START - moment)])
    with transaction(engine) as tx:
        newest = balances.newest_refresh_balance_for_waiting(tx, [*ages, "acct_idle"], SKEW).result()
        none = balances.newest_refresh_balance_for_waiting(tx, ["acct_idle"], SKEW).result()
    assert newest == {"acct_exact": stored["acct_exact"], "acct_several": stored["acct_several"]}
    assert none == {}
