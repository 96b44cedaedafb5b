"""Commands that change payments: enqueue, cancel, redeliver, end a funds hold."""

import json
import uuid
from datetime import datetime
from typing import Annotated, Any, NoReturn

import typer

from cli import celery_client, render, render_payments
from cli.archived_payment import archived_text
from cli.command_line import EXIT_NOT_READY, AsJson, PaymentId, echo_line, fail, parsed_option, report_errors
from cli.command_runtime import runtime_or_exit
from config.settings import settings
from worker import flow
from worker.errors import PaymentNotReady
from worker.ledger.outcome_deliveries import ResolutionKey
from worker.rules.decimals import count_text
from worker.rules.job import FundsCheck, Job, parse_job
from worker.rules.times import parse_utc_time
from worker.runtime import Runtime


def _job_default(field: str) -> Any:
    return Job.model_fields[field].default


def enqueue_payment(
    account_id: Annotated[str, typer.Argument(help="Quiltt's id of the payer's account.")],
    amount: Annotated[
        str | None, typer.Option(help="A decimal such as 25.00. Without it there is no funds check.")
    ] = None,
    payment_id: Annotated[str | None, typer.Option("--id", help="Your id of the payment. Default: a new id.")] = None,
    timeout_s: Annotated[
        int | None,
        typer.Option(help=f"Seconds until the payment fails without a balance. Default: {_job_default('timeout_s')}."),
    ] = None,
    max_balance_age_s: Annotated[
        int | None,
        typer.Option(help=f"Maximum age of the balance in seconds. Default: {_job_default('max_balance_age_s')}."),
    ] = None,
    funds_check: Annotated[FundsCheck | None, typer.Option(help="Whether the balance must cover the amount.")] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object that the outcome returns.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the outcome. Exit status 3 if the payment fails.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Enqueue a job for a payment, in the currency of PAYREADY_CURRENCY."""
    given = {
        "account_id": account_id,
        "amount": amount,
        "payment_id": payment_id or f"pay_{uuid.uuid4().hex}",
        "timeout_s": timeout_s,
        "max_balance_age_s": max_balance_age_s,
        "funds_check": funds_check,
        "metadata": _parse_metadata(metadata),
    }
    fields = {key: value for key, value in given.items() if value is not None}
    with report_errors():
        currency = settings().currency
        job = parse_job({**fields, "currency": currency}, required_currency=currency)
        if not wait:
            _print_enqueued(job.payment_id, celery_client.enqueue_job(settings(), job), as_json=as_json)
            return
        try:
            outcome = celery_client.enqueue_job_and_wait(settings(), job)
        except PaymentNotReady as not_ready:
            _print_not_ready_and_exit(job.payment_id, not_ready, as_json=as_json)
        if as_json:
            typer.echo(render.as_json(outcome))
        else:
            echo_line(render_payments.released_text(outcome))


def _parse_metadata(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        raise typer.BadParameter("must be JSON", param_hint="--metadata") from None


def _print_enqueued(payment_id: str, task_id: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "task_id": task_id}))
    else:
        echo_line(f"{payment_id}: enqueued as task {task_id}. Next: payready payment show {payment_id}")


def _print_not_ready_and_exit(payment_id: str, error: PaymentNotReady, *, as_json: bool) -> NoReturn:
    if as_json:
        failed = {"payment_id": payment_id, "state": "failed", "reason": error.reason, "detail": error.detail}
        typer.echo(render.as_json(failed))
        raise typer.Exit(EXIT_NOT_READY)
    fail(f"{payment_id} failed: {error.reason}: {error.detail}", EXIT_NOT_READY)


def cancel_payment(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """Fail a waiting payment with the reason `cancelled`."""
    with report_errors():
        cancelled = celery_client.cancel(settings(), payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "cancelled": cancelled}))
    elif cancelled:
        echo_line(f"{payment_id}: cancelled")
    if not cancelled:
        fail(archived_text(payment_id) or f"{payment_id} was not cancelled: it is already resolved, or unknown")


def redeliver_payment(
    payment_id: Annotated[str | None, typer.Argument(help="The payment's id, as its job has it.")] = None,
    since: Annotated[
        datetime | None,
        typer.Option(parser=parsed_option(parse_utc_time), metavar="TIME", help="All resolved at this time or later."),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(parser=parsed_option(parse_utc_time), metavar="TIME", help="With --since: only before this time."),
    ] = None,
    is_confirmed: Annotated[bool, typer.Option("--yes", help="With --since: do not ask first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deliver the outcome of a resolved payment again, with the same task ids.

    With --since: the outcomes of all payments that were resolved in this time, in steps. It asks first.
    """
    if (payment_id is None) == (since is None) or (until is not None and since is None):
        raise typer.BadParameter("give the id of a payment, or --since TIME with or without --until TIME")
    with runtime_or_exit() as rt:
        if since is not None:
            _redeliver_all(rt, since, until or rt.clock(), is_confirmed=is_confirmed, as_json=as_json)
        elif payment_id is not None:
            _redeliver_one(rt, payment_id, as_json=as_json)


def _redeliver_one(rt: Runtime, payment_id: str, *, as_json: bool) -> None:
    task_ids = flow.redeliver(rt, payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "tasks": task_ids}))
    if not task_ids:
        fail(archived_text(payment_id) or f"{payment_id} has no outcome to deliver: it is waiting, or unknown")
    elif not as_json:
        tasks = "task" if len(task_ids) == 1 else "tasks"
        echo_line(f"{payment_id}: redelivery scheduled for {tasks} {', '.join(task_ids)}")


def _redeliver_all(rt: Runtime, since: datetime, until: datetime, *, is_confirmed: bool, as_json: bool) -> None:
    period = f"from {render.utc_time_text(since)} until {render.utc_time_text(until)}"
    if not is_confirmed:
        typer.confirm(f"Deliver all outcomes of payments resolved {period} again?", abort=True, err=True)
    payments, tasks, last = 0, 0, ResolutionKey(resolved_at=since, payment_id="")
    while step := flow.redeliver_step(rt, last, until):
        payments, tasks, last = payments + step.payments, tasks + step.tasks, step.last
        typer.echo(f"redelivery scheduled up to {last.resolved_at.isoformat()}", err=True)
    if as_json:
        typer.echo(render.as_json({"payments": payments, "tasks": tasks}))
    else:
        echo_line(f"redelivery scheduled for {count_text(payments, 'payment')}, {count_text(tasks, 'task')}")


def end_funds_hold(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """End the funds hold of a released payment: its debit shows in the balance, or will not be made."""
    with runtime_or_exit() as rt:
        ended = flow.end_hold(rt, payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "ended": ended}))
    elif ended:
        echo_line(f"{payment_id}: funds hold ended. Balances from before now are still reduced by its amount")
    if not ended:
        no_hold = f"{payment_id} has no funds hold to end: it is not released, has no amount, or its hold has ended"
        fail(archived_text(payment_id) or no_hold)
