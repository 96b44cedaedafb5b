"""`payready fees reconcile`: compare the provider's invoice with the ledger, and apply it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cli import render
from cli.command_line import EXIT_FAILED, AsJson, engine_or_exit, stdout_console_for_terminal_or_log
from cli.reconciliation_output import limited_report_tables, report_html, write_report_csv
from cli.reconciliation_report import ReconciliationReport, aggregated_report, by_call_report
from config.escaping import escape_unprintable
from config.settings import settings
from worker import flow
from worker.flow import Invoice
from worker.ledger.engine import Engine
from worker.ledger.invoices import InvoiceApplication
from worker.rules.aggregated_reconciliation import AggregatedReconciliation
from worker.rules.invoice_format import DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions, Role, options_of_profile, parse_profile, profile_text
from worker.rules.months import parse_month
from worker.rules.pricing import PriceList, parse_price_list
from worker.rules.reconciliation import Reconciliation
from worker.runtime import utc_now

AMOUNT_PATTERN = r"[0-9]{1,15}(\.[0-9]{1,15})?"
EXIT_DIFFERENCES = 2
"""Exit status if invoice and ledger differ. Wrong usage of this command has EXIT_FAILED, so that 2 has one meaning."""
READING = "How the file is written"
COLUMNS = "Columns of the file"


class ReconcileCommand(TyperCommand):
    """A command whose wrong usage has exit status 1, because 2 means differences."""

    def make_context(self, *arguments: Any, **extra: Any) -> Any:
        """Parse the options."""
        with _usage_errors_as_failures():
            return super().make_context(*arguments, **extra)

    def invoke(self, *arguments: Any, **extra: Any) -> Any:
        """Run the command."""
        with _usage_errors_as_failures():
            return super().invoke(*arguments, **extra)


@contextmanager
def _usage_errors_as_failures() -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        usage_error: Any = error  # typer does not export its class UsageError
        usage_error.exit_code = EXIT_FAILED
        raise


def _column(role: str) -> Any:
    return typer.Option(help=f"Column with {role}. `-`: there is none.", rich_help_panel=COLUMNS)


def _reading(meaning: str) -> Any:
    return typer.Option(help=meaning, rich_help_panel=READING)


def fees_reconcile(
    invoice: Annotated[Path, typer.Argument(help="The provider's invoice, as CSV or .xlsx.")],
    month: Annotated[str, typer.Option(help="Month of the invoice, as YYYY-MM.")],
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
    profile: Annotated[
        Path | None, _reading("TOML file of --save-profile, with how an earlier invoice was written.")
    ] = None,
    save_profile: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            writable=True,
            help="Write how this file was read, for next month's --profile.",
            rich_help_panel=READING,
        ),
    ] = None,
    encoding: Annotated[str | None, _reading("Encoding, such as utf-8, cp1252 or utf-16.")] = None,
    delimiter: Annotated[str | None, _reading("Character between two fields, or `tab`.")] = None,
    sheet: Annotated[str | None, _reading("Sheet of a spreadsheet file.")] = None,
    header_row: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Line with the names of the columns.", rich_help_panel=READING),
    ] = None,
    decimal_style: Annotated[DecimalStyle | None, _reading("How amounts are written.")] = None,
    date_style: Annotated[DateStyle | None, _reading("How dates are written.")] = None,
    time_zone: Annotated[
        str | None, _reading("Zone of days, and of times without a zone, such as America/New_York.")
    ] = None,
    account_column: Annotated[str | None, _column("the account's id")] = None,
    date_column: Annotated[str | None, _column("the call's day or time, or the line's day or month")] = None,
    amount_column: Annotated[str | None, _column("the amount")] = None,
    number_column: Annotated[str | None, _column("the provider's number of the line")] = None,
    currency_column: Annotated[str | None, _column("the currency, the same in all lines")] = None,
    count_column: Annotated[str | None, _column("the number of calls that a line charges")] = None,
    unit_price_column: Annotated[str | None, _column("the price of one call")] = None,
    kind_column: Annotated[str | None, _column("the line's description or kind of call")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV with one row per finding, for spreadsheets.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(dir_okay=False, writable=True, help="Also write the report as one HTML file, for auditors."),
    ] = None,
) -> None:
    """Compare an invoice with the calls of its month: matches, differences, and their possible causes.

    How the file is written is proposed from the file. The output shows the first lines as understood, and all that
    was assumed. Options, or the profile of an earlier month, confirm it. A file that can be read in two ways is
    rejected, and the error names the option that decides.

    Without --apply the command changes nothing. With it, pending calls that the invoice charges are posted, and
    pending calls that it does not charge are voided. Counts of an aggregated invoice decide only what they prove.
    Applying an invoice twice changes nothing more. Only calls in its currency are compared.

    Exit status 0 if invoice and ledger match, 2 if they differ, 1 after an error or wrong usage.
    """
    if as_json and as_csv:
        raise typer.BadParameter("give only one of them", param_hint="--json / --csv")
    columns = {
        Role.ACCOUNT: account_column,
        Role.DATE: date_column,
        Role.AMOUNT: amount_column,
        Role.NUMBER: number_column,
        Role.CURRENCY: currency_column,
        Role.COUNT: count_column,
        Role.UNIT_PRICE: unit_price_column,
        Role.KIND: kind_column,
    }
    options = ReadingOptions(
        encoding=encoding,
        delimiter=delimiter,
        sheet=sheet,
        header_row=header_row,
        decimal_style=decimal_style,
        date_style=date_style,
        time_zone=time_zone,
        columns={role: name for role, name in columns.items() if name is not None},
    )
    period, stated_total = _parse_period(month, tolerance_s), _parse_total(total)
    _check_currency(currency)
    _check_folder(html, "--html")
    _check_folder(save_profile, "--save-profile")
    with engine_or_exit() as engine:
        read = flow.parse_invoice_file(
            escape_unprintable(invoice.name),
            invoice.read_bytes(),
            options if profile is None else options.or_else(_options_of_file(profile)),
            period,
            currency=currency or _price_list().currency,
            total=stated_total,
        )
        if save_profile is not None:
            save_profile.write_text(profile_text(read.content.format), encoding="utf-8")
        result = _reconcile(engine, read, apply=apply)
        if html is not None:
            html.write_text(report_html(result.report, utc_now()), encoding="utf-8")
    _print_result(result, as_json=as_json, as_csv=as_csv)
    if result.report.has_differences:
        raise typer.Exit(EXIT_DIFFERENCES)


def _options_of_file(profile: Path) -> ReadingOptions:
    return options_of_profile(parse_profile(profile.read_text(encoding="utf-8", errors="replace")))


@dataclass(frozen=True, kw_only=True)
class _Result:
    report: ReconciliationReport
    invoice: Invoice
    found: Reconciliation | AggregatedReconciliation
    application: InvoiceApplication | None

    def as_json(self) -> str:
        """Return the whole result for programs."""
        found = self.found
        values = _json_by_call(found) if isinstance(found, Reconciliation) else _json_aggregated(found)
        return render.as_json({**_json_head(self.invoice), **values, "applied": self.application})


def _reconcile(engine: Engine, invoice: Invoice, *, apply: bool) -> _Result:
    """Compare or apply the invoice."""
    return (_reconcile_by_call if invoice.content.level is None else _reconcile_aggregated)(
        engine, invoice, apply=apply
    )


def _reconcile_by_call(engine: Engine, invoice: Invoice, *, apply: bool) -> _Result:
    application = None
    if apply:
        applied = flow.apply_invoice(engine, invoice, utc_now())
        found, application = applied.reconciliation, applied.application
    else:
        found = flow.compare_invoice(engine, invoice)
    report = by_call_report(invoice, found, application)
    return _Result(report=report, invoice=invoice, found=found, application=application)


def _reconcile_aggregated(engine: Engine, invoice: Invoice, *, apply: bool) -> _Result:
    application = None
    if apply:
        applied = flow.apply_aggregated_invoice(engine, invoice, utc_now())
        found, application = applied.reconciliation, applied.application
    else:
        found = flow.compare_aggregated_invoice(engine, invoice)
    report = aggregated_report(invoice, found, application)
    return _Result(report=report, invoice=invoice, found=found, application=application)


def _print_result(result: _Result, *, as_json: bool, as_csv: bool) -> None:
    if as_json:
        typer.echo(result.as_json())
    elif as_csv:
        write_report_csv(sys.stdout, result.report)
    else:
        stdout_console_for_terminal_or_log().print(limited_report_tables(result.report), highlight=False)


def _price_list() -> PriceList:
    return parse_price_list(settings().price_list_file.read_text())


def _parse_period(month: str, tolerance_s: int) -> InvoicePeriod:
    parsed = parse_month(month)
    if parsed is None:
        raise typer.BadParameter("must be a month such as 2026-11", param_hint="--month")
    return InvoicePeriod(since=parsed.since, until=parsed.until, tolerance=timedelta(seconds=tolerance_s))


def _check_currency(text: str | None) -> None:
    if text is not None and not re.fullmatch("[A-Z]{3}", text, re.ASCII):
        raise typer.BadParameter("must be three capital letters, such as USD", param_hint="--currency")


def _check_folder(file: Path | None, option: str) -> None:
    """Find a file that cannot be written before the invoice is applied."""
    if file is None:
        return
    try:
        TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise typer.BadParameter(f"no file can be written there: {error.strerror}", param_hint=option) from None


def _parse_total(text: str | None) -> Decimal | None:
    if text is None:
        return None
    if not re.fullmatch(AMOUNT_PATTERN, text, re.ASCII):
        raise typer.BadParameter("must be an amount such as 1234.50", param_hint="--total")
    return Decimal(text)


def _json_head(invoice: Invoice) -> dict[str, Any]:
    content = invoice.content
    return {
        "file": invoice.name,
        "digest": invoice.digest,
        "month": f"{invoice.period.since:%Y-%m}",
        "currency": invoice.currency,
        "level": content.level,
        "read_as": content.format.model_dump(mode="json", exclude_none=True),
        "assumptions": content.assumptions,
        "first_lines": content.first_lines,
        "credits": content.credits,
        "totals": content.totals,
    }


def _json_by_call(found: Reconciliation) -> dict[str, Any]:
    return {
        "has_differences": found.has_differences,
        "matched": len(found.matched),
        "price_differences": found.price_differences,
        "rounded_amounts": found.rounded_amounts,
        "charged_though_void": found.charged_though_void,
        "unmatched_lines": found.unmatched_lines,
        "unmatched_calls": found.unmatched_calls,
        "missing_calls": [call.call_id for call in found.missing_posted_calls_away_from_edges],
        "to_post": [match.call.call_id for match in found.to_post],
        "to_void": [call.call_id for call in found.to_void],
        "deferred_calls": [call.call_id for call in found.deferred_calls],
    }


def _json_aggregated(found: AggregatedReconciliation) -> dict[str, Any]:
    return {
        "has_differences": found.has_differences,
        "groups": found.groups,
        "calls_without_line": found.calls_without_line,
        "to_post": found.to_post,
        "to_void": found.to_void,
        "undecided_calls": [call.call_id for call in found.undecided_calls],
    }
