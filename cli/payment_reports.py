"""Commands that read payments: show, list, watch. They import neither Celery nor the clients of Redis and Quiltt."""

import time
from datetime import datetime
from decimal import Decimal
from typing import Annotated

import typer

from cli import render, render_payments
from cli.command_line import (
    EXIT_NOT_READY,
    AsJson,
    PaymentId,
    echo_line,
    engine_or_exit,
    fail,
    parsed_option,
    query_or_exit,
    stdout_console_for_terminal_or_log,
)
from config.clock import utc_now
from config.escaping import escape_unprintable
from config.settings import settings
from worker.errors import FailureReason
from worker.ledger import payment_report
from worker.ledger.engine import Tx, read_snapshot
from worker.ledger.payment_report import PaymentTimeline
from worker.ledger.payment_search import (
    MAX_EXAMINED,
    PAGE_SIZE,
    DeliveryProblem,
    PageKey,
    PaymentFilter,
    PaymentPage,
    search_payments,
)
from worker.ledger.payment_situation import explain_payment
from worker.rules.decimals import parse_positive_decimal
from worker.rules.payment_situations import Explanation
from worker.rules.states import PaymentState
from worker.rules.times import parse_utc_time, utc_time_text

WATCH_INTERVAL_S = 0.5
"""Time between two reads of a watched payment."""


def show_payment(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """Print one payment: what happened, which party must act, and its whole history.

    Job with metadata, refresh, calls, fees, balances, funds calculation, funds hold, deliveries, callbacks.
    """
    timeline = query_or_exit(lambda tx: _timeline(tx, payment_id))
    if timeline is None:
        fail(_missing_payment_text(payment_id))
    explained = explain_payment(timeline, utc_now())
    if as_json:
        explanation = {"explanation": _explanation_json(explained)}
        typer.echo(render.as_json(explanation | {name: getattr(timeline, name) for name in vars(timeline)}))
    else:
        stdout_console_for_terminal_or_log().print(
            render_payments.payment_timeline(timeline, explained, utc_now()), highlight=False, soft_wrap=True
        )


def _timeline(tx: Tx, payment_id: str) -> PaymentTimeline | None:
    return payment_report.payment_timeline(
        tx,
        payment_id,
        clock_skew=settings().clock_skew,
        default_hold_s=settings().funds_hold_s,
        callback_queue=settings().effective_callback_queue,
        name_prefix=settings().name_prefix,
    )


def _explanation_json(explained: Explanation) -> dict[str, str]:
    return {
        "sentence": explained.sentence,
        "must_act": explained.actor.value,
        "action": explained.action,
        "next_step": explained.next_step,
    }


def _missing_payment_text(payment_id: str) -> str:
    from cli.archived_payment import archived_text  # noqa: PLC0415 - statements of the archive, only for this error

    return archived_text(payment_id) or f"no payment {payment_id} in the ledger"


# --- list -------------------------------------------------------------------------------------------------------------


_parse_amount = parsed_option(parse_positive_decimal)
_parse_time = parsed_option(parse_utc_time)
_parse_page_key = parsed_option(PageKey.parse)


def list_payments(
    state: Annotated[PaymentState | None, typer.Option(help="Only payments in this state.")] = None,
    reason: Annotated[FailureReason | None, typer.Option(help="Only payments that failed with this reason.")] = None,
    account: Annotated[str | None, typer.Option(help="Only payments of this account.")] = None,
    task: Annotated[str | None, typer.Option(help="Only the payment whose outcome this Celery task gets.")] = None,
    amount: Annotated[
        Decimal | None,
        typer.Option(parser=_parse_amount, metavar="DECIMAL", help="Only payments of this amount."),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=_parse_time,
            metavar="TIME",
            help="Only payments requested at this time or later, in UTC.",
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(parser=_parse_time, metavar="TIME", help="Only payments requested before this time, in UTC."),
    ] = None,
    resolved_since: Annotated[
        datetime | None,
        typer.Option(parser=_parse_time, metavar="TIME", help="Only payments resolved at this time or later, in UTC."),
    ] = None,
    resolved_until: Annotated[
        datetime | None,
        typer.Option(parser=_parse_time, metavar="TIME", help="Only payments resolved before this time, in UTC."),
    ] = None,
    delivery: Annotated[
        DeliveryProblem | None,
        typer.Option(help="Only payments with an outcome that is not delivered, for this cause."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only payments whose metadata has this value. It may be repeated."),
    ] = None,
    after: Annotated[
        PageKey | None,
        typer.Option(parser=_parse_page_key, metavar="KEY", help="Begin after this key, which the page before prints."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=MAX_EXAMINED, help="Maximum number of payments on a page.")
    ] = PAGE_SIZE,
    as_json: AsJson = False,
) -> None:
    """Search payments, the newest first.

    All conditions must fit. An index finds the payments of --account, --task, --state waiting, --resolved-since and
    --delivery. Any other search examines 10,000 payments a page.
    """
    conditions = PaymentFilter(
        task_id=task,
        account_id=account,
        state=state,
        reason=reason,
        amount=amount,
        since=since,
        until=until,
        resolved_since=resolved_since,
        resolved_until=resolved_until,
        delivery=delivery,
        metadata=dict(map(_parse_metadata_condition, metadata or ())),
    )
    page = query_or_exit(lambda tx: search_payments(tx, conditions, after=after, limit=limit))
    if as_json:
        typer.echo(render.as_json(page.payments))
    else:
        table = render_payments.payment_table(page.payments, utc_now())
        stdout_console_for_terminal_or_log().print(table, highlight=False)
    _print_how_to_continue(page)


def _parse_metadata_condition(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter("must be KEY=VALUE, such as order=A-17", param_hint="--metadata")
    return key, value


def _print_how_to_continue(page: PaymentPage) -> None:
    """Print the next page's key to standard error: standard output has payments only."""
    if page.next_page is None:
        return
    found = "more payments follow"
    if page.searched_back_to is not None:
        found = f"searched back to {utc_time_text(page.searched_back_to)}"
    typer.echo(escape_unprintable(f"{found}; continue with --after {page.next_page}"), err=True)


# --- watch ------------------------------------------------------------------------------------------------------------


def watch_payment(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """Follow one payment until it is resolved. Exit status 3 if it fails.

    It prints a line whenever the explanation of the payment changes. With --json each line is an object.
    """
    printed = None
    with engine_or_exit() as engine:
        while True:
            with read_snapshot(engine) as tx:
                timeline = _timeline(tx, payment_id)
            if timeline is None:
                fail(_missing_payment_text(payment_id))
            explained = explain_payment(timeline, utc_now())
            if explained.sentence != printed:
                _print_watched(timeline, explained, as_json=as_json)
                printed = explained.sentence
            if timeline.payment.state != PaymentState.WAITING:
                break
            time.sleep(WATCH_INTERVAL_S)
    if timeline.payment.state == PaymentState.FAILED:
        raise typer.Exit(EXIT_NOT_READY)


def _print_watched(timeline: PaymentTimeline, explained: Explanation, *, as_json: bool) -> None:
    line, now = timeline.payment, utc_now()
    if as_json:
        watched = {"at": now, "payment_id": line.payment_id, "state": line.state, "reason": line.reason}
        typer.echo(render.as_json_line(watched | _explanation_json(explained)))
    else:
        echo_line(f"{utc_time_text(now)}  {line.state}  {explained.sentence}")
