"""`payready fees`: what the provider's calls cost, and whether its invoice agrees."""

import csv
import hashlib
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import fee_tables, render
from cli.command_line import AsJson, query, report_errors, stdout_console, update
from config.settings import settings
from worker.ledger import fee_calls, fee_statement, invoices
from worker.ledger.engine import Tx
from worker.ledger.fee_statement import PaymentShare, StatementLine
from worker.ledger.invoices import InvoiceApplication, InvoiceEvidence
from worker.ledger.locks import lock_invoices
from worker.rules.invoice_file import AMOUNT_PATTERN, InvoiceColumns, InvoiceError, InvoicePeriod, parse_invoice
from worker.rules.pricing import parse_price_list
from worker.rules.reconciliation import Reconciliation, check_plausible, check_total, reconcile
from worker.runtime import utc_now

app = typer.Typer(no_args_is_help=True, help="What the provider's calls cost.")


class GroupByOption(StrEnum):
    """What a statement has a line for."""

    ACCOUNT = "account"
    DAY = "day"
    PAYMENT = "payment"


@app.command("statement")
def fees_statement(
    month: Annotated[str | None, typer.Option(help="As YYYY-MM, in UTC; default: this month.")] = None,
    by: Annotated[GroupByOption | None, typer.Option(help="A line for each; default: for each price.")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV, for spreadsheets.")] = False,
) -> None:
    """What the calls of a month come to, as they stand now, and what sharing and reuse saved."""
    if as_json and as_csv:
        raise typer.BadParameter("not both", param_hint="--json / --csv")
    since, until = _parse_month(month)
    tell = _print_shares if by == GroupByOption.PAYMENT else partial(_print_statement, by=by)
    query(lambda tx: tell(tx, since, until, as_json=as_json, as_csv=as_csv))


def _print_statement(
    tx: Tx, since: datetime, until: datetime, *, by: GroupByOption | None, as_json: bool, as_csv: bool
) -> None:
    group: fee_statement.GroupBy = "price" if by is None else "account" if by == GroupByOption.ACCOUNT else "day"
    lines = fee_statement.statement_lines(tx, since, until, group)
    totals = fee_tables.totals_by_currency(
        lines, fee_statement.savings_by_currency(tx, since, until) if by is None else {}
    )
    if as_csv:
        _write_csv(lines, group)
    elif as_json:
        told = {"month": f"{since:%Y-%m}", "by": group, "lines": lines, "totals": totals}
        typer.echo(render.as_json(told))
    else:
        stdout_console().print(fee_tables.statement_table(lines, totals, _month_title(since), group), highlight=False)


def _print_shares(tx: Tx, since: datetime, until: datetime, *, as_json: bool, as_csv: bool) -> None:
    shares = fee_statement.payment_shares(tx, since, until)
    if as_csv:
        _write_csv(shares, "payment")
    elif as_json:
        typer.echo(render.as_json({"month": f"{since:%Y-%m}", "by": GroupByOption.PAYMENT, "lines": list(shares)}))
    else:
        stdout_console().print(fee_tables.share_table(shares, _month_title(since)), highlight=False)


def _month_title(since: datetime) -> str:
    return f"Calls of {since:%Y-%m} (UTC)"


def _write_csv(lines: Iterable[StatementLine | PaymentShare], by: str) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(fee_tables.CSV_COLUMNS[by])
    writer.writerows(fee_tables.csv_row(line, by) for line in lines)


def _parse_month(text: str | None) -> tuple[datetime, datetime]:
    if text is None:
        text = f"{utc_now():%Y-%m}"
    match = re.fullmatch(r"([0-9]{4})-(0[1-9]|1[0-2])", text)
    if match is None or int(match[1]) in (0, 9999):
        raise typer.BadParameter("must be a month such as 2026-11", param_hint="--month")
    year, month = int(match[1]), int(match[2])
    following = (year + 1, 1) if month == 12 else (year, month + 1)  # noqa: PLR2004 - December
    return datetime(year, month, 1, tzinfo=UTC), datetime(*following, 1, tzinfo=UTC)


@app.command("reconcile")
def fees_reconcile(
    invoice: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The provider's invoice, as CSV.")],
    month: Annotated[str, typer.Option(help="The month that it is for, as YYYY-MM.")],
    account_column: Annotated[str, typer.Option(help="Which column has the account's id.")] = "account_id",
    date_column: Annotated[str, typer.Option(help="... the call's day, or its time with a zone.")] = "date",
    amount_column: Annotated[str, typer.Option(help="... what is charged.")] = "amount",
    number_column: Annotated[str | None, typer.Option(help="... the provider's number of the line.")] = None,
    currency_column: Annotated[str | None, typer.Option(help="... the currency: every line must be in one.")] = None,
    currency: Annotated[str | None, typer.Option(help="Which calls it is for; default: the price list's.")] = None,
    total: Annotated[str | None, typer.Option(help="The invoice's sum: its lines must come to it.")] = None,
    tolerance_s: Annotated[int, typer.Option(min=0, max=172_800, help="How far its times may be off ours.")] = 300,
    apply: Annotated[bool, typer.Option("--apply", help="Post and void pending calls by what it says.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lay an invoice beside the calls of its month: what agrees, what only one side has, and other prices.

    Nothing is changed without --apply. With it, pending calls that the invoice charges are posted, and those that it
    does not charge are void; doing so twice changes nothing more. Only calls in the invoice's currency are looked at.
    """
    since, until = _parse_month(month)
    period = InvoicePeriod(since=since, until=until, tolerance=timedelta(seconds=tolerance_s))
    columns = InvoiceColumns(
        account=account_column,
        at=date_column,
        amount=amount_column,
        number=number_column,
        currency=currency_column,
    )
    with report_errors():
        currency = _parse_currency(currency)
        data = invoice.read_bytes()
        lines = parse_invoice(_decode(data), columns, period, currency)
        if total is not None:
            check_total(lines, _parse_total(total))
        if apply and utc_now() < until + period.tolerance:
            raise InvoiceError(f"{month} is not over: no invoice for it can be complete; look without --apply")

    def look(tx: Tx) -> Reconciliation:
        calls = fee_calls.ledger_calls(tx, currency, since - period.tolerance, until + period.tolerance)
        return reconcile(lines, calls, period, invoices.applied_invoices(tx, currency))

    def settle(tx: Tx) -> tuple[Reconciliation, InvoiceApplication]:
        lock_invoices(tx)
        found = look(tx)
        check_plausible(found, total_matches=total is not None)
        named = InvoiceEvidence(
            name=invoice.name, digest=hashlib.sha256(data).hexdigest(), period=month, currency=currency
        )
        return found, invoices.apply_invoice(tx, found, named, utc_now())

    found, settled = update(settle) if apply else (query(look), None)
    if as_json:
        typer.echo(render.as_json({"month": month, "currency": currency, **_reconciliation_json(found, settled)}))
        return
    title = f"{invoice.name} beside the calls of {month} (UTC) in {currency}"
    stdout_console().print(fee_tables.reconciliation_tables(found, title), highlight=False)
    typer.echo(_print_conclusion(found, settled))


def _parse_currency(text: str | None) -> str:
    if text is None:
        return parse_price_list(settings().price_list_file.read_text()).currency
    if not re.fullmatch("[A-Z]{3}", text, re.ASCII):
        raise typer.BadParameter("must be three capital letters, such as USD", param_hint="--currency")
    return text


def _parse_total(text: str) -> Decimal:
    if not re.fullmatch(AMOUNT_PATTERN, text, re.ASCII):
        raise typer.BadParameter("must be a sum such as 1234.50", param_hint="--total")
    return Decimal(text)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvoiceError(f"line {line}: not UTF-8") from None


def _reconciliation_json(found: Reconciliation, settled: InvoiceApplication | None) -> dict[str, Any]:
    return {
        "matched": len(found.matched),
        "price_differences": found.price_differences,
        "charged_though_void": found.charged_though_void,
        "unmatched_lines": found.unmatched_lines,
        "unmatched_calls": found.unmatched_calls,
        "to_post": [match.call.call_id for match in found.to_post],
        "to_void": [call.call_id for call in found.to_void],
        "deferred_calls": [call.call_id for call in found.deferred_calls],
        "settled": None if settled is None else {"posted": settled.posted, "void": settled.voided},
    }


def _print_conclusion(found: Reconciliation, settled: InvoiceApplication | None) -> str:
    if settled is not None:
        return f"\n{settled.posted} pending calls posted, {settled.voided} void, with the invoice as evidence"
    post, void = len(found.to_post), len(found.to_void)
    if not post and not void:
        return "\nno pending calls to settle"
    return f"\n{post} pending calls are charged, {void} are not: --apply posts and voids them"


@app.command("questions")
def fees_unresolved(
    age_h: Annotated[int, typer.Option(min=0, max=87_600, help="Only calls that were made so many hours ago.")] = 24,
    as_json: AsJson = False,
) -> None:
    """Calls that nobody knows the fate of: pending since long, until an invoice tells."""
    asked = query(lambda tx: fee_calls.unresolved_calls(tx, utc_now() - timedelta(hours=age_h)))
    if as_json:
        typer.echo(render.as_json(asked))
    else:
        stdout_console().print(
            fee_tables.unresolved_table(asked, f"Calls that are pending for {age_h} hours and more"), highlight=False
        )
