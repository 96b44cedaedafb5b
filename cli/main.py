"""The command `payready`. Each command parses its options, calls one use case or query, and prints the result."""

import json
import uuid
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from cli import (
    archive_commands,
    celery_client,
    dead_letter_commands,
    doctor,
    doctor_results,
    failover_commands,
    fee_commands,
    render,
    render_payments,
    run_demo,
    run_dev_stack,
    webhook_commands,
)
from cli.command_line import (
    EXIT_FAILED,
    AsJson,
    echo_line,
    fail,
    ledger_engine,
    query_or_exit,
    report_errors,
    runtime_or_exit,
    stdout_console_for_terminal_or_log,
)
from config.role_settings import require_in_production
from config.settings import ConfigurationError, settings
from demo.interrupts import Interrupted, Interrupts, interrupts
from worker import flow
from worker.errors import PaymentNotReady
from worker.ledger import archived_months, payment_report
from worker.ledger.engine import DATABASE_UNAVAILABLE, read_snapshot
from worker.rules.job import FundsCheck, Job, parse_job
from worker.rules.states import PaymentState
from worker.runtime import build_runtime, utc_now

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Release bank payments only after a fresh balance has been checked. Run payready on this machine, inspect it, "
    "operate it.",
)
payment_app = typer.Typer(no_args_is_help=True, help="Payments: enqueue, show, list, cancel, redeliver, end-hold.")
app.add_typer(payment_app, name="payment")
app.add_typer(fee_commands.app, name="fees")
app.add_typer(archive_commands.app, name="archive")
app.add_typer(dead_letter_commands.app, name="dead-letters")
app.add_typer(webhook_commands.quarantine_app, name="quarantine")
app.add_typer(webhook_commands.webhooks_app, name="webhooks")
app.command("reconcile-after-failover")(failover_commands.reconcile_after_failover)

T = TypeVar("T")
PaymentId = Annotated[str, typer.Argument(help="The payment's id, as its job has it.")]
EXIT_NOT_READY = 3
"""Exit status of `payment enqueue --wait` if the payment fails."""


@app.command("demo")
def demo_command(as_json: AsJson = False) -> None:
    """Run 31 jobs in 17 scenarios through all roles on this machine and check the results.

    Exit status 1 if a result differs.
    """
    result = _run_or_exit_on_interrupt(run_demo.run_demo, as_json=as_json)
    if as_json:
        typer.echo(render.as_json({"passed": result.passed, **vars(result)}))
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


@app.command("up")
def up_command(as_json: AsJson = False) -> None:
    """Run payready on this machine against a simulator of Quiltt, until Ctrl-C."""
    _run_or_exit_on_interrupt(partial(run_dev_stack.write_env_file_and_run_dev_stack, as_json=as_json), as_json=as_json)


def _run_or_exit_on_interrupt(run: Callable[[Console, Interrupts], T], *, as_json: bool) -> T:
    console = Console(stderr=True) if as_json else stdout_console_for_terminal_or_log()
    with report_errors(), interrupts() as signals:
        try:
            return run(console, signals)
        except Interrupted as interrupted:
            console.print(f"stopped by {interrupted}; all processes have ended")
            raise typer.Exit(interrupted.status) from None


@app.command("doctor")
def doctor_command(
    flower: Annotated[str, typer.Option(help="URL of Flower.")] = "http://127.0.0.1:5555",
    web: Annotated[
        str | None,
        typer.Option(help="URL of `web`, preferably the public one. Default: this host, at PAYREADY_WEBHOOK_PORT."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check all dependencies and print how to fix problems. Exit status 1 if a check fails."""
    with report_errors():
        require_in_production(settings(), "database_url", "redis_url")
        # The runtime is not closed: a check that hangs still uses it.
        results = doctor.run_checks(settings(), build_runtime(settings()), flower, web)
        found = list(results if as_json else map(_print_check_result, results))
        if as_json:
            typer.echo(render.as_json(found))
    if any(result.severity == doctor_results.Severity.ERROR for result in found):
        raise typer.Exit(EXIT_FAILED)


def _print_check_result(result: doctor_results.CheckResult) -> doctor_results.CheckResult:
    stdout_console_for_terminal_or_log().print(
        render_payments.check_result_text(result), highlight=False, soft_wrap=True
    )
    return result


# --- payments ---------------------------------------------------------------------------------------------------------


def _job_default(field: str) -> Any:
    return Job.model_fields[field].default


@payment_app.command("enqueue")
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


@payment_app.command("show")
def show_payment(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """Print the history of one payment: job, refresh, calls, fees, balances, verdict, funds hold, deliveries."""
    timeline = query_or_exit(
        lambda tx: payment_report.payment_timeline(
            tx,
            payment_id,
            clock_skew=settings().clock_skew,
            default_hold_s=settings().funds_hold_s,
            callback_queue=settings().effective_callback_queue,
            name_prefix=settings().name_prefix,
        )
    )
    if timeline is None:
        fail(_archived_text(payment_id) or f"no payment {payment_id} in the ledger")
    elif as_json:
        typer.echo(render.as_json(timeline))
    else:
        stdout_console_for_terminal_or_log().print(
            render_payments.payment_timeline(timeline, utc_now()), highlight=False, soft_wrap=True
        )


def _archived_text(payment_id: str) -> str | None:
    """Return when a payment was archived, and where its rows are. None if it was not, or if there is no ledger here."""
    try:
        with ledger_engine() as engine, read_snapshot(engine) as tx:
            archived = archived_months.month_with_payment(tx, payment_id)
    except (ConfigurationError, *DATABASE_UNAVAILABLE):
        return None
    if archived is None:
        return None
    return f"{payment_id} was archived on {render.utc_time_text(archived.copied_at)}, with {archived.folder}"


@payment_app.command("list")
def list_payments(
    state: Annotated[PaymentState | None, typer.Option(help="Only payments in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number of payments.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List payments, the newest first."""
    lines = query_or_exit(lambda tx: payment_report.list_payments(tx, state=state, limit=limit))
    if as_json:
        typer.echo(render.as_json(lines))
    else:
        stdout_console_for_terminal_or_log().print(render_payments.payment_table(lines, utc_now()), highlight=False)


@payment_app.command("cancel")
def cancel_payment(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """Fail a waiting payment with the reason `cancelled`."""
    with report_errors():
        cancelled = celery_client.cancel(settings(), payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "cancelled": cancelled}))
    elif cancelled:
        echo_line(f"{payment_id}: cancelled")
    if not cancelled:
        fail(_archived_text(payment_id) or f"{payment_id} was not cancelled: it is already resolved, or unknown")


@payment_app.command("redeliver")
def redeliver_payment(payment_id: PaymentId, as_json: AsJson = False) -> None:
    """Deliver the outcome of a resolved payment again, with the same task ids."""
    with runtime_or_exit() as rt:
        task_ids = flow.redeliver(rt, payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "tasks": task_ids}))
    if not task_ids:
        fail(_archived_text(payment_id) or f"{payment_id} has no outcome to deliver: it is waiting, or unknown")
    elif not as_json:
        tasks = "task" if len(task_ids) == 1 else "tasks"
        echo_line(f"{payment_id}: redelivery scheduled for {tasks} {', '.join(task_ids)}")


@payment_app.command("end-hold")
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
        fail(_archived_text(payment_id) or no_hold)


if __name__ == "__main__":
    app()
