"""Reading of invoices by call from CSV files of any dialect."""

import csv
import encodings.aliases
import io
import re
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.invoice_files import read
from worker.rules.invoice_format import DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoiceError
from worker.rules.invoice_reading import NO_COLUMN, Role, options_of_profile, parse_profile, profile_text

DAY = timedelta(days=1)
SUNDAY = datetime(2026, 11, 22, tzinfo=UTC)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
PLAIN = "Account,Date,Amount\nacct_a,2026-11-22,0.10\nacct_b,2026-11-23,0.20\n"


def error_of(data: bytes) -> str:
    try:
        read(data)
    except InvoiceError as error:
        return str(error)
    return ""


def parse(*rows: str) -> list[tuple[str, datetime, Decimal]]:
    content = read("\n".join(("account_id,date,amount", *rows, "")))
    return [(line.account_id, line.since, line.amount) for line in content.lines]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        "\ufeff" + PLAIN,
        "sep=;\n" + PLAIN.replace(",", ";"),
        PLAIN.replace("2026-11-22", '"2026-11-22"'),
        PLAIN.replace("Account", "Account ID").replace("Date", "Usage date").replace("Amount", "Fee (USD)"),
        PLAIN.replace(",", ", "),
        PLAIN.replace("0.10", "$0.10").replace("0.20", "USD 0.20"),
        PLAIN.replace("0.10", "0.10 USD").replace("0.20", "+0.20"),
        PLAIN.replace("2026-11-22", "11/22/2026").replace("2026-11-23", "11/23/2026"),
        PLAIN.replace("2026-11-22", "22/11/2026").replace("2026-11-23", "23/11/2026"),
        PLAIN.replace("2026-11-22", "22.11.2026").replace("2026-11-23", "23.11.26"),
        PLAIN.replace("2026-11-22", "22 Nov 2026").replace("2026-11-23", "23-Nov-2026"),
        PLAIN.replace("2026-11-22", '"Nov 22, 2026"').replace("2026-11-23", '"November 23, 2026"'),
        PLAIN.replace("2026-11-22", "20261122").replace("2026-11-23", "20261123"),
        PLAIN.replace("2026-11-22", "2026/11/22").replace("2026-11-23", "2026/11/23"),
        PLAIN.replace("-22", "-22 00:00:00").replace("-23", "-23 00:00"),
        PLAIN.replace(",", ";").replace("0.10", "0,10").replace("0.20", "0,20"),
        "Quiltt Inc.;;\nInvoice;INV-7;\n\n" + PLAIN.replace(",", ";"),
        "Summary\nDescription,Amount\nRefreshes,0.30\n\n" + PLAIN,
        PLAIN + "Total,,0.30\nThank you for your business\n",
        PLAIN + ",,\n\nTotal: 0.30\n",
        PLAIN.replace("acct_b", "Subtotal,,0.10\nAccount,Date,Amount\nacct_b") + "Subtotal,,0.20\nGrand total,,0.30\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_one_truth_is_read_from_any_dialect_and_again_by_its_profile(text: str, encoding: str) -> None:
    text = text if encoding == "utf-8" else text.removeprefix("\ufeff")
    content = read(text.encode(encoding))
    found = [(line.account_id, line.since, line.until, line.amount) for line in content.lines]
    assert found == [
        ("acct_a", SUNDAY, SUNDAY + DAY, Decimal("0.10")),
        ("acct_b", SUNDAY + DAY, SUNDAY + 2 * DAY, Decimal("0.20")),
    ]
    assert content.level is None
    assert content.aggregated_lines == []
    assert content.first_lines == tuple(content.lines)
    profile = options_of_profile(parse_profile(profile_text(content.format)))
    again = read(text.encode(encoding), **vars(profile))
    assert (again.lines, again.format) == (content.lines, content.format)
    assert not [sentence for sentence in again.assumptions if "column)" in sentence or "style)" in sentence]


@pytest.mark.parametrize(
    ("text", "since", "until"),
    [
        ("2026-11-22T12:00:00Z", NOON, NOON),
        ("2026-11-22T12:00:00.5+00:00", NOON + timedelta(seconds=0.5), NOON + timedelta(seconds=0.5)),
        ("2026-11-22 07:00:00 -0500", NOON, NOON),
        ("2026-11-22 12:00 UTC", NOON, NOON),
        ("11/22/2026 12:00 PM UTC", NOON, NOON),
        ("22.11.2026 12:00:00 GMT", NOON, NOON),
        ("2026-11-22", SUNDAY, SUNDAY + DAY),
    ],
)
def test_time_with_a_zone_is_an_instant_and_a_day_is_a_utc_day(text: str, since: datetime, until: datetime) -> None:
    (line,) = read(f"account_id,date,amount\nacct_a,{text},0.10\n").lines
    assert (line.since, line.until) == (since, until)


def test_time_without_a_zone_needs_an_option_or_a_header_that_names_it() -> None:
    text = "Account,Date,Amount\nacct_a,2026-11-22 07:00:00,0.10\nacct_a,2026-11-22 00:00:00,0.10\n"
    with pytest.raises(
        InvoiceError, match=r"line 2: Date is a time without a zone: '2026-11-22 07:00:00'; give --time-z"
    ):
        read(text)
    in_new_york = read(text, time_zone="America/New_York").lines
    assert [(line.since, line.until) for line in in_new_york] == [(NOON, NOON), (SUNDAY + DAY / 24 * 5,) * 2]
    content = read(text.replace("Date", "Date (UTC)"))
    assert content.lines[0].since == NOON - timedelta(hours=5)
    assert content.format.time_zone == "UTC"
    assert "Times are UTC, as the column 'Date (UTC)' says (--time-zone)." in content.assumptions


def test_hour_that_clocks_repeat_covers_both_instants() -> None:
    """In New York, 2026-11-01 01:30 occurs at 05:30 and at 06:30 UTC."""
    (line,) = read("Account,Date,Amount\na,2026-11-01 01:30,0.10\n", time_zone="America/New_York").lines
    assert (line.since.hour, line.until.hour) == (5, 6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("acct_a,2026-11-22", "line 3: the number of fields differs from the header; the file may be cut off"),
        ("acct_a,2026-11-22,0.10,x", "line 3: the number of fields differs .* needs quotes"),
        (",2026-11-22,0.10", "line 3: account_id is empty; only a credit or a total has none"),
        ("acct_a,,", "line 3: amount is empty"),
        (
            "acct_a,yesterday,0.10",
            "line 3: date is not a date or time written as YYYY-MM-DD: 'yesterday'; --date-style",
        ),
        ("acct_a,22.11.2026,0.10", "line 3: date is not a date or time written as YYYY-MM-DD: '22.11.2026'"),
        ("acct_a,2026-W54-1,0.10", "line 3: date is not a date"),
        ("acct_a,,0.10", "line 3: date is empty"),
        ("acct_a,2026-11-22,free", "line 3: amount is not an amount written as 1,234.50: 'free'"),
        ('acct_a,2026-11-22,"0,10"', "line 3: amount is not an amount written as 1,234.50: '0,10' .--decimal-style"),
        ("acct_a,2026-11-22,1_0", "line 3: amount is not an amount"),
        ("acct_a,2026-11-22,1e1", "line 3: amount is not an amount"),
        ("acct_a,2026-11-22,--1", "line 3: amount is not an amount"),
        ("acct_a,2026-11-22,1 2", "line 3: amount is not an amount"),
        ("acct_a,2026-11-22,٣", "line 3: amount is not an amount"),
        ("acct_a,2026-11-22,NaN", "line 3: amount is not an amount"),
        ("acct_a,2026-11-22,", "line 3: amount is empty"),
        ("acct_a,2026-11-22,0.10 EUR", "line 3: amount is '0.10 EUR', but the calls are in USD .--currency"),
        ("acct_a,2026-11-22,£0.10", "line 3: amount is '£0.10', but the calls are in USD"),
        ("acct_a,2026-12-01,0.10", "line 3: 2026-12-01 is not in 2026-11; check --month, --date-style and --time-zone"),
        ("acct_a,2026-10-31T23:54:59Z,0.10", "line 3: 2026-10-31 is not in 2026-11"),
        ("acct_a,9999-12-31,0.10", "line 3: date is not a date"),
        ("acct_a,0001-01-01T00:00:00+14:00,0.10", "line 3: date is not a date"),
        (
            'acct_a,2026-11-22,"0.1',
            "line 3: not CSV: unexpected end of data; the file may be cut off, or have another --d",
        ),
        (
            "\x1b[31macct,2026-11-22,0.10",
            r"line 3: account_id is too long or has a control character: '\\x1b\[31macct'",
        ),
        (
            "Total:,2026-11-30,0.20",
            "line 3: 'Total:' is 0.20, but the file's lines add up to 0.10; the file may be cut",
        ),
        ("Total:,,\nSum,,7.00", "line 4: 'Sum' is 7.00, but the file's lines add up to 0.10"),
    ],
)
def test_wrong_line_rejects_file_with_line_column_reason_and_option(row: str, message: str) -> None:
    with pytest.raises(InvoiceError, match=message):
        parse("acct_a,2026-11-21,0.10", row)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the file has no lines"),
        ("account_id,date,amount\n", {}, "the file has no charges after its header"),
        ("a,b\n1,2\n", {}, "no line names the columns .* give --header-row, .* Line 1 has: 'a', 'b'"),
        ("account_id,date,amount,amount\na,2026-11-22,1,2\n", {}, r"more than one column 'amount' \(--amount-column\)"),
        ("account_id,date,fee,amount\na,2026-11-22,1,2\n", {}, "each of 'fee', 'amount' may be the amount; give --am"),
        ("account_id,date,no\na,2026-11-22,1\n", {}, "give --header-row, --account-column, --date-column and --amount"),
        (
            "date,amount\n2026-11-22,1\n",
            {},
            "no column has the account, and none the number of calls; give --account-c",
        ),
        ("account,amount\na,1\n", {}, "no column has the date, and none the number of calls; give --date-column"),
        (
            "account_id,date,amount,no\na,2026-11-22,1,7\na,2026-11-22,1,8\na,2026-11-22,1,7\n",
            {},
            "line 4: no '7' is already in line 2; give --number-column -",
        ),
        (
            "account_id,date,amount,currency\na,2026-11-22,1,USD\na,2026-11-22,1,EUR\n",
            {},
            "line 3: currency is 'EUR', but the calls are in USD",
        ),
        (
            PLAIN,
            {"columns": {Role.CURRENCY: "cur"}},
            r"no column 'cur' \(--currency-column\); line 1 has: 'Account', 'D",
        ),
        (
            PLAIN.replace("Amount", "Amount (EUR)"),
            {},
            "line 1: the column 'Amount .EUR.' is in EUR, but the calls are in",
        ),
        (PLAIN.replace("Amount", "Fee €"), {"columns": {Role.AMOUNT: "Fee €"}}, "line 1: the column 'Fee €' is in €"),
        (PLAIN, {"header_row": 2}, "line 2: no column has the amount; give --amount-column"),
        (PLAIN, {"header_row": 9}, "line 9 is empty or does not exist; --header-row"),
        (PLAIN, {"delimiter": ",,"}, "--delimiter must be one character, or tab: ',,'"),
        (PLAIN, {"encoding": "klingon"}, "--encoding must be one such as utf-8"),
        (PLAIN, {"time_zone": "Mars/Olympus"}, "--time-zone must be a name such as UTC"),
        (PLAIN.replace("acct_a", "\x81"), {"encoding": "ascii"}, "line 2: not ascii; give the file's --encoding"),
        ("%PDF-1.7", {}, "the file is a PDF file; payready reads CSV and .xlsx"),
        (PLAIN + "\x00", {}, "line 4: a NUL character"),
        (
            PLAIN.replace("2026-11-22", "11/03/2026").replace("2026-11-23", "11/04/2026"),
            {},
            "line 2: '11/03/2026' may be 2026-11-03 or 2026-03-11; give --date-style \"MM/DD/YYYY\" or --date-style",
        ),
        (
            'account,date,amount\na,2026-11-22,"1,234"\na,2026-11-22,"2,000"\n',
            {},
            'line 2: \'1,234\' may be 1234 or 1.234; give --decimal-style "1,234.50" or --decimal-style "1.234,50"',
        ),
        ("account,date,amount\na,2026-11-22,1.234\n", {}, "line 2: '1.234' may be 1.234 or 1234; give --decimal-style"),
        ("account;date,amount;date;amount\na;x,y;2026-11-22;1\n", {"delimiter": ","}, "no line names the columns"),
        (PLAIN.removesuffix("0\n"), {}, "line 3: Amount has fewer decimals than all others, and no line end"),
    ],
)
def test_unusable_or_ambiguous_file_is_rejected_with_the_option_that_helps(
    text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvoiceError, match=message):
        read(text, **options)


def test_option_decides_an_ambiguity() -> None:
    text = "account;date;amount\na;11/03/2026;1,234\n"
    content = read(text, date_style=DateStyle.MONTH_FIRST, decimal_style=DecimalStyle.COMMA)
    assert (content.lines[0].since.day, content.lines[0].amount) == (3, Decimal("1.234"))
    assert read(text.replace("11/03", "11/11"), decimal_style=DecimalStyle.POINT).lines[0].amount == 1234


def test_columns_of_any_name_are_found_by_options() -> None:
    columns = {Role.ACCOUNT: "Acct", Role.DATE: "When", Role.AMOUNT: "USD", Role.NUMBER: "No"}
    (line,) = read("No,Acct,When,USD,Fee\n17,acct_a,2026-11-22T12:00:00Z,0.10,9\n", columns=columns).lines
    assert (line.number, line.account_id, line.since, line.amount) == ("17", "acct_a", NOON, Decimal("0.10"))
    (line,) = read("Ref,Account,Date,Fee\n17,a,2026-11-22,0.10\n", columns={Role.NUMBER: NO_COLUMN}).lines
    assert line.number == "2"


@given(
    st.lists(
        st.tuples(
            st.integers(1, 30), st.decimals("0", "99999", places=2), st.sampled_from(["a", "b;c", 'd"e', "f, g"])
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]),
    st.sampled_from(["%Y-%m-%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d %b %Y"]),
    st.booleans(),
    st.booleans(),
)
def test_any_dialect_of_one_truth_is_read_alike_or_rejected_as_ambiguous(
    truth: list[tuple[int, Decimal, str]],
    delimiter: str,
    line_end: str,
    encoding: str,
    date_format: str,
    has_comma: bool,  # noqa: FBT001 - hypothesis gives arguments by position
    has_extras: bool,  # noqa: FBT001
) -> None:
    """The total may be the only line with an unambiguous amount."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end)
    if has_extras:
        writer.writerows([["Rechnung / Invoice é"], [], ["Period", "November"]])
    writer.writerow(["Account", "Date", "Amount"])
    for number, amount, account in truth:
        writer.writerow(
            [account, f"{datetime(2026, 11, number, tzinfo=UTC):{date_format}}", _amount(amount, has_comma)]
        )
    if has_extras:
        writer.writerow(["Total", "", _amount(sum((amount for _, amount, _ in truth), Decimal(0)), has_comma)])
    data = file.getvalue().encode(encoding)
    if reason := error_of(data):
        assert re.search(r"may be .*; give --date-style", reason)
        assert all(number <= 12 for number, _, _ in truth)
        return
    content = read(data)
    assert [(line.since.day, line.amount, line.account_id) for line in content.lines] == truth
    assert len(content.totals) == has_extras


def _amount(amount: Decimal, has_comma: bool) -> str:  # noqa: FBT001
    text = f"{amount:,.2f}"
    return text.translate(str.maketrans(",.", ".,")) if has_comma else text


def test_credits_and_totals_are_no_charges() -> None:
    text = (
        "Account;Date;Amount;Description\nacct_a;22.11.2026;1.000,50;Refresh\nacct_a;22.11.2026;(0,50);Refund\n"
        "Subtotal;;1.000,00;\n;;-1,00 €;Discount\nTotal due;;999,00 €;\n"
    )
    content = read(text, currency="EUR")
    assert [line.amount for line in content.lines] == [Decimal("1000.50")]
    assert [(credit.row, credit.label, credit.amount) for credit in content.credits] == [
        (3, "Refund", Decimal("-0.50")),
        (5, "Discount", Decimal("-1.00")),
    ]
    totals = [(total.row, total.label, total.amount, total.is_grand_total) for total in content.totals]
    assert totals == [(4, "Subtotal", Decimal(1000), False), (6, "Total due", Decimal(999), True)]


def test_total_may_be_rounded() -> None:
    text = "Account,Date,Amount\na,2026-11-22,0.033\nb,2026-11-22,0.0334\nTotal,,0.07\n"
    assert read(text).totals[0].is_grand_total
    with pytest.raises(InvoiceError, match=r"'Total' is 0\.06"):
        read(text.replace("0.07", "0.06"))


def test_labels_and_notes_have_no_control_characters() -> None:
    content = read(PLAIN + "\x1b[2J note,,\n" + '"Dis\x1b[31m\ncount",,-0.10\n')
    assert content.credits[0].label == "Dis\ufffd[31m count"
    assert all(sentence.isprintable() for sentence in content.assumptions)


def test_everything_that_was_proposed_is_an_assumption() -> None:
    content = read(
        "Invoice\n" + PLAIN.replace(",", ";").replace("acct_a", "Stra\u00dfe").removesuffix("\n"), encoding=None
    )
    assert content.assumptions == [
        "The delimiter is a semicolon (--delimiter).",
        "The header is line 2 (--header-row).",
        "The account is in the column 'Account' (--account-column).",
        "The date is in the column 'Date' (--date-column).",
        "The amount is in the column 'Amount' (--amount-column).",
        "Amounts are written as 1,234.50 (--decimal-style).",
        "Dates are written as YYYY-MM-DD (--date-style).",
        "Days are UTC days (--time-zone).",
        "The file is complete, though its last line has no line end (--total proves it).",
    ]
    latin = read(PLAIN.replace("acct_a", "Stra\u00dfe").encode("cp1252"))
    assert latin.lines[0].account_id == "Stra\u00dfe"
    assert "The encoding is cp1252 (--encoding)." in latin.assumptions


@given(st.integers(0, len(PLAIN) - 1))
def test_cut_off_file_is_rejected_or_has_whole_lines_only(length: int) -> None:
    """The amount of a single line cannot be compared with others, so it is an assumption that it is whole."""
    text = PLAIN[:length]
    if error_of(text.encode()):
        return
    content = read(text)
    is_single = len(content.lines) == 1 and "no line end" in content.assumptions[-1]
    assert is_single or content.lines == read(PLAIN).lines[: len(content.lines)]


@given(st.binary(max_size=200), st.integers(0, len(PLAIN)), st.sampled_from(["utf-8", "utf-16", "cp1252"]))
def test_broken_file_raises_only_invoice_errors_of_one_printable_line(junk: bytes, at: int, encoding: str) -> None:
    text = PLAIN.encode(encoding)
    for data in (junk, text[:at] + junk + text[at:], text[:at] + junk):
        assert error_of(data).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoding = ", "the profile is not TOML"),
        ('encoding = "utf-8"', "the profile's delimiter is wrong: Field required; save it again"),
    ],
)
def test_wrong_profile_is_rejected_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(InvoiceError, match=message):
        parse_profile(text)


@pytest.mark.parametrize("encoding", sorted({*encodings.aliases.aliases.values(), "idna", "punycode", "undefined"}))
def test_any_encoding_that_python_knows_reads_the_file_or_is_rejected(encoding: str) -> None:
    """Some of Python's codecs are no encodings of files, and some fail on any input."""
    for text in (PLAIN, "Straße;\x1b\\\n" + PLAIN):
        with suppress(InvoiceError):
            assert len(read(text, encoding=encoding).lines) == 2


def test_sheet_of_a_csv_file_is_rejected() -> None:
    with pytest.raises(InvoiceError, match="the file is CSV, so it has no sheet 'November'; leave out --sheet"):
        read(PLAIN, sheet="November")


def test_name_of_a_column_that_is_too_long_is_rejected() -> None:
    name = f"Amount ({'x' * 300})"
    text = PLAIN.replace("Amount", name)
    assert "no line names the columns" in error_of(text.encode())
    with pytest.raises(InvoiceError, match="the name of the amount column is too long"):
        read(text, columns={Role.AMOUNT: name})


@pytest.mark.parametrize(
    "cell", ["(" * 130_000, f"abc:{'1' * 130_000}:", f"abc:{' ' * 130_000}x"], ids=["name", "amount", "spaces"]
)
def test_long_cell_is_read_in_linear_time(cell: str) -> None:
    """These took minutes."""
    started = time.process_time()
    assert len(read(f"{cell}\n{PLAIN}").lines) == 2
    assert "too long" in error_of(f'{PLAIN}"{cell}",2026-11-23,0.10\n'.encode())
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", ["Amount (cents)", "Fee [minor units]", "Amount in cents"])
def test_amount_in_parts_of_a_currency_is_rejected(name: str) -> None:
    with pytest.raises(InvoiceError, match=r"is in \w+, but the calls are in USD"):
        read(PLAIN.replace("Amount", name), columns={Role.AMOUNT: name})
