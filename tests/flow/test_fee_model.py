"""Random calls and balances against a model of the provider: the ledger owes what the provider is owed."""

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


@settings(max_examples=25, deadline=None)
@given(story=st.lists(steps, min_size=1, max_size=7))
@example(story=TWICE)
def test_posted_entries_are_the_accepted_calls_at_the_price_in_force(
    made_on_sqlite: MakeSystem, story: list[tuple[str, list[str], int, int, bool, int]]
) -> None:
    """At every moment the shares add up; to the millionth once the invoice has resolved all calls."""
    truth = Truth()
    with made_on_sqlite() as payready:
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
