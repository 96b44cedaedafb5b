"""The header of a file: its line, and which column has which meaning."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from worker.rules.invoice_format import MAX_NAME_LENGTH, InvoiceColumns
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading.amount_text import currency_in_name
from worker.rules.invoice_reading.reading_options import NO_COLUMN, ReadingOptions, Role
from worker.rules.invoice_reading.row_table import Cell, RowTable, cell_text, quoted

MAX_HEADER_ROW = 100
"""A header is searched in this many lines."""

KNOWN_NAMES: Mapping[Role, Sequence[str]] = {
    Role.ACCOUNT: (
        (
            "account id|account|accountid|acct|acct id|account number|account no|connected account|customer account"
            "|account reference|konto|kontonummer|compte|cuenta"
        ),
    ),
    Role.DATE: (
        (
            "date|day|at|timestamp|time|datetime|date time|called at|call date|call time|created at|created|occurred at"
            "|usage date|service date|transaction date|event date|event time|requested at|request time|charge date"
            "|charged at|posting date|datum|tag|fecha"
        ),
        "period|month|billing period|service period|usage period|usage month|billing month|monat|zeitraum|mois",
        "invoice date|billing date",
    ),
    Role.AMOUNT: (
        (
            "amount|fee|charge|charges|cost|line total|line amount|total amount|net amount|fee amount|charge amount"
            "|extended price|betrag|montant|importe|gebühr|net"
        ),
        "total|sum|subtotal|gesamt|summe",
        "price|rate",
    ),
    Role.NUMBER: (
        "line id|line number|line no|line|charge id|fee id|item id|call id|request id|transaction id|event id|usage id",
        "id|number|no|nr|reference|ref|position|pos",
    ),
    Role.CURRENCY: ("currency|currency code|ccy|cur|währung|devise|moneda",),
    Role.COUNT: (
        (
            "count|quantity|qty|calls|call count|number of calls|units|requests|volume|usage|usage quantity|anzahl"
            "|menge|quantité|cantidad"
        ),
    ),
    Role.UNIT_PRICE: (
        "unit price|unit cost|price per call|price per unit|unit rate|einzelpreis|stückpreis",
        "price|rate",
    ),
    Role.KIND: (
        (
            "kind|description|type|product|item|service|sku|usage type|event type|product name|item description"
            "|category|beschreibung|bezeichnung|leistung|désignation"
        ),
        "details|memo|name",
    ),
}
"""Usual names of each meaning, the most usual group first."""
REQUIRED_TOGETHER = (Role.ACCOUNT, Role.DATE, Role.COUNT, Role.KIND)
"""Beside the amount, a header names one of these."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The names of a file's columns, and the positions of those that are used."""

    row: int
    names: Sequence[str]
    positions: Mapping[Role, int]

    @property
    def columns(self) -> InvoiceColumns:
        """Return the names of the columns that are used."""
        return InvoiceColumns.model_validate({role: self.names[at] for role, at in self.positions.items()})

    def name(self, role: Role) -> str:
        """Return the name of a column that is used, or its meaning."""
        return self.names[self.positions[role]] if role in self.positions else role.value


@dataclass(frozen=True, kw_only=True)
class LocatedTable:
    """A table, and where its header is."""

    table: RowTable
    row: int
    names: Sequence[str]


def locate_header(candidates: Sequence[RowTable], options: ReadingOptions, currency: str) -> LocatedTable:
    """Return the candidate that has a header.

    Raises:
        InvoiceError: none has one, or several have an equally good one.
    """
    found = [header for table in candidates if (header := _header_of(table, options, currency))]
    if not found:
        if len(candidates) == 1:
            _raise_if_broken(candidates[0])
        raise InvoiceError(_no_header_text(candidates, options))
    scores = [_score(each.names, options, currency) for each in found]
    if max(scores) == 0:  # --header-row names a line without a usual name
        return max(found, key=lambda each: len(each.names))
    best = [each for each, score in zip(found, scores, strict=True) if score == max(scores)]
    if len(best) > 1:
        option = "--sheet" if best[0].table.sheet else "--delimiter"
        texts = ", ".join(repr(each.table.sheet or each.table.delimiter) for each in best)
        raise InvoiceError(f"the file can be read in several ways: {texts}; give {option}")
    return best[0]


def _header_of(table: RowTable, options: ReadingOptions, currency: str) -> LocatedTable | None:
    """Return the given line, or the first of the lines with the most meanings: a summary may precede the details."""
    rows = [(row, [cell_text(cell) for cell in cells]) for row, cells in _first_rows(table, options.header_row)]
    if options.header_row is not None:
        rows = [(row, names) for row, names in rows if row == options.header_row]
    else:
        rows = [(row, names) for row, names in rows if _is_header(names, options, currency)]
    if not rows:
        return None
    row, names = max(rows, key=lambda each: _score(each[1], options, currency))
    return LocatedTable(table=table, row=row, names=names)


def _first_rows(table: RowTable, header_row: int | None) -> list[tuple[int, Sequence[Cell]]]:
    """Return the lines that can have the header. A delimiter by which the file cannot be split has none."""
    last = MAX_HEADER_ROW if header_row is None else header_row
    rows: list[tuple[int, Sequence[Cell]]] = []
    try:
        rows.extend(takewhile(lambda each: each[0] <= last, table.rows()))
    except InvoiceError:
        return rows
    return rows


def _raise_if_broken(table: RowTable) -> None:
    for row, _ in table.rows():
        if row > MAX_HEADER_ROW:
            return


def _is_header(names: Sequence[str], options: ReadingOptions, currency: str) -> bool:
    given = [name for name in options.columns.values() if name != NO_COLUMN]
    if not all(name in names for name in given):
        return False
    roles = _roles(names, options, currency)
    return Role.AMOUNT in roles and any(role in roles for role in REQUIRED_TOGETHER)


def _roles(names: Sequence[str], options: ReadingOptions, currency: str) -> set[Role]:
    """Return the meanings that these names have, usually or by options."""
    given = {role for role, name in options.columns.items() if name in names}
    return given | {role for role in Role if role not in options.columns and _proposed(names, role, currency)}


def _score(names: Sequence[str], options: ReadingOptions, currency: str) -> int:
    return len(_roles(names, options, currency))


def _no_header_text(candidates: Sequence[RowTable], options: ReadingOptions) -> str:
    """Return why no header was found, with the columns of the line that is most like one."""
    rows = [(cells, row) for table in candidates for row, cells in _first_rows(table, options.header_row)]
    if not rows:
        return "the file has no lines"
    if options.header_row is not None:
        return f"line {options.header_row} is empty or does not exist; --header-row names the line with the columns"
    most = max((sum(1 for cell in cells if cell_text(cell)), -row) for cells, row in rows)
    names = next(
        [cell_text(cell) for cell in cells] for cells, row in rows if -row == most[1] and _filled(cells, most[0])
    )
    given = [(role, name) for role, name in options.columns.items() if name not in (NO_COLUMN, *names)]
    listed = ", ".join(quoted(name) for name in names if name)
    if given:
        role, name = given[0]
        return f"the file has no column {quoted(name)} ({role.option}); line {-most[1]} has: {listed}"
    delimiter = "--delimiter, " if most[0] == 1 else ""
    return (
        f"no line names the columns of an account, a date and an amount; give {delimiter}--header-row, "
        f"--account-column, --date-column and --amount-column. Line {-most[1]} has: {listed}"
    )


def _filled(cells: Sequence[Cell], count: int) -> bool:
    return sum(1 for cell in cells if cell_text(cell)) == count


def assign_columns(located: LocatedTable, options: ReadingOptions, currency: str, assumptions: list[str]) -> Header:
    """Return the header with the position of each column that is used.

    Raises:
        InvoiceError: a column is missing, appears twice, or several may have a meaning.
    """
    positions: dict[Role, int] = {}
    for role in Role:
        given = options.columns.get(role)
        if given == NO_COLUMN:
            continue
        if given is not None:
            positions[role] = _position(located, given, role)
    for role in Role:
        if role in options.columns:
            continue
        free = [name if at not in positions.values() else "" for at, name in enumerate(located.names)]
        names = _proposed(free, role, currency)
        if len(names) > 1:
            listed = ", ".join(quoted(name) for name in names)
            raise InvoiceError(f"line {located.row}: each of {listed} may be the {_meaning(role)}; give {role.option}")
        if names:
            positions[role] = _position(located, names[0], role)
            assumptions.append(f"The {_meaning(role)} is in the column {quoted(names[0])} ({role.option}).")
    if Role.AMOUNT not in positions:
        listed = ", ".join(quoted(name) for name in located.names if name)
        raise InvoiceError(f"line {located.row}: no column has the amount; give --amount-column. Columns: {listed}")
    _check_names(located, positions)
    amount_name = located.names[positions[Role.AMOUNT]]
    if other := currency_in_name(amount_name, currency):
        raise InvoiceError(
            f"line {located.row}: the column {quoted(amount_name)} is in {other}, but the calls are in {currency} "
            "(--currency)"
        )
    return Header(row=located.row, names=located.names, positions=positions)


def _meaning(role: Role) -> str:
    return role.value.replace("_", " ")


def _position(located: LocatedTable, name: str, role: Role) -> int:
    count = located.names.count(name)
    if count == 1:
        return located.names.index(name)
    listed = ", ".join(quoted(each) for each in located.names if each)
    problem = "no column" if count == 0 else "more than one column"
    raise InvoiceError(f"line {located.row}: {problem} {quoted(name)} ({role.option}); columns: {listed}")


def _check_names(located: LocatedTable, positions: Mapping[Role, int]) -> None:
    for role, at in positions.items():
        if not located.names[at].isprintable():
            raise InvoiceError(f"line {located.row}: the name of the {_meaning(role)} column has a control character")
        if len(located.names[at]) > MAX_NAME_LENGTH:
            raise InvoiceError(f"line {located.row}: the name of the {_meaning(role)} column is too long")


def _proposed(names: Sequence[str], role: Role, currency: str) -> list[str]:
    """Return the names with this meaning, of the most usual group that occurs. For some meanings the first suffices."""
    plain = {name: _plain_name(name, currency) for name in names if 0 < len(name) <= MAX_NAME_LENGTH}
    groups = KNOWN_NAMES[role]
    if role is Role.AMOUNT and _proposed(names, Role.COUNT, currency):
        groups = groups[:-1]  # beside a count, a price is that of one call
    for group in groups:
        known = group.split("|")
        found = [name for name in plain if plain[name] in known]
        if found:
            return found[:1] if role in (Role.NUMBER, Role.KIND) else found
    return []


def _plain_name(name: str, currency: str) -> str:
    """Return a name in small letters, without what is in parentheses, the currency and the time zone."""
    words = re.findall(r"\w+", re.sub(r"\([^)]*\)|\[[^]]*\]", " ", name.replace("_", " ")).casefold())
    ignored = {"in", "utc", "gmt", currency.casefold()}
    return " ".join(word for word in words if word not in ignored)
