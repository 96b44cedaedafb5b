"""Fees and releases in random orders: the ledger matches the provider's bill, and no balance is released twice.

On SQLite only: these tests vary the order of events. Other tests compare the databases.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.in_process import PRICES, START, Databases, InProcessSystem, in_process_system
from webhook.events import parse
from worker import flow
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, RateLimited, Reason
from worker.flow import attribution
from worker.ledger import fee_calls, fee_statement, invoices
from worker.ledger.engine import transaction
from worker.ledger.invoices import InvoiceEvidence
from worker.rules.invoice_file import InvoiceLine, InvoicePeriod
from worker.rules.pricing import parse_price_list
from worker.rules.reconciliation import reconcile

ACCOUNTS = ("acct_a", "acct_b")
DEARER = START + timedelta(hours=12)
RISING = f'{PRICES}[[price]]\nmode = "TEST"\nfrom = {DEARER:%Y-%m-%d}\nper_call = "0.123457"\n'
ENDS: dict[str, Callable[[], int | CallFailed]] = {
    "accepted": lambda: 202,
    "accepted, response lost": lambda: CallResultUnknown("timeout"),
    "not accepted, response lost": lambda: CallResultUnknown("500", 500),
    "unsent": lambda: CallNotSent("no connection"),
    "throttled": lambda: RateLimited("rate limit", None),
    "refused": lambda: CallRejected(403, Reason.CONNECTION_INACTIVE, "inactive"),
}
each_time = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class Truth:
    """The provider's view: the calls that it accepted, and which of them still await a balance."""

    accepted: list[tuple[str, datetime]] = field(default_factory=list)
    owed: dict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))

    def answers(self, payready: InProcessSystem, account: str, end: str) -> Callable[[], int | CallFailed]:
        """Return a script entry that accepts or fails one call."""

        def take() -> int | CallFailed:
            if end.startswith("accepted"):
                self.accepted.append((account, payready.clock.now))
                self.owed[account].append(payready.clock.now)
            return ENDS[end]()

        return take

    def owes(self, account: str, now: datetime) -> bool:
        """Return whether a balance may arrive. Calls older than the maximum balance delay are dropped."""
        self.owed[account] = [
            called_at for called_at in self.owed[account] if now - called_at < attribution.MAX_BALANCE_DELAY
        ]
        return bool(self.owed[account])

    @staticmethod
    def price(at: datetime) -> Decimal:
        """Return the contract's price of a call made at this time."""
        return Decimal("0.123457") if at >= DEARER else Decimal("0.1")


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Databases:
    """Create migrated temporary databases."""
    return Databases(tmp_path_factory.mktemp("cents"), None)


@contextmanager
def fresh(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """Open an empty in-process system."""
    with databases.create() as address, in_process_system(address, valkey_url) as made:
        yield made


steps = st.tuples(
    st.sampled_from(ACCOUNTS),
    st.lists(st.sampled_from(list(ENDS)), min_size=1, max_size=3),
    st.sampled_from([0, 30]),  # the age that the payment allows
    st.sampled_from([0, 1, 20, 70]),  # seconds until a balance may come
    st.booleans(),  # whether a balance arrives
    st.sampled_from([0, 5, 90, 4000, 40_000]),  # seconds until the next payment
)


TWICE: list[tuple[str, list[str], int, int, bool, int]] = [
    ("acct_a", ["not accepted, response lost", "accepted"], 0, 0, True, 4000),
    ("acct_a", ["accepted, response lost", "accepted, response lost"], 0, 70, True, 90),
    ("acct_a", ["throttled"], 30, 70, True, 4000),
]
"""A refresh with two calls and two balances. The second balance does not belong to the earlier call."""


@each_time
@given(story=st.lists(steps, min_size=1, max_size=7))
@example(story=TWICE)
def test_posted_entries_equal_the_accepted_calls(
    databases: Databases, valkey_url: str, story: list[tuple[str, list[str], int, int, bool, int]]
) -> None:
    """After each step no accepted call is missing, and the invoice resolves the pending ones exactly."""
    truth = Truth()
    with fresh(databases, valkey_url) as payready:
        payready.rt.price_list = parse_price_list(RISING)
        for number, (account, ends, age, pause, comes, gap) in enumerate(story):
            script = [truth.answers(payready, account, end) for end in [*ends, *["refused"] * 40]]
            payready.provider.script[account] = list(script)
            payready.initiate(f"p{number}", account, timeout_s=60, max_balance_age_s=age)
            payready.run_tasks()
            _pass(payready, pause)
            if comes and truth.owes(account, payready.clock.now):
                truth.owed[account].pop(0)
                payready.balance(account)
                payready.run_tasks()
            _pass(payready, gap)
            _agree(payready, truth)
        _resolve_by_invoice(payready, truth)


def _pass(payready: InProcessSystem, seconds: int) -> None:
    """Advance the clock in four steps and run maintenance after each."""
    for _ in range(4):
        payready.clock.advance(seconds / 4)
        payready.run_maintenance()


def _agree(payready: InProcessSystem, truth: Truth) -> None:
    """Assert that each accepted call is posted or pending, and each posted call was accepted."""
    with transaction(payready.engine) as tx:
        lines = fee_statement.statement_lines(tx, START, payready.clock.now + timedelta(seconds=1), "account")
    for line in lines:
        accepted = sum(account == line.key for account, _ in truth.accepted)
        assert line.posted <= accepted <= line.posted + line.pending
    assert {account for account, _ in truth.accepted} <= {line.key for line in lines}


def _resolve_by_invoice(payready: InProcessSystem, truth: Truth) -> None:
    period = InvoicePeriod(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC), timedelta(seconds=1))
    charges = [
        InvoiceLine(row, str(row), account, at, at, truth.price(at)) for row, (account, at) in enumerate(truth.accepted)
    ]
    with transaction(payready.engine) as tx:
        found = reconcile(charges, fee_calls.ledger_calls(tx, "USD", period.since, period.until), period)
        invoices.apply_invoice(tx, found, InvoiceEvidence("i", "x", "2026-11", "USD"), payready.clock.now)
        lines = fee_statement.statement_lines(tx, period.since, period.until, "price")
    assert (found.unmatched_lines, found.charged_though_void, found.price_differences) == ([], [], [])
    assert sum(line.pending for line in lines) == 0
    owed = sum((truth.price(at) for _, at in truth.accepted), Decimal(0))
    assert sum((line.posted_amount for line in lines), Decimal(0)) == owed


# --- funds ------------------------------------------------------------------------------------------------------------

amounts = st.sampled_from(["30.00", "50.00", "80.00"])
events = st.one_of(
    st.tuples(st.just("job"), amounts, st.sampled_from([0, 5, 60, 300])),
    st.tuples(st.just("balance"), st.integers(0, 20), st.sampled_from(["50.00", "100.00", "120.00"])),
    st.tuples(st.just("work"), st.none(), st.none()),
    st.tuples(st.just("lose"), st.none(), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([1, 8, 70]), st.none()),
)


@each_time
@given(story=st.lists(events, min_size=4, max_size=25))
def test_releases_never_exceed_the_balance_in_any_order(
    databases: Databases, valkey_url: str, story: list[tuple[str, Any, Any]]
) -> None:
    """A balance covers every release on its account from its time to the last release by it."""
    with fresh(databases, valkey_url) as payready:
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


def test_release_during_a_call_is_deducted_from_its_balance(databases: Databases, valkey_url: str) -> None:
    """The balance's time may be that of its record; the bank may have read the amounts when the call was sent."""
    with fresh(databases, valkey_url) as payready:
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
        assert payready.outcome("own")["detail"] == "80.00 USD needed, 20.00 USD there"


# --- figures ----------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.sampled_from(["1e-7", "314.15", "9007199254740993", "-0", "1E+2", "0.1000000000000000055511151231257827"]),
    st.integers(-(10**29), 10**29).map(str),
    st.decimals(-(10**15), 10**15, places=9).map(lambda figure: f"{figure:f}"),
    st.floats(-1e25, 1e25)
    .filter(lambda figure: abs(figure) > 1e-30)
    .map(repr),  # smaller numbers have too many decimal places and are quarantined
)


@each_time
@given(figures=st.tuples(numbers, numbers, numbers))
def test_amount_keeps_every_digit_from_webhook_to_outcome(
    databases: Databases, valkey_url: str, figures: tuple[str, str, str]
) -> None:
    """Any JSON number passes the parser, the ledger and the funds check, and is never a float."""
    names = ("available", "current", "limit")
    cells = ", ".join(f'"{name}": {figure}' for name, figure in zip(names, figures, strict=True))
    record = (
        f'{{"id": "bal_1", "accountId": "acct_a", "at": "{START:%Y-%m-%dT%H:%M:%SZ}", "source": "REFRESH", {cells}}}'
    )
    body = f'{{"events": [{{"id": "evt_1", "type": "balance.created", "record": {record}}}]}}'
    [(_, balance)] = parse(body.encode(), START).balances
    with fresh(databases, valkey_url) as payready:
        payready.initiate("p1", "acct_a", amount="0.01", funds_check="disabled")
        payready.run_tasks()
        payready.queue.merge(flow.ingest_events(payready.rt, [("evt_1", balance)], []))
        payready.run_tasks()
        sheet = payready.outcome("p1")["balance"]
    assert [Decimal(sheet[name]) for name in names] == [Decimal(figure) for figure in figures]
