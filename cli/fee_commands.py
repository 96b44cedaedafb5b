"""`payready fees`: statements, reconciliation with the provider's invoice, pending calls."""

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import fee_tables, render
from cli.command_line import AsJson, engine_or_exit, query_or_exit, stdout_console_for_terminal_or_log
from cli.render import count_text
from cli.statement_commands import fees_statement
from config.settings import settings
from worker import flow
from worker.flow import Invoice
from worker.ledger import fee_calls
from worker.ledger.invoices import InvoiceApplication
from worker.rules.archive_manifest import parse_month
from worker.rules.invoice_lines import InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions, Role
from worker.rules.pricing import parse_price_list
from worker.rules.reconciliation import Reconciliation
from worker.runtime import utc_now

AMOUNT_PATTERN = r"[0-9]{1,15}(\.[0-9]{1,15})?"

app = typer.Typer(no_args_is_help=True, help="Fees of the provider's calls: statement, reconciliation, pending calls.")


app.command("statement")(fees_statement)


@app.command("reconcile")
def fees_reconcile(
    invoice: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The provider's invoice, as CSV.")],
    month: Annotated[str, typer.Option(help="Month of the invoice, as YYYY-MM.")],
    account_column: Annotated[str | None, typer.Option(help="Column with the account's id.")] = None,
    date_column: Annotated[
        str | None, typer.Option(help="Column with the call's day, or its time with a zone.")
    ] = None,
    amount_column: Annotated[str | None, typer.Option(help="Column with the amount.")] = None,
    number_column: Annotated[str | None, typer.Option(help="Column with the provider's number of the line.")] = None,
    currency_column: Annotated[
        str | None, typer.Option(help="Column with the currency. All lines must have the same.")
    ] = None,
    currency: Annotated[
        str | None, typer.Option(help="Currency of the invoice. Default: the price list's currency.")
    ] = None,
    total: Annotated[str | None, typer.Option(help="Total of the invoice. Its lines must add up to it.")] = None,
    tolerance_s: Annotated[
        int, typer.Option(min=0, max=172_800, help="Maximum difference between the times of a line and its call.")
    ] = 300,
    apply: Annotated[
        bool, typer.Option("--apply", help="Post or void pending calls according to the invoice.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare an invoice with the calls of its month: matches, unmatched lines, unmatched calls, price differences.

    Without --apply the command changes nothing. With it, pending calls that the invoice charges are posted, and other
    pending calls are voided. Applying an invoice twice changes nothing more. Only calls in its currency are compared.
    """
    period = parse_month(month)
    if period is None:
        raise typer.BadParameter("must be a month such as 2026-11", param_hint="--month")
    columns = {
        Role.ACCOUNT: account_column,
        Role.DATE: date_column,
        Role.AMOUNT: amount_column,
        Role.NUMBER: number_column,
        Role.CURRENCY: currency_column,
    }
    options = ReadingOptions(columns={role: name for role, name in columns.items() if name is not None})
    with engine_or_exit() as engine:
        parsed = flow.parse_invoice_file(
            invoice.name,
            invoice.read_bytes(),
            options,
            InvoicePeriod(since=period.since, until=period.until, tolerance=timedelta(seconds=tolerance_s)),
            currency=_parse_currency_or_price_list_default(currency),
            total=_parse_total(total),
        )
        if apply:
            applied = flow.apply_invoice(engine, parsed, utc_now())
            _print_reconciliation(parsed, applied.reconciliation, applied.application, as_json=as_json)
        else:
            _print_reconciliation(parsed, flow.compare_invoice(engine, parsed), None, as_json=as_json)


def _print_reconciliation(
    invoice: Invoice, found: Reconciliation, application: InvoiceApplication | None, *, as_json: bool
) -> None:
    month = f"{invoice.period.since:%Y-%m}"
    if as_json:
        report = {"month": month, "currency": invoice.currency, **_reconciliation_json(found, application)}
        typer.echo(render.as_json(report))
        return
    title = f"{invoice.name} and the calls of {month} (UTC) in {invoice.currency}"
    stdout_console_for_terminal_or_log().print(
        fee_tables.limited_reconciliation_tables(found, title, invoice.currency), highlight=False
    )
    typer.echo(_conclusion_text(found, application))


def _parse_currency_or_price_list_default(text: str | None) -> str:
    """Return the currency, or the price list's if none is given."""
    if text is None:
        return parse_price_list(settings().price_list_file.read_text()).currency
    if not re.fullmatch("[A-Z]{3}", text, re.ASCII):
        raise typer.BadParameter("must be three capital letters, such as USD", param_hint="--currency")
    return text


def _parse_total(text: str | None) -> Decimal | None:
    if text is None:
        return None
    if not re.fullmatch(AMOUNT_PATTERN, text, re.ASCII):
        raise typer.BadParameter("must be an amount such as 1234.50", param_hint="--total")
    return Decimal(text)


def _reconciliation_json(found: Reconciliation, application: InvoiceApplication | None) -> dict[str, Any]:
    return {
        "matched": len(found.matched),
        "price_differences": found.price_differences,
        "charged_though_void": found.charged_though_void,
        "unmatched_lines": found.unmatched_lines,
        "unmatched_calls": found.unmatched_calls,
        "missing_calls": [call.call_id for call in found.missing_posted_calls_away_from_edges],
        "to_post": [match.call.call_id for match in found.to_post],
        "to_void": [call.call_id for call in found.to_void],
        "deferred_calls": [call.call_id for call in found.deferred_calls],
        "applied": application,
    }


def _conclusion_text(found: Reconciliation, application: InvoiceApplication | None) -> str:
    """Return the last line: what --apply did, or what it would do."""
    if application is not None:
        posted = count_text(application.posted, "pending call")
        return f"\n{posted} posted, {application.voided} voided, with the invoice as evidence"
    to_post, to_void = len(found.to_post), len(found.to_void)
    if not to_post and not to_void:
        return "\nno pending calls to post or void"
    return f"\n--apply would post {count_text(to_post, 'pending call')} and void {to_void}"


@app.command("pending")
def fees_pending(
    age_h: Annotated[int, typer.Option(min=0, max=87_600, help="Minimum age of a call in hours.")] = 24,
    as_json: AsJson = False,
) -> None:
    """List calls that have been pending for --age-h or longer. Only an invoice can post or void them."""
    calls = query_or_exit(lambda tx: fee_calls.pending_calls(tx, utc_now() - timedelta(hours=age_h)))
    if as_json:
        typer.echo(render.as_json(calls))
    else:
        title = f"Calls pending for {age_h} h or longer"
        stdout_console_for_terminal_or_log().print(fee_tables.limited_pending_table(calls, title), highlight=False)
