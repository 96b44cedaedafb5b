"""A reconciliation on the terminal."""

from itertools import islice

from rich.console import Group, RenderableType
from rich.text import Text

from cli.render import MAX_ROWS, literal_text, new_table, omitted_rows_remark, styled_state
from worker.reports.reconciliation_files import cell_text
from worker.reports.reconciliation_report import NUMBERS, ReconciliationReport, Section


def limited_report_tables(report: ReconciliationReport) -> RenderableType:
    """Return a report for a terminal, with at most `MAX_ROWS` rows of each section."""
    parts: list[RenderableType] = [
        literal_text(report.title, "bold"),
        literal_text(f"read as: {report.facts['kind of invoice']}, {report.facts['read as']}"),
        *(literal_text(f"assumed: {sentence}") for sentence in report.assumptions),
        Text("first lines as understood:"),
        _limited_table(report.first_lines, report.currency),
        Text(),
        literal_text(report.summary),
    ]
    for section in report.findings:
        parts += [Text(f"\n{section.heading}"), _limited_table(section, report.currency)]
        parts += omitted_rows_remark(len(section.items))
    return Group(*parts, Text(), literal_text(f"{report.result}; {report.conclusion}"))


def _limited_table(section: Section, currency: str) -> RenderableType:
    columns = section.columns
    table = new_table(*columns, right=NUMBERS)
    for cells in islice(section.rows(), MAX_ROWS):
        texts = {name: cell_text(cell, currency) for name, cell in cells.items()}
        table.add_row(*(styled_state(text) if name == "state" else text for name, text in texts.items()))
    return table
