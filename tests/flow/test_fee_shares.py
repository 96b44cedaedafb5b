"""Whatever happens: the ledger owes what the provider is owed, and no balance is released twice.

On SQLite only: what is tried here are orders of things; the databases are tried against each other elsewhere.
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
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
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
    "accepted, answer lost": lambda: CallResultUnknown("timeout"),
    "not accepted, answer lost": lambda: CallResultUnknown("500", 500),
    "unsent": lambda: CallNotSent("no connection"),
    "throttled": lambda: RateLimited("rate limit", None),
    "refused": lambda: CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"),
}
each_time = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass
class Truth:
    """What the provider knows: the calls that it accepted, and which of them it still owes a balance."""

    accepted: list[tuple[str, datetime]] = field(default_factory=list)
    owed: dict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))

    def answers(self, payready: InProcessSystem, account: str, end: str) -> Callable[[], int | CallFailed]:
        """How the provider takes one call."""

        def take() -> int | CallFailed:
            if end.startswith("accepted"):
                self.accepted.append((account, payready.clock.now))
                self.owed[account].append(payready.clock.now)
            return ENDS[end]()

        return take

    def owes(self, account: str, now: datetime) -> bool:
        """Whether a balance may come; what is later than anyone takes it for is lost."""
        self.owed[account] = [
            called_at for called_at in self.owed[account] if now - called_at < attribution.MAX_BALANCE_DELAY
        ]
        return bool(self.owed[account])

    @staticmethod
    def price(at: datetime) -> Decimal:
        """What the contract says of a call made at this time."""
        return Decimal("0.123457") if at >= DEARER else Decimal("0.1")


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Databases:
    """Migrated databases to throw away."""
    return Databases(tmp_path_factory.mktemp("cents"), None)


@contextmanager
def fresh(databases: Databases, valkey_url: str) -> Iterator[InProcessSystem]:
    """A payready with nothing in it."""
    with databases.create() as address, in_process_system(address, valkey_url) as made:
        yield made


steps = st.tuples(
    st.sampled_from(ACCOUNTS),
    st.lists(st.sampled_from(list(ENDS)), min_size=1, max_size=3),
    st.sampled_from([0, 30]),  # the age that the payment allows
    st.sampled_from([0, 1, 20, 70]),  # seconds until a balance may come
    st.booleans(),  # whether one does
    st.sampled_from([0, 5, 90, 4000, 40_000]),  # seconds until the next payment
)


TWICE: list[tuple[str, list[str], int, int, bool, int]] = [
    ("acct_a", ["not accepted, answer lost", "accepted"], 0, 0, True, 4000),
    ("acct_a", ["accepted, answer lost", "accepted, answer lost"], 0, 70, True, 90),
    ("acct_a", ["throttled"], 30, 70, True, 4000),
]
"""A refresh is called twice, and both calls bring a balance. The second one is not the answer to the call before."""


@each_time
@given(story=st.lists(steps, min_size=1, max_size=7))
@example(story=TWICE)
def test_posted_entries_are_the_accepted_calls_at_the_price_in_force(
    databases: Databases, valkey_url: str, story: list[tuple[str, list[str], int, int, bool, int]]
) -> None:
    """At every moment the shares add up; to the millionth once the invoice has resolved all calls."""
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
        _settle_by_invoice(payready, truth)


def _pass(payready: InProcessSystem, seconds: int) -> None:
    """Advance the clock and run maintenance now and then."""
    for _ in range(4):
        payready.clock.advance(seconds / 4)
        payready.run_maintenance()


def _agree(payready: InProcessSystem, truth: Truth) -> None:
    """Every accepted call is posted or openly pending; none is void, none is missing, none is posted without one."""
    with transaction(payready.engine) as tx:
        lines = fee_statement.statement_lines(tx, START, payready.clock.now + timedelta(seconds=1), "account")
    for line in lines:
        accepted = sum(account == line.key for account, _ in truth.accepted)
        assert line.posted <= accepted <= line.posted + line.pending
    assert {account for account, _ in truth.accepted} <= {line.key for line in lines}


def _settle_by_invoice(payready: InProcessSystem, truth: Truth) -> None:
    period = InvoicePeriod(
        since=datetime(2026, 11, 1, tzinfo=UTC), until=datetime(2026, 12, 1, tzinfo=UTC), tolerance=timedelta(seconds=1)
    )
    charges = [
        InvoiceLine(row=row, number=str(row), account_id=account, since=at, until=at, amount=truth.price(at))
        for row, (account, at) in enumerate(truth.accepted)
    ]
    with transaction(payready.engine) as tx:
        found = reconcile(charges, fee_calls.ledger_calls(tx, "USD", period.since, period.until), period)
        evidence = InvoiceEvidence(name="i", digest="x", period="2026-11", currency="USD")
        invoices.apply_invoice_to_pending_calls(tx, found, evidence, payready.clock.now)
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
def test_no_order_of_releases_covers_more_than_the_balance(
    databases: Databases, valkey_url: str, story: list[tuple[str, Any, Any]]
) -> None:
    """All that was released on the account since a balance's time, up to the last release by it, is covered by it."""
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


def test_a_release_while_the_call_was_under_way_is_deducted_from_its_balance(
    databases: Databases, valkey_url: str
) -> None:
    """The balance's time may be that of its record; the bank may have been asked as early as the call went out."""
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
        assert payready.outcome("own")["detail"] == "needed 80.00 USD, available 20.00 USD"


# --- figures ----------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.sampled_from(["1e-7", "314.15", "9007199254740993", "-0", "1E+2", "0.1000000000000000055511151231257827"]),
    st.integers(-(10**29), 10**29).map(str),
    st.decimals(-(10**15), 10**15, places=9).map(lambda figure: f"{figure:f}"),
    st.floats(-1e25, 1e25).filter(lambda figure: abs(figure) > 1e-30).map(repr),  # less has too many places: set aside
)


@each_time
@given(figures=st.tuples(numbers, numbers, numbers))
def test_a_figure_comes_out_as_the_provider_wrote_it(
    databases: Databases, valkey_url: str, figures: tuple[str, str, str]
) -> None:
    """Any JSON number, through the webhook's reader, the ledger and the verdict, to the outcome: never a float."""
    names = ("available", "current", "limit")
    cells = ", ".join(f'"{name}": {figure}' for name, figure in zip(names, figures, strict=True))
    record = (
        f'{{"id": "bal_1", "accountId": "acct_a", "at": "{START:%Y-%m-%dT%H:%M:%SZ}", "source": "REFRESH", {cells}}}'
    )
    body = f'{{"events": [{{"id": "evt_1", "type": "balance.created", "record": {record}}}]}}'
    balances = parse(body.encode(), START).balances
    with fresh(databases, valkey_url) as payready:
        payready.initiate("p1", "acct_a", amount="0.01", funds_check="disabled")
        payready.run_tasks()
        payready.queue.add(flow.ingest_events_and_resolve_payments(payready.rt, balances))
        payready.run_tasks()
        sheet = payready.outcome("p1")["balance"]
    assert [Decimal(sheet[name]) for name in names] == [Decimal(figure) for figure in figures]
