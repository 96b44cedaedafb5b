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
from typing import Any, Literal

import typer
from typer.core import TyperCommand

from cli.command_line import EXIT_FAILED, AsJson, engine_or_exit, stdout_console_for_terminal_or_log
from cli.reconcile_options import (
    AccountColumn,
    AmountColumn,
    Apply,
    AsCsv,
    CountColumn,
    CurrencyColumn,
    DateColumn,
    DateStyleOption,
    DecimalStyleOption,
    Delimiter,
    Encoding,
    HeaderRow,
    HtmlFile,
    InvoiceCurrency,
    InvoiceFile,
    InvoiceMonth,
    InvoiceTotal,
    KindColumn,
    NumberColumn,
    ProfileFile,
    SavedProfileFile,
    Sheet,
    TimeZone,
    ToleranceS,
    UnitPriceColumn,
)
from cli.reconciliation_output import limited_report_tables
from cli.reconciliation_result import result_as_json
from config.clock import utc_now
from config.escaping import escape_unprintable
from config.settings import settings
from worker import flow
from worker.flow import Invoice
from worker.reports.invoice_reconciliation import ReconciliationResult, apply_and_report, compare_and_report
from worker.reports.reconciliation_files import report_html, write_report_csv
from worker.rules.invoice_lines import InvoicePeriod
from worker.rules.invoice_reading import ReadingOptions, Role, options_of_profile, parse_profile, profile_text
from worker.rules.months import parse_month
from worker.rules.pricing import PriceList, parse_price_list

AMOUNT_PATTERN = r"[0-9]{1,15}(\.[0-9]{1,15})?"
EXIT_DIFFERENCES = 2
"""Exit status if invoice and ledger differ. Wrong usage of this command has EXIT_FAILED, so that 2 has one meaning."""


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


def fees_reconcile(
    invoice: InvoiceFile,
    month: InvoiceMonth,
    currency: InvoiceCurrency = None,
    total: InvoiceTotal = None,
    tolerance_s: ToleranceS = 300,
    apply: Apply = False,
    profile: ProfileFile = None,
    save_profile: SavedProfileFile = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    sheet: Sheet = None,
    header_row: HeaderRow = None,
    decimal_style: DecimalStyleOption = None,
    date_style: DateStyleOption = None,
    time_zone: TimeZone = None,
    account_column: AccountColumn = None,
    date_column: DateColumn = None,
    amount_column: AmountColumn = None,
    number_column: NumberColumn = None,
    currency_column: CurrencyColumn = None,
    count_column: CountColumn = None,
    unit_price_column: UnitPriceColumn = None,
    kind_column: KindColumn = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    html: HtmlFile = None,
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
    output = _Output(form=_form(as_json=as_json, as_csv=as_csv), html=html, profile=save_profile)
    request = _InvoiceRequest(
        file=invoice,
        options=options,
        profile=profile,
        period=_parse_period(month, tolerance_s),
        currency=_parse_currency(currency),
        total=_parse_total(total),
    )
    _reconcile_file(request, output, apply=apply)


@dataclass(frozen=True, kw_only=True)
class _InvoiceRequest:
    """An invoice's file, and what the options state about it."""

    file: Path
    options: ReadingOptions
    profile: Path | None
    """A profile, for what the options do not state."""
    period: InvoicePeriod
    currency: str | None
    total: Decimal | None

    def read(self) -> Invoice:
        """Read the file.

        Raises:
            InvoiceError: the file, or the profile, cannot be read right.
        """
        return flow.parse_invoice_file(
            escape_unprintable(self.file.name),
            self.file.read_bytes(),
            self.options if self.profile is None else self.options.or_else(_options_of_file(self.profile)),
            self.period,
            currency=self.currency or _price_list().currency,
            total=self.total,
        )


Form = Literal["table", "json", "csv"]


@dataclass(frozen=True, kw_only=True)
class _Output:
    """Where the result goes."""

    form: Form
    """What is printed."""
    html: Path | None
    """File of the report for auditors."""
    profile: Path | None
    """File of how the invoice was read."""

    def check_folders(self) -> None:
        """Find a file that cannot be written before the invoice is applied."""
        for file, option in ((self.html, "--html"), (self.profile, "--save-profile")):
            if file is not None:
                _check_folder(file, option)


def _form(*, as_json: bool, as_csv: bool) -> Form:
    if as_json and as_csv:
        raise typer.BadParameter("give only one of them", param_hint="--json / --csv")
    return "json" if as_json else "csv" if as_csv else "table"


def _reconcile_file(request: _InvoiceRequest, output: _Output, *, apply: bool) -> None:
    """Read, compare and perhaps apply the invoice, and write the result. Exit with 2 if there are differences."""
    output.check_folders()
    with engine_or_exit() as engine:
        invoice = request.read()
        if output.profile is not None:
            output.profile.write_text(profile_text(invoice.content.format), encoding="utf-8")
        result = apply_and_report(engine, invoice, utc_now()) if apply else compare_and_report(engine, invoice)
        if output.html is not None:
            output.html.write_text(report_html(result.report, utc_now()), encoding="utf-8")
    _print_result(result, output.form)
    if result.report.has_differences:
        raise typer.Exit(EXIT_DIFFERENCES)


def _options_of_file(profile: Path) -> ReadingOptions:
    return options_of_profile(parse_profile(profile.read_text(encoding="utf-8", errors="replace")))


def _print_result(result: ReconciliationResult, form: Form) -> None:
    match form:
        case "json":
            typer.echo(result_as_json(result))
        case "csv":
            write_report_csv(sys.stdout, result.report)
        case "table":
            console = stdout_console_for_terminal_or_log()
            console.print(limited_report_tables(result.report), highlight=False)


def _price_list() -> PriceList:
    return parse_price_list(settings().price_list_file.read_text())


def _parse_period(month: str, tolerance_s: int) -> InvoicePeriod:
    parsed = parse_month(month)
    if parsed is None:
        raise typer.BadParameter("must be a month such as 2026-11", param_hint="--month")
    return InvoicePeriod(since=parsed.since, until=parsed.until, tolerance=timedelta(seconds=tolerance_s))


def _parse_currency(text: str | None) -> str | None:
    if text is not None and not re.fullmatch("[A-Z]{3}", text, re.ASCII):
        raise typer.BadParameter("must be three capital letters, such as USD", param_hint="--currency")
    return text


def _check_folder(file: Path, option: str) -> None:
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
