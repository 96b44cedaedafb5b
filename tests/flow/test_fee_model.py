"""Random calls and balances against a model of the provider: the fee ledger has exactly the accepted calls."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.in_process import PRICES, START, InProcessSystem, MakeSystem
from worker.errors import CallFailed, CallNotSent, CallRejected, CallResultUnknown, FailureReason, RateLimited
from worker.flow import attribution
from worker.ledger import fee_calls, fee_statement, invoices
from worker.ledger.engine import transaction
from worker.ledger.invoices import InvoiceEvidence
from worker.rules.invoice_lines import InvoiceLine, InvoicePeriod
from worker.rules.pricing import parse_price_list
from worker.rules.reconciliation import reconcile

ACCOUNTS = ("acct_a", "acct_b")
PRICE_RISE = START + timedelta(hours=12)
PRICE_LIST = f'{PRICES}[[price]]\nmode = "TEST"\nfrom = {PRICE_RISE:%Y-%m-%d}\nper_call = "0.123457"\n'
RESULTS: dict[str, Callable[[], int | CallFailed]] = {
    "accepted": lambda: 202,
    "accepted, response lost": lambda: CallResultUnknown("timeout"),
    "not accepted, response lost": lambda: CallResultUnknown("500", 500),
    "unsent": lambda: CallNotSent("no connection"),
    "throttled": lambda: RateLimited("rate limit", None),
    "rejected": lambda: CallRejected(403, FailureReason.CONNECTION_INACTIVE, "inactive"),
}


@dataclass
class ProviderModel:
    """Model of the provider: the accepted calls, and the calls whose balance is still to be sent."""

    accepted: list[tuple[str, datetime]] = field(default_factory=list)
    without_balance: dict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))

    def response(self, payready: InProcessSystem, account: str, result: str) -> Callable[[], int | CallFailed]:
        """Return a function that processes one call with this result."""

        def process_call() -> int | CallFailed:
            if result.startswith("accepted"):
                self.accepted.append((account, payready.clock.now))
                self.without_balance[account].append(payready.clock.now)
            return RESULTS[result]()

        return process_call

    def can_send_balance(self, account: str, now: datetime) -> bool:
        """Whether the provider may send a balance. A balance after `MAX_BALANCE_DELAY` belongs to no call."""
        self.without_balance[account] = [
            called_at for called_at in self.without_balance[account] if now - called_at < attribution.MAX_BALANCE_DELAY
        ]
        return bool(self.without_balance[account])

    @staticmethod
    def price(at: datetime) -> Decimal:
        """Return the contract's price of a call at this time."""
        return Decimal("0.123457") if at >= PRICE_RISE else Decimal("0.1")


steps = st.tuples(
    st.sampled_from(ACCOUNTS),
    st.lists(st.sampled_from(list(RESULTS)), min_size=1, max_size=3),
    st.sampled_from([0, 30]),  # the age that the payment allows
    st.sampled_from([0, 1, 20, 70]),  # seconds until a balance may come
    st.booleans(),  # whether one does
    st.sampled_from([0, 5, 90, 4000, 40_000]),  # seconds until the next payment
)
TWO_CALLS: list[tuple[str, list[str], int, int, bool, int]] = [
    ("acct_a", ["not accepted, response lost", "accepted"], 0, 0, True, 4000),
    ("acct_a", ["accepted, response lost", "accepted, response lost"], 0, 70, True, 90),
    ("acct_a", ["throttled"], 30, 70, True, 4000),
]
"""A refresh has two calls, and each causes a balance. The second balance does not belong to the next refresh."""


@settings(max_examples=25, deadline=None)
@given(payments=st.lists(steps, min_size=1, max_size=7))
@example(payments=TWO_CALLS)
def test_posted_entries_are_the_accepted_calls_at_their_prices(
    make_sqlite_system: MakeSystem, payments: list[tuple[str, list[str], int, int, bool, int]]
) -> None:
    """After each payment every accepted call has an entry. After the invoice the sums are equal to the millionth."""
    provider = ProviderModel()
    with make_sqlite_system() as payready:
        payready.rt.price_list = parse_price_list(PRICE_LIST)
        for number, (account, results, age, pause, has_balance, gap) in enumerate(payments):
            script = [provider.response(payready, account, result) for result in [*results, *["rejected"] * 40]]
            payready.provider.script[account] = list(script)
            payready.initiate(f"p{number}", account, timeout_s=60, max_balance_age_s=age)
            payready.run_tasks()
            _pass_time(payready, pause)
            if has_balance and provider.can_send_balance(account, payready.clock.now):
                provider.without_balance[account].pop(0)
                payready.balance(account)
                payready.run_tasks()
            _pass_time(payready, gap)
            _assert_ledger_matches(payready, provider)
        _resolve_by_invoice_and_assert_equal_sums(payready, provider)


def _pass_time(payready: InProcessSystem, seconds: int) -> None:
    """Advance the clock in four steps, with maintenance after each."""
    for _ in range(4):
        payready.clock.advance(seconds / 4)
        payready.run_maintenance()


def _assert_ledger_matches(payready: InProcessSystem, provider: ProviderModel) -> None:
    """Assert that every accepted call is posted or pending, and every posted call was accepted."""
    with transaction(payready.engine) as tx:
        lines = fee_statement.statement_lines(tx, START, payready.clock.now + timedelta(seconds=1), "account")
    for line in lines:
        accepted = sum(account == line.key for account, _ in provider.accepted)
        assert line.posted <= accepted <= line.posted + line.pending
    assert {account for account, _ in provider.accepted} <= {line.key for line in lines}


def _resolve_by_invoice_and_assert_equal_sums(payready: InProcessSystem, provider: ProviderModel) -> None:
    period = InvoicePeriod(
        since=datetime(2026, 11, 1, tzinfo=UTC), until=datetime(2026, 12, 1, tzinfo=UTC), tolerance=timedelta(seconds=1)
    )
    charges = [
        InvoiceLine(row=row, number=str(row), account_id=account, since=at, until=at, amount=provider.price(at))
        for row, (account, at) in enumerate(provider.accepted)
    ]
    with transaction(payready.engine) as tx:
        calls = fee_calls.ledger_calls(tx, "USD", period.since, period.until)
        found = reconcile(charges, calls, period, (), currency="USD")
        evidence = InvoiceEvidence(name="i", digest="x", period="2026-11", currency="USD", read_as={}, assumptions=())
        invoices.apply_invoice_to_pending_calls(tx, found, evidence, payready.clock.now)
        lines = fee_statement.statement_lines(tx, period.since, period.until, "price")
    assert (found.unmatched_lines, found.charged_though_void, found.price_differences) == ([], [], [])
    assert sum(line.pending for line in lines) == 0
    charged = sum((provider.price(at) for _, at in provider.accepted), Decimal(0))
    assert sum((line.posted_amount for line in lines), Decimal(0)) == charged
