"""`payready fees statement`: what the calls of a period cost, and what sharing and reuse saved."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import typer

from cli import render, statement_tables
from cli.command_line import AsJson, fail, query_or_exit, stdout_console_for_terminal_or_log
from config.clock import utc_now
from worker.ledger import period_statement
from worker.ledger.engine import Tx
from worker.ledger.fee_statement import GroupBy
from worker.ledger.payment_shares import payment_shares_and_unshared_fees
from worker.ledger.period_statement import PeriodStatement
from worker.reports import statement_report
from worker.reports.csv_output import write_csv
from worker.rules.months import month_of
from worker.rules.statement_period import MAX_MONTHS, StatementPeriod, parse_period

StatementGroup = Literal["account", "day", "payment"]
"""Groups of a statement's lines. Without one, a line is a price."""
Form = Literal["table", "json", "csv"]


def fees_statement(
    month: Annotated[
        str | None,
        typer.Option(help="Month as YYYY-MM, or months as YYYY-MM..YYYY-MM, in UTC. Default: this month."),
    ] = None,
    by: Annotated[
        StatementGroup | None, typer.Option(help="One line per account, day or payment. Default: per price.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the totals with those of the month before, or of the months.")
    ] = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
) -> None:
    """Print the fees of a month's calls, and the savings by sharing and reuse.

    It states the mode of the API key, and what the pending calls may still cost.
    """
    if as_json and as_csv:
        raise typer.BadParameter("give only one of them", param_hint="--json / --csv")
    if compare and (as_csv or by == "payment"):
        raise typer.BadParameter("works without --csv and without --by payment", param_hint="--compare")
    form: Form = "csv" if as_csv else "json" if as_json else "table"
    period = _parse_period(month)
    if by == "payment":
        query_or_exit(partial(_print_shares, period=period, form=form))
    else:
        query_or_exit(partial(_print_statement, period=period, by=by or "price", form=form, compare=compare))


def _parse_period(text: str | None) -> StatementPeriod:
    period = StatementPeriod(months=(month_of(utc_now()),)) if text is None else parse_period(text)
    if period is None:
        raise typer.BadParameter(
            f"must be a month such as 2026-11, or at most {MAX_MONTHS} months such as 2026-10..2026-12",
            param_hint="--month",
        )
    return period


def _print_statement(tx: Tx, *, period: StatementPeriod, by: GroupBy, form: Form, compare: bool) -> None:
    statement = period_statement.read_statement(tx, period, by)
    before = period_statement.read_statement(tx, period.previous, by) if compare else None
    match form:
        case "csv":
            write_csv(sys.stdout, statement_report.CSV_COLUMNS[by], statement_report.statement_csv_rows(statement))
        case "json":
            typer.echo(render.as_json(_statement_json(statement, before)))
        case "table":
            _print_tables(statement, before)


def _print_tables(statement: PeriodStatement, before: PeriodStatement | None) -> None:
    console, totals = stdout_console_for_terminal_or_log(), _totals(statement)
    head = _head(statement.period, statement.calls_by_mode)
    console.print(
        statement_tables.limited_statement_table(statement.lines, totals, head, statement.by), highlight=False
    )
    if before is not None:
        console.print(statement_tables.comparison_table(totals, _totals(before), statement.period), highlight=False)


def _statement_json(statement: PeriodStatement, before: PeriodStatement | None) -> dict[str, Any]:
    totals = _totals(statement)
    report = {
        **_head_json(statement.period, statement.calls_by_mode),
        "by": statement.by,
        "lines": statement.lines,
        "totals": totals,
        "final_amount": {
            currency: {"lowest": total.posted_amount, "highest": total.posted_amount + total.pending_amount}
            for currency, total in totals.items()
        },
    }
    if before is not None:
        report["compared_with"] = {"month": before.period.name, "totals": _totals(before)}
    return report


def _totals(statement: PeriodStatement) -> dict[str, statement_report.StatementTotal]:
    return statement_report.totals_by_currency(statement.lines, statement.saved)


def _print_shares(tx: Tx, *, period: StatementPeriod, form: Form) -> None:
    if archived := period_statement.first_archived_month(tx, period):
        fail(
            f"{archived.month} is archived: its payments are in {archived.folder}; restore them into another database "
            "to print their shares"
        )
    modes = period_statement.read_calls_by_mode(tx, period)
    shares = payment_shares_and_unshared_fees(tx, period.since, period.until)
    match form:
        case "csv":
            rows = statement_report.share_csv_rows(shares, period, modes)
            write_csv(sys.stdout, statement_report.CSV_COLUMNS["payment"], rows)
        case "json":
            lines = [share._asdict() for share in shares]
            typer.echo(render.as_json({**_head_json(period, modes), "by": "payment", "lines": lines}))
        case "table":
            table = statement_tables.limited_share_table(shares, _head(period, modes))
            stdout_console_for_terminal_or_log().print(table, highlight=False)


def _head(period: StatementPeriod, modes: Mapping[str, int]) -> list[str]:
    return statement_report.head_lines(period, modes, is_over=period.until <= utc_now())


def _head_json(period: StatementPeriod, modes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "month": period.name,
        "since": period.since,
        "until": period.until,
        "time_zone": statement_report.TIME_ZONE,
        "is_over": period.until <= utc_now(),
        "calls_by_mode": modes,
    }
