"""What an invoice says: charges by call or aggregated, credits and totals; its period and its errors. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from worker.rules.invoice_format import InvoiceFormat


class InvoiceError(Exception):
    """The invoice cannot be used. The message names the line, the column, the rule, and the option that helps."""


@dataclass(frozen=True, kw_only=True)
class InvoicePeriod:
    """The period of an invoice: calls made from `since` to before `until`."""

    since: datetime
    until: datetime
    tolerance: timedelta
    """Maximum difference between the invoice's times and the ledger's."""

    def contains(self, at: datetime) -> bool:
        """Return whether a call made at this time belongs to the invoice, by the ledger's clock."""
        return self.since <= at < self.until

    def contains_away_from_boundaries(self, at: datetime) -> bool:
        """Return whether it belongs to the invoice by any clock within the tolerance.

        Nearer to a boundary, the call may be on the neighbouring month's invoice.
        """
        return self.since + self.tolerance <= at < self.until - self.tolerance

    def nearest_boundary(self, at: datetime) -> datetime:
        """Return `since` or `until`, the nearer one to this time."""
        return min(self.since, self.until, key=lambda boundary: abs(at - boundary))


class Level(StrEnum):
    """What one line of an aggregated invoice covers."""

    MONTH = "month"
    DAY = "day"
    ACCOUNT = "account"
    KIND = "kind"


@dataclass(frozen=True, kw_only=True, slots=True)
class InvoiceLine:
    """One charge of the invoice, for a call made from `since` to `until`."""

    row: int
    """Line number in the file."""
    number: str
    account_id: str
    since: datetime
    until: datetime
    amount: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregatedLine:
    """One charge for several calls: count x price, for calls made from `since` to `until`."""

    row: int
    label: str
    """The line's description or key, for the report."""
    account_id: str | None
    since: datetime
    until: datetime
    count: int
    unit_price: Decimal | None
    amount: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditLine:
    """A negative amount: a refund or a discount. It charges no call."""

    row: int
    label: str
    amount: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class TotalLine:
    """A total or subtotal that the file states. It is checked against the lines, and is no charge."""

    row: int
    label: str
    amount: Decimal
    is_grand_total: bool


@dataclass(frozen=True, kw_only=True)
class InvoiceContent:
    """What a file says, as understood."""

    lines: Sequence[InvoiceLine]
    """Empty for an aggregated invoice."""
    aggregated_lines: Sequence[AggregatedLine]
    """Empty for an invoice by call."""
    level: Level | None
    """Level of the aggregated lines. None for an invoice by call."""
    credits: Sequence[CreditLine]
    totals: Sequence[TotalLine]
    format: InvoiceFormat
    assumptions: Sequence[str]
    """One sentence each: what was proposed from the file, and confirmed by no option and no profile."""

    @property
    def first_lines(self) -> Sequence[InvoiceLine | AggregatedLine]:
        """Return the first three charges."""
        return (*self.lines[:3], *self.aggregated_lines[:3])
