"""The page Fees: what the calls of a month cost, as the command line's statement says it; its CSV; pending calls."""

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, get_args

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard import fee_chart
from dashboard.fee_days import FeeDays, MonthFees
from dashboard.page_rendering import render
from dashboard.page_requests import runtime_of
from worker.ledger import statement_slices
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger.fee_calls import PendingCall
from worker.ledger.fee_statement import GroupBy
from worker.ledger.metrics_queries import set_short_timeout
from worker.reports.csv_output import write_csv
from worker.reports.statement_report import (
    CSV_COLUMNS,
    StatementTotal,
    comparison_rows,
    head_lines,
    statement_csv_rows,
    total_lines,
    totals_by_currency,
)
from worker.rules.decimals import amount_with_currency_text, count_text
from worker.rules.fee_caps import CapKind, start_of_day, start_of_next_period
from worker.rules.months import Month, month_of, parse_month
from worker.rules.statement_period import StatementPeriod
from worker.runtime import Runtime

UNRESOLVED_AGE = timedelta(hours=24)
"""Age from which a pending call is unresolved: only an invoice can post or void it."""
MAX_PENDING_CALLS = 500
MONTH_FORM = "must be a month such as 2026-11"
_one_statement_at_a_time = threading.Lock()


def fee_days_of(request: Request) -> FeeDays:
    """Return the days that this process knows."""
    days: FeeDays = request.app.state.fee_days
    return days


# --- statement --------------------------------------------------------------------------------------------------------


def show_fees(request: Request) -> Response:
    """Show the statement of a month by day."""
    rt = runtime_of(request)
    text = request.query_params.get("month")
    asked = month_of(rt.clock()) if text is None else parse_month(text)
    month = asked or month_of(rt.clock())
    period = StatementPeriod(months=(month,))
    with read_snapshot(rt.engine) as tx:
        set_short_timeout(tx)
        months = statement_slices.months_with_calls(tx)
        fees, before = fee_days_of(request).read_months(tx, [month, period.previous.months[0]])
        caps = list(_cap_lines(rt, fees)) if month == month_of(rt.clock()) else []
    totals = totals_by_currency(fees.lines, {})
    return render(
        request,
        "fees.html",
        status_code=200 if asked else 400,
        problem=None if asked else f"Month {MONTH_FORM}.",
        month=month.name,
        asked_month=month.name if text is None else text,
        months=sorted({*months, month.name, month_of(rt.clock()).name}, reverse=True),
        head=head_lines(period, fees.calls_by_mode, is_over=period.until <= rt.clock()),
        fees=fees,
        totals=totals,
        total_lines=list(total_lines(totals)),
        final_amounts=_final_amounts(totals),
        bars=fee_chart.day_bars(month, fees.lines),
        chart=fee_chart,
        month_before=before.month.name,
        missing_before=before.missing_days,
        comparison=list(comparison_rows(totals, totals_by_currency(before.lines, {}))),
        caps=caps,
    )


def _final_amounts(totals: Mapping[str, StatementTotal]) -> list[tuple[str, str]]:
    """Return the lowest and the highest final amount in each currency."""
    return [
        (
            amount_with_currency_text(total.posted_amount, currency),
            amount_with_currency_text(total.posted_amount + total.pending_amount, currency),
        )
        for currency, total in totals.items()
    ]


@dataclass(frozen=True, kw_only=True)
class CapLine:
    """A fee cap with its use now."""

    name: str
    used: str
    limit: str
    share: str
    resets_at: datetime
    account_id: str | None = None
    """The account that uses most of a cap that each account has."""


def _cap_lines(rt: Runtime, fees: MonthFees) -> Iterator[CapLine]:
    """Yield each cap that is set. Posted and pending fees count."""
    currency, now, caps = rt.price_list.currency, rt.clock(), rt.fee_caps
    lines = [line for line in fees.lines if line.currency == currency]
    lines_of_today = [line for line in lines if line.key == f"{start_of_day(now):%Y-%m-%d}"]
    for name, cap, limit, counted in (
        ("fees per day (UTC)", CapKind.DAY, caps.per_day, lines_of_today),
        ("fees per month (UTC)", CapKind.MONTH, caps.per_month, lines),
    ):
        if limit is not None:
            used = sum((line.posted_amount + line.pending_amount for line in counted), Decimal(0))
            texts = [amount_with_currency_text(amount, currency) for amount in (used, limit)]
            yield CapLine(
                name=name,
                used=texts[0],
                limit=texts[1],
                share=_share_text(used, limit),
                resets_at=start_of_next_period(cap, now),
            )
    if caps.calls_per_account is not None:
        most = fees.busiest_account
        yield CapLine(
            name="calls per account and day (UTC)",
            used=count_text(most.calls, "call") if most else "no call today",
            limit=count_text(caps.calls_per_account, "call"),
            share=_share_text(Decimal(most.calls if most else 0), Decimal(caps.calls_per_account)),
            resets_at=start_of_next_period(CapKind.ACCOUNT, now),
            account_id=most.account_id if most else None,
        )


def _share_text(used: Decimal, limit: Decimal) -> str:
    return f"{used * 100 / limit:.0f} %" if limit else "100 %"


def download_csv(request: Request) -> Response:
    """Return the statement of a month as the file that `payready fees statement --csv` prints."""
    month = _required_month(request)
    by = request.query_params.get("by", "day")
    if by not in get_args(GroupBy):
        raise HTTPException(400, f"by must be one of {', '.join(get_args(GroupBy))}")
    statement = _read_statement(runtime_of(request), month, by)
    output = io.StringIO()
    write_csv(output, CSV_COLUMNS[by], statement_csv_rows(statement))
    name = f"payready-fees-{month.name}-by-{by}.csv"
    return Response(
        output.getvalue(),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _required_month(request: Request) -> Month:
    month = parse_month(request.query_params.get("month", ""))
    if month is None:
        raise HTTPException(400, f"month {MONTH_FORM}")
    return month


def _read_statement(rt: Runtime, month: Month, by: Any) -> Any:
    """Read one statement at a time: with a million calls it takes some seconds, in short queries."""
    if not _one_statement_at_a_time.acquire(blocking=False):  # to wait would occupy the threads of all pages
        raise HTTPException(503, "another statement is being read; try again in a few seconds")
    try:
        with read_snapshot(rt.engine) as tx:
            set_short_timeout(tx)
            return statement_slices.read_month(tx, month, by)
    finally:
        _one_statement_at_a_time.release()


# --- pending calls ----------------------------------------------------------------------------------------------------


def show_pending(request: Request) -> Response:
    """Show calls that have been pending for a day, as `payready fees pending` does."""
    rt = runtime_of(request)
    before = rt.clock() - UNRESOLVED_AGE
    with read_snapshot(rt.engine) as tx:
        set_short_timeout(tx)
        months = [month for name in statement_slices.months_with_calls(tx) if (month := parse_month(name))]
        fees = fee_days_of(request).read_months(tx, months)
        calls = _pending_calls(tx, fees, before)
    return render(
        request,
        "fees_pending.html",
        missing_days=sum(each.missing_days for each in fees),
        calls=calls[:MAX_PENDING_CALLS],
        has_more=len(calls) > MAX_PENDING_CALLS,
        max_calls=MAX_PENDING_CALLS,
    )


def _pending_calls(tx: Tx, fees: Sequence[MonthFees], before: datetime) -> list[PendingCall]:
    """Return the oldest unresolved calls: only days with pending calls are searched."""
    days = sorted({line.key for each in fees for line in each.lines if line.pending})
    calls: list[PendingCall] = []
    for day in days:
        since = datetime.fromisoformat(day).replace(tzinfo=UTC)
        limit = MAX_PENDING_CALLS + 1 - len(calls)
        if since >= before or limit <= 0:
            break
        calls += statement_slices.pending_calls_of_day(tx, since, before=before, limit=limit)
    return calls


ROUTES = [
    Route("/fees", show_fees),
    Route("/fees.csv", download_csv),
    Route("/fees/pending", show_pending),
]
