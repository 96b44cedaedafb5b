"""Total and tax lines of a file: their words, and the check that totals agree with the lines above."""

import re
from dataclasses import dataclass
from decimal import Decimal

from worker.rules.decimals import decimal_text
from worker.rules.invoice_lines import InvoiceError, TotalLine

_SUBTOTAL = r"sub[ -]?total|zwischensumme|sous[ -]?total|total (?:for|of|per)|carried forward|brought forward|übertrag"
_TOTAL = (
    r"(?:grand|invoice|overall|net|running|account|daily|monthly)? ?totals?"
    r"|sum|total (?:due|amount|charges?|fees?|cost)"
    r"|(?:amount|balance) due|amount payable|(?:gesamt|end)(?:summe|betrag)|summe|gesamt|total général|montant total"
)
_LABEL = re.compile(
    rf"(?:(?P<sub>(?:{_SUBTOTAL})\b.*)|(?:{_TOTAL})(?: \([^)]*\)| in [a-z]{{3}}| [a-z]{{3}})?) ?:?", re.IGNORECASE
)
_RATE = r"\(?@? ?[0-9]{1,2}(?:[.,][0-9]{1,3})? ?%\)?"
_TAX = re.compile(
    rf"(?:(?:plus|zzgl\.?) )?(?:{_RATE} )?(?:sales tax|tax|vat|gst|hst|mwst|ust|umsatzsteuer|mehrwertsteuer|tva|iva)\.?"
    rf"(?: {_RATE})? ?:?",
    re.IGNORECASE,
)
MAX_LABEL_LENGTH = 200
"""A longer text is no label: the search in it could take minutes."""
_LABEL_WITH_AMOUNT = re.compile(r"(?P<label>[^:]{3,40}):\s*(?P<amount>[^:]*[0-9][^:]*)")


def is_total_label(text: str) -> bool:
    """Return whether a text names a total or a subtotal."""
    return len(text) <= MAX_LABEL_LENGTH and _LABEL.fullmatch(" ".join(text.split())) is not None


def is_tax_label(text: str) -> bool:
    """Return whether a text names a tax, such as "VAT 19%"."""
    return len(text) <= MAX_LABEL_LENGTH and _TAX.fullmatch(" ".join(text.split())) is not None


def amount_beside_label(text: str) -> str | None:
    """Return the amount of a cell such as "Total: 12.50", or None."""
    match = _LABEL_WITH_AMOUNT.fullmatch(text) if len(text) <= MAX_LABEL_LENGTH else None
    return match["amount"] if match and is_total_label(match["label"]) else None


@dataclass(frozen=True, kw_only=True)
class _Sums:
    charges: Decimal
    credits: Decimal
    taxes: Decimal

    def agree_with(self, total: Decimal) -> bool:
        """Return whether a total is that of the charges, with or without credits, and with them the taxes.

        It may be rounded to its decimals.
        """
        unit = Decimal(1).scaleb(min(int(total.as_tuple().exponent), 0))
        sums = (self.charges, self.charges + self.credits, self.charges + self.credits + self.taxes)
        return any(sum_ == total or abs(sum_ - total) * 2 <= unit for sum_ in sums)


class TotalCheck:
    """The sums of the lines so far, and the totals that the file states."""

    def __init__(self) -> None:
        """Start without lines."""
        self._charges = Decimal(0)
        self._credits = Decimal(0)
        self._taxes = Decimal(0)
        self._at_last_total = self._sums()
        self._totals: list[TotalLine] = []
        self._unexplained: list[TotalLine] = []

    def add_charge(self, amount: Decimal) -> None:
        """Add a charge."""
        self._charges += amount

    def add_credit(self, amount: Decimal) -> None:
        """Add a credit, which is negative."""
        self._credits += amount

    def add_tax(self, amount: Decimal) -> None:
        """Add a tax, which is no charge but may be part of a total."""
        self._taxes += amount

    def add_total(self, row: int, label: str, amount: Decimal) -> None:
        """Add a total that the file states."""
        total = TotalLine(row=row, label=label, amount=amount, is_grand_total=False)
        self._totals.append(total)
        all_lines, before = self._sums(), self._at_last_total
        since = _Sums(
            charges=all_lines.charges - before.charges,
            credits=all_lines.credits - before.credits,
            taxes=all_lines.taxes - before.taxes,
        )
        if not (since.agree_with(amount) or all_lines.agree_with(amount)):
            self._unexplained.append(total)
        self._at_last_total = all_lines

    @property
    def has_totals(self) -> bool:
        """Whether the file states a total."""
        return bool(self._totals)

    def _sums(self) -> _Sums:
        return _Sums(charges=self._charges, credits=self._credits, taxes=self._taxes)

    def checked_totals(self) -> list[TotalLine]:
        """Return the totals. A grand total is that of the whole file.

        Raises:
            InvoiceError: a total agrees neither with the lines above it nor with the whole file.
        """
        for total in self._unexplained:
            if not self._sums().agree_with(total.amount):
                found = decimal_text(self._charges + self._credits + self._taxes)
                raise InvoiceError(
                    f"line {total.row}: {total.label!r} is {decimal_text(total.amount)}, but the file's lines add "
                    f"up to {found}; the file may be cut off, repeat lines, or have another --decimal-style"
                )
        return [
            TotalLine(row=each.row, label=each.label, amount=each.amount, is_grand_total=self._is_grand(each))
            for each in self._totals
        ]

    def _is_grand(self, total: TotalLine) -> bool:
        match = _LABEL.fullmatch(total.label)
        return self._sums().agree_with(total.amount) and not (match and match["sub"])
