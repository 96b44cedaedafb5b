"""Reading of aggregated invoices: count x price for a month, a day, an account or a kind of call."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from tests.support.invoice_files import NOVEMBER, read
from worker.rules.invoice_lines import InvoiceError, Level
from worker.rules.invoice_reading import NO_COLUMN, Role


def day(number: int) -> datetime:
    return datetime(2026, 11, number, tzinfo=UTC)


def test_line_of_a_month_covers_the_period() -> None:
    text = 'Description,Quantity,Unit price,Amount\nBalance refresh,"1,200",$0.10,$120.00\n'
    text += "Discount,,,-20.00\nTotal,,,100.00\n"
    content = read(text)
    (line,) = content.aggregated_lines
    assert (content.level, content.lines) == (Level.MONTH, [])
    assert (line.row, line.label, line.account_id) == (2, "Balance refresh", None)
    assert (line.count, line.unit_price, line.amount) == (1200, Decimal("0.10"), Decimal(120))
    assert (line.since, line.until) == (NOVEMBER.since, NOVEMBER.until)
    assert [credit.label for credit in content.credits] == ["Discount"]
    assert content.totals[0].is_grand_total
    assert content.first_lines == (line,)
    assert "Each line charges the calls of one month." in content.assumptions


@pytest.mark.parametrize(
    "period", ["2026-11", "11/2026", "November 2026", "Nov 2026", "2026-11-01 - 2026-11-30", "2026-11-01/2026-11-30"]
)
def test_month_may_be_written_as_a_name_or_a_range(period: str) -> None:
    content = read(f"Period;Calls;Fee\n{period};10;1.00\n")
    (line,) = content.aggregated_lines
    assert (content.level, line.since, line.until) == (Level.MONTH, NOVEMBER.since, NOVEMBER.until)


def test_lines_of_days_accounts_and_kinds_have_their_level() -> None:
    by_day = read("Day,Calls,Amount\n11/21/2026,10,1.00\n11/22/2026,5,0.50\nTotal,15,1.50\n")
    assert (by_day.level, [line.since for line in by_day.aggregated_lines]) == (Level.DAY, [day(21), day(22)])
    assert by_day.aggregated_lines[0].until == day(22)
    by_account = read("Account;Usage;Cost\na;10;1,00\nb;5;0,50\n")
    assert by_account.level == Level.ACCOUNT
    assert [(line.account_id, line.count) for line in by_account.aggregated_lines] == [("a", 10), ("b", 5)]
    by_kind = read("Product,Qty,Rate,Amount\nRefresh,10,0.10,1.00\nRefresh (test),5,0,0.00\n")
    assert by_kind.level == Level.KIND
    assert [line.label for line in by_kind.aggregated_lines] == ["Refresh", "Refresh (test)"]


def test_count_is_derived_from_the_unit_price_if_it_has_no_column() -> None:
    content = read("Month,Unit price,Amount\n2026-11,0.10,12.00\n")
    assert content.aggregated_lines[0].count == 120
    assert "The number of calls is the amount divided by the unit price (--count-column)." in content.assumptions
    with pytest.raises(InvoiceError, match=r"line 2: the number of calls must be a whole number, but is 119\.9"):
        read("Month,Unit price,Amount\n2026-11,0.10,11.99\n")


def test_counts_of_one_with_account_and_date_are_an_invoice_by_call() -> None:
    content = read("Account,Date,Qty,Price,Amount\na,2026-11-22T12:00:00Z,1,0.10,0.10\nb,2026-11-22,1,0.10,0.10\n")
    assert content.level is None
    assert [line.account_id for line in content.lines] == ["a", "b"]
    assert "The invoice is by call, because each line charges one call." in content.assumptions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Month,Calls,Amount\n2026-11,1.5,1.00\n", "line 2: the number of calls must be a whole number, but is 1.5"),
        ("Month,Calls,Amount\n2026-11,,1.00\n", "line 2: Calls is empty"),
        ("Month,Calls,Amount\n2026-12,10,1.00\n", "line 2: 2026-12-01 is not in 2026-11; .* --date-column -"),
        ("Day,Calls,Amount\n2026-11-22 12:00 UTC,10,1.00\n", "line 2: Day of several calls must be a day or a month"),
        ("Month,Calls,Amount\n2026-13,10,1.00\n", "line 2: Month is not a date or time"),
        ("Description,Amount\nRefreshes,1.00\n", "no column has the account, and none the number of calls"),
    ],
)
def test_wrong_aggregated_line_is_rejected(text: str, message: str) -> None:
    with pytest.raises(InvoiceError, match=message):
        read(text)


def test_date_of_the_invoice_can_be_ignored() -> None:
    text = "Invoice date,Calls,Amount\n2026-12-03,10,1.00\n"
    content = read(text, columns={Role.DATE: NO_COLUMN})
    assert content.aggregated_lines[0].until - content.aggregated_lines[0].since == timedelta(days=30)


@pytest.mark.parametrize(
    "text",
    [
        "Date,Calls,Amount\n2026-11-03,2,0.20\nTotal,2,0.20\n",
        "Month,Calls,Unit price,Amount\n2026-11,2,0.10,0.20\nTotal,,,0.20\n",
        "Calls,Unit price,Amount\n2,0.10,0.20\nTotal,,0.20\n",
    ],
)
def test_total_of_one_line_is_a_total_though_its_amount_is_known(text: str) -> None:
    content = read(text)
    assert [line.count for line in content.aggregated_lines] == [2]
    assert content.totals[0].is_grand_total


def test_midnight_beside_other_times_is_a_time_and_never_that_of_several_calls() -> None:
    text = "Date,Account,Calls,Amount\n2026-11-05 12:00:00,a,1,0.10\n2026-11-06 00:00:00,a,{},0.10\n"
    assert [line.until for line in read(text.format(1), time_zone="UTC").lines][1] == day(6)
    with pytest.raises(InvoiceError, match="line 3: a day or a time 00:00, but other lines have other times"):
        read(text.format(2), time_zone="UTC")


def test_cut_off_amount_is_found_beside_counts() -> None:
    with pytest.raises(InvoiceError, match="line 3: Amount has fewer decimals"):
        read("Account,Calls,Amount\na,10,1.00\nb,10,1")


def test_month_by_another_clock_names_the_option_that_widens_the_period() -> None:
    with pytest.raises(InvoiceError, match=r"2026-11-01T04:00Z to 2026-12-01T05:00Z is not all in .*--tolerance-s"):
        read("Month,Calls,Amount\n2026-11,2,0.20\n", time_zone="America/New_York")


@pytest.mark.parametrize(
    "text",
    [
        "Description,Calls,Unit price,Amount\nRefresh,10,0.10,1.00\nVAT 19%,,,0.19\nTotal,,,1.19\n",
        "Description;Calls;Amount\nRefresh;10;1,00\nSumme;;1,00\nzzgl. 19 % MwSt.;;0,19\nGesamtbetrag;;1,19\n",
        "Account,Date,Amount\na,2026-11-22,1.00\nSubtotal,,1.00\nSales tax (19%):,,0.19\nTotal,,1.19\n",
    ],
)
def test_tax_is_no_charge_and_part_of_a_total(text: str) -> None:
    content = read(text)
    assert [line.amount for line in content.first_lines] == [1]
    assert content.credits == []
    assert content.totals[-1].is_grand_total
    (note,) = [sentence for sentence in content.assumptions if "tax" in sentence]
    assert note.endswith(", 0.19.")


def test_tax_that_contradicts_the_total_is_rejected() -> None:
    with pytest.raises(InvoiceError, match=r"line 4: 'Total' is 1.29, but the file's lines add up to 1\.19"):
        read("Description,Calls,Amount\nRefresh,10,1.00\nVAT 19%,,0.19\nTotal,,1.29\n")


def test_tax_with_a_count_is_a_charge_like_others() -> None:
    """It is no call of the ledger, so it becomes a difference."""
    assert len(read("Description,Calls,Amount\nRefresh,10,1.00\nTax,1,0.19\n").aggregated_lines) == 2


def test_last_day_of_a_range_decides_the_date_style() -> None:
    (line,) = read("Period,Calls,Amount\n11/01/2026 - 11/30/2026,2,0.20\n").aggregated_lines
    assert (line.since, line.until) == (NOVEMBER.since, NOVEMBER.until)
    with pytest.raises(InvoiceError, match="give --date-style"):
        read("Period,Calls,Amount\n11/01/2026 - 11/02/2026,2,0.20\n")
