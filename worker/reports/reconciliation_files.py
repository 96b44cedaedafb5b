"""A reconciliation as CSV, and as a page of HTML."""

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import TextIO
from xml.etree.ElementTree import Element, SubElement, tostring

from config.escaping import escape_unprintable
from worker.reports.csv_output import write_csv
from worker.reports.reconciliation_report import CSV_COLUMNS, NUMBERS, Cell, ReconciliationReport, Section
from worker.rules.decimals import amount_text
from worker.rules.times import utc_time_text

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #111; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
th, td { border: 1px solid #bbb; padding: .2em .6em; text-align: left; vertical-align: top; }
th { background: #eee; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.result { font-weight: bold; }
@media print { body { margin: 0; } thead { display: table-header-group; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""A browser loads nothing for the page, and runs nothing."""


def cell_text(cell: Cell, currency: str) -> str:
    """Return a cell for people. Amounts have no currency: the report names it."""
    if isinstance(cell, Decimal):
        return amount_text(cell, currency)
    if isinstance(cell, datetime):
        return utc_time_text(cell)
    return "" if cell is None else str(cell)


def write_report_csv(output: TextIO, report: ReconciliationReport) -> None:
    """Write a row for each finding. A match without a difference has none."""
    write_csv(output, CSV_COLUMNS, _csv_rows(report))


def _csv_rows(report: ReconciliationReport) -> Iterator[list[Cell]]:
    for section in report.findings:
        for cells in section.rows():
            row: dict[str, Cell] = {**dict.fromkeys(CSV_COLUMNS), "finding": section.finding, **cells}
            yield [_csv_cell(cell) for cell in row.values()]


def _csv_cell(cell: Cell) -> Cell:
    return utc_time_text(cell) if isinstance(cell, datetime) else cell


def report_html(report: ReconciliationReport, made_at: datetime) -> str:
    """Return a report as one page of HTML without scripts, with all rows. The elements escape all texts."""
    html = Element("html", lang="en")
    head = SubElement(html, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": POLICY})
    _add(head, "title", report.title)
    SubElement(head, "style").text = STYLE
    body = SubElement(html, "body")
    _add(body, "h1", report.title)
    _add(body, "p", f"Result: {report.result}. {report.summary}.", **{"class": "result"})
    _add(body, "p", report.conclusion)
    _add_facts(body, {**report.facts, "report made at": utc_time_text(made_at)})
    _add(body, "h2", "Assumed from the file, confirmed by no option and no profile")
    assumptions = SubElement(body, "ul")
    for sentence in report.assumptions or ["nothing"]:
        _add(assumptions, "li", sentence)
    _add(body, "h2", "First lines as understood")
    _add_table(body, report.first_lines, report.currency)
    for section in report.findings:
        _add(body, "h2", section.heading)
        _add_table(body, section, report.currency)
    return "<!DOCTYPE html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def _add_facts(body: Element, facts: dict[str, str]) -> None:
    table = SubElement(body, "table")
    for name, value in facts.items():
        row = SubElement(table, "tr")
        _add(row, "th", name)
        _add(row, "td", value)


def _add_table(body: Element, section: Section, currency: str) -> None:
    table = SubElement(body, "table")
    head = SubElement(SubElement(table, "thead"), "tr")
    for column in section.columns:
        _add(head, "th", column)
    rows = SubElement(table, "tbody")
    for cells in section.rows():
        row = SubElement(rows, "tr")
        for column, cell in cells.items():
            _add(row, "td", cell_text(cell, currency), **({"class": "number"} if column in NUMBERS else {}))


def _add(parent: Element, tag: str, text: str, **attributes: str) -> None:
    SubElement(parent, tag, attributes).text = escape_unprintable(text)
