"""Rows of a file as charges, credits, totals and notes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from worker.rules.decimals import decimal_text
from worker.rules.invoice_lines import AggregatedLine, CreditLine, InvoiceError, InvoiceLine, InvoicePeriod
from worker.rules.invoice_reading.amount_text import parse_amount
from worker.rules.invoice_reading.date_text import DateReader, TimeSpan, ZonelessTimeError
from worker.rules.invoice_reading.error_texts import (
    count_hint,
    empty_amount_hint,
    no_date_text,
    other_currency_hint,
    outside_text,
)
from worker.rules.invoice_reading.header_search import Header
from worker.rules.invoice_reading.reading_options import Role
from worker.rules.invoice_reading.row_table import Cell, cell_text, label_text, quoted
from worker.rules.invoice_reading.style_detection import Styles
from worker.rules.invoice_reading.total_lines import TotalCheck, amount_beside_label, is_tax_label, is_total_label

MAX_ID_LENGTH = 200
MAX_AMOUNT = Decimal(10) ** 15
MAX_DECIMALS = 30


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the rows of one file are read by."""

    header: Header
    styles: Styles
    dates: DateReader
    period: InvoicePeriod
    currency: str
    is_aggregated: bool
    is_spreadsheet: bool


@dataclass(kw_only=True)
class ReadRows:
    """What the rows of a file say, in their order."""

    lines: list[InvoiceLine] = field(default_factory=list)
    aggregated_lines: list[AggregatedLine] = field(default_factory=list)
    credits: list[CreditLine] = field(default_factory=list)
    totals: TotalCheck = field(default_factory=TotalCheck)
    notes: list[str] = field(default_factory=list)
    """Lines that charge nothing, for the assumptions."""
    zoneless_midnights: list[int] = field(default_factory=list)
    """Indexes of the lines with a time 00:00 without a zone, which are read as days."""


class ChargeReader:
    """Read a file's rows, one after the other, below its header."""

    def __init__(self, rules: Rules) -> None:
        """Initialize."""
        self.read_rows = ReadRows()
        self._rules = rules
        self._header = rules.header
        self._width = max(at for at, name in enumerate(rules.header.names) if name) + 1
        at = rules.header.positions
        self._account_at, self._date_at, self._amount_at = at.get(Role.ACCOUNT), at.get(Role.DATE), at[Role.AMOUNT]
        self._kind_at = at.get(Role.KIND)
        self._amounts: dict[Cell, Decimal] = {}
        self._accounts: dict[Cell, str] = {}
        self._kinds: set[Cell] = set()
        self._last_row, self._is_last_short, self._last_new_amount_row = 0, False, 0
        self._earliest = rules.period.since - rules.period.tolerance
        self._latest = rules.period.until + rules.period.tolerance

    def read(self, row: int, cells: Sequence[Cell]) -> None:
        """Read one row.

        Raises:
            InvoiceError: it breaks a rule.
        """
        self._last_row, self._is_last_short = row, False
        if len(cells) != self._width:
            cells = self._fitted(row, cells)
        if (self._is_last_short or not self._is_known(cells)) and self._read_special(row, cells):
            return
        if self._is_last_short:
            hint = empty_amount_hint(is_spreadsheet=False)
            raise self._error(row, f"the number of fields differs from the header; the file may be cut off; {hint}")
        if self._kind_at is not None:
            self._kinds.add(cells[self._kind_at])
        amount = self._amount(row, cells)
        self._check_currency(row, cells)
        if self._rules.is_aggregated:
            self._read_aggregated(row, cells, amount)
        else:
            self._read_line(row, cells, amount)
        self.read_rows.totals.add_charge(amount)

    def check_end(self, *, ends_within_line: bool) -> None:
        """Raise if the last line of a file without a last line end is incomplete."""
        if ends_within_line and self._is_last_short:
            raise self._error(self._last_row, "the last line is incomplete; the file may be cut off")
        if ends_within_line and self._amount_at == self._width - 1 and self._is_last_amount_shorter():
            raise self._error(
                self._last_row,
                f"{self._name(Role.AMOUNT)} has fewer decimals than all others, and no line end; the file may be cut "
                "off. If it is complete, add a line end",
            )

    def _is_last_amount_shorter(self) -> bool:
        """Return whether all other amounts have equally many decimals, and the last row's has fewer."""
        if self._last_new_amount_row != self._last_row:
            return False
        decimals = [-int(amount.as_tuple().exponent) for amount in self._amounts.values()]
        return len(set(decimals[:-1])) == 1 and decimals[-1] < decimals[0]

    def _fitted(self, row: int, cells: Sequence[Cell]) -> Sequence[Cell]:
        """Return the row with as many cells as the header. Empty cells beyond the header are ignored."""
        if any(cell_text(cell) for cell in cells[self._width :]):
            raise self._error(
                row, "the number of fields differs from the header; a field with the delimiter needs quotes"
            )
        self._is_last_short = len(cells) < self._width and not self._rules.is_spreadsheet
        return [*cells[: self._width], *[""] * (self._width - len(cells))]

    def _is_known(self, cells: Sequence[Cell]) -> bool:
        """Return whether the row is a charge with a known account and kind. Otherwise it may be another kind of row."""
        amount = self._amounts.get(cells[self._amount_at])
        if amount is None or amount < 0 or self._account_at is None or cells[self._account_at] not in self._accounts:
            return False
        return self._kind_at is None or cells[self._kind_at] in self._kinds

    def _read_special(self, row: int, cells: Sequence[Cell]) -> bool:
        """Read an empty row, a repeated header, a total, a tax, a note or a credit. Return whether the row is one."""
        texts = [cell_text(cell) for cell in cells]
        filled = [at for at, text in enumerate(texts) if text]
        if not filled:
            return True
        if texts == list(self._header.names[: self._width]):
            self._note(row, "repeats the header")
            return True
        return (
            self._read_total(row, cells, texts)
            or self._read_tax(row, cells, texts)
            or self._read_note(row, texts, filled)
            or self._read_credit(row, cells)
        )

    def _read_total(self, row: int, cells: Sequence[Cell], texts: Sequence[str]) -> bool:
        label = next((text for at, text in enumerate(texts) if at != self._amount_at and is_total_label(text)), None)
        if label is not None:
            amount = self._total_amount(row, cells, texts)
        else:
            beside = next((each for text in texts if (each := amount_beside_label(text))), None)
            if beside is None:
                return False
            label, amount = next(text for text in texts if text), self._parsed(row, Role.AMOUNT, beside)
        if amount is None:
            self._note(row, f"states no amount: {quoted(label)}")
        else:
            self.read_rows.totals.add_total(row, label_text(label), amount)
        self._is_last_short = False
        return True

    def _total_amount(self, row: int, cells: Sequence[Cell], texts: Sequence[str]) -> Decimal | None:
        """Return the amount of a total, which may be in another column if it is the only one of the row."""
        if texts[self._amount_at]:
            return self._amount(row, cells)
        style = self._rules.styles.decimals
        others = [at for at, text in enumerate(texts) if isinstance(cells[at], Decimal) or parse_amount(style, text)]
        return self._parsed(row, Role.AMOUNT, cells[others[0]]) if len(others) == 1 else None

    def _read_tax(self, row: int, cells: Sequence[Cell], texts: Sequence[str]) -> bool:
        """Read a tax, which has no account, date and count of calls."""
        label = next((text for text in texts if is_tax_label(text)), None)
        roles = (Role.ACCOUNT, Role.DATE, Role.COUNT)
        of_charge = {texts[at] for role, at in self._header.positions.items() if role in roles}
        if label is None or not texts[self._amount_at] or of_charge - {"", label}:
            return False
        self.read_rows.totals.add_tax(amount := self._amount(row, cells))
        self._note(row, f"is a tax: {quoted(label)}, {decimal_text(amount)}")
        return True

    def _read_note(self, row: int, texts: Sequence[str], filled: Sequence[int]) -> bool:
        """Read a row that has one text only, and is no charge with an account alone."""
        text = texts[filled[0]]
        is_account = filled[0] == self._account_at and " " not in text
        if len(filled) > 1 or filled[0] == self._amount_at or is_account:
            return False
        self._note(row, f"is a note: {quoted(text)}")
        return True

    def _note(self, row: int, text: str) -> None:
        self.read_rows.notes.append(f"Line {row} {text}.")

    def _read_credit(self, row: int, cells: Sequence[Cell]) -> bool:
        if not cell_text(cells[self._amount_at]):
            return False
        amount = self._amount(row, cells)
        if amount >= 0 or self._is_last_short:
            return False
        self._check_currency(row, cells)
        self.read_rows.credits.append(CreditLine(row=row, label=self._label(cells), amount=amount))
        self.read_rows.totals.add_credit(amount)
        return True

    def _label(self, cells: Sequence[Cell]) -> str:
        """Return the description, the account or the date of a row, or else its first text."""
        roles = [role for role in (Role.KIND, Role.ACCOUNT, Role.DATE) if role in self._header.positions]
        texts = [cell_text(cells[self._header.positions[role]]) for role in roles]
        return label_text(next(filter(None, [*texts, *map(cell_text, cells)])))

    def _read_line(self, row: int, cells: Sequence[Cell], amount: Decimal) -> None:
        span = self._span(row, cells, len(self.read_rows.lines))
        number_at = self._header.positions.get(Role.NUMBER)
        self.read_rows.lines.append(
            InvoiceLine(
                row=row,
                number=str(row) if number_at is None else self._id(row, Role.NUMBER, cells[number_at]),
                account_id=self._account(row, cells),
                since=span.since,
                until=span.until,
                amount=amount,
            )
        )

    def _read_aggregated(self, row: int, cells: Sequence[Cell], amount: Decimal) -> None:
        unit_price = self._optional_amount(row, Role.UNIT_PRICE, cells)
        span = self._span(row, cells, len(self.read_rows.aggregated_lines)) if self._date_at is not None else None
        count = self._count(row, cells, unit_price, amount)
        if span is not None and span.since == span.until and count != 1:
            raise self._error(row, f"{self._name(Role.DATE)} of several calls must be a day or a month, not a time")
        self.read_rows.aggregated_lines.append(
            AggregatedLine(
                row=row,
                label=self._label(cells),
                account_id=self._account(row, cells) if self._account_at is not None else None,
                since=span.since if span else self._rules.period.since,
                until=span.until if span else self._rules.period.until,
                count=count,
                unit_price=unit_price,
                amount=amount,
            )
        )

    def _count(self, row: int, cells: Sequence[Cell], unit_price: Decimal | None, amount: Decimal) -> int:
        if Role.COUNT in self._header.positions:
            count = self._parsed(row, Role.COUNT, cells[self._header.positions[Role.COUNT]])
        elif unit_price:
            count = amount / unit_price
        else:
            raise self._error(row, f"{self._name(Role.UNIT_PRICE)} is empty or 0, so the number of calls is unknown")
        if count < 0 or count != count.to_integral_value():
            raise self._error(row, f"the number of calls must be a whole number, but is {count}; {count_hint(count)}")
        return int(count)

    def _account(self, row: int, cells: Sequence[Cell]) -> str:
        cell = cells[self._account_at or 0]
        account = self._accounts.get(cell)
        if account is None:
            account = self._accounts[cell] = self._id(row, Role.ACCOUNT, cell)
        return account

    def _id(self, row: int, role: Role, cell: Cell) -> str:
        text = cell.strip() if isinstance(cell, str) else cell_text(cell)
        if not text:
            raise self._error(row, f"{self._name(role)} is empty; only a credit or a total has none")
        if len(text) > MAX_ID_LENGTH or not text.isprintable():
            raise self._error(row, f"{self._name(role)} is too long or has a control character: {quoted(text)}")
        return text

    def _span(self, row: int, cells: Sequence[Cell], index: int) -> TimeSpan:
        cell = cells[self._date_at or 0]
        try:
            span: TimeSpan | None
            if isinstance(cell, datetime):
                span = self._rules.dates.read_zoneless(cell)
            else:
                span = self._rules.dates.read(cell.strip()) if isinstance(cell, str) else None
        except (ZonelessTimeError, OverflowError):
            raise self._error(
                row, f"{self._name(Role.DATE)} is a time without a zone: {quoted(cell)}; give --time-zone, such as UTC"
            ) from None
        if span is None:
            raise self._error(row, no_date_text(self._name(Role.DATE), cell, self._rules.styles))
        if span.since < self._earliest or span.until > self._latest:
            raise self._error(row, outside_text(span, self._rules.period, is_aggregated=self._rules.is_aggregated))
        if span.is_zoneless_midnight:
            self.read_rows.zoneless_midnights.append(index)
        return span

    def _optional_amount(self, row: int, role: Role, cells: Sequence[Cell]) -> Decimal | None:
        at = self._header.positions.get(role)
        return self._parsed(row, role, cells[at]) if at is not None and cell_text(cells[at]) else None

    def _amount(self, row: int, cells: Sequence[Cell]) -> Decimal:
        cell = cells[self._amount_at]
        amount = self._amounts.get(cell)
        if amount is None:
            amount = self._amounts[cell] = self._parsed(row, Role.AMOUNT, cell)
            self._last_new_amount_row = row
        return amount

    def _parsed(self, row: int, role: Role, cell: Cell) -> Decimal:
        if isinstance(cell, Decimal):
            if abs(cell) >= MAX_AMOUNT or int(cell.as_tuple().exponent) < -MAX_DECIMALS:
                raise self._error(row, f"{self._name(role)} has too many digits: {quoted(cell)}")
            return cell
        text, name, style = cell_text(cell), self._name(role), self._rules.styles.decimals
        if not text:
            raise self._error(row, f"{name} is empty; {empty_amount_hint(is_spreadsheet=self._rules.is_spreadsheet)}")
        parsed = parse_amount(style, text)
        if parsed is None:
            raise self._error(row, f"{name} is not an amount written as {style}: {quoted(text)} (--decimal-style)")
        if not parsed.is_in(self._rules.currency):
            hint = other_currency_hint(parsed, self._rules.currency)
            raise self._error(row, f"{name} is {quoted(text)}, but the calls are in {hint}")
        return parsed.value

    def _check_currency(self, row: int, cells: Sequence[Cell]) -> None:
        at = self._header.positions.get(Role.CURRENCY)
        if at is None or cells[at] == self._rules.currency:
            return
        if cell_text(cells[at]).upper() != self._rules.currency:
            raise self._error(
                row,
                f"{self._name(Role.CURRENCY)} is {quoted(cells[at])}, but the calls are in {self._rules.currency} "
                "(--currency)",
            )

    def _name(self, role: Role) -> str:
        return self._header.name(role)

    def _error(self, row: int, text: str) -> InvoiceError:
        return InvoiceError(f"line {row}: {text}")
