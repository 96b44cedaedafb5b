"""The command line. Each command translates, asks, and shows; what it shows is made elsewhere."""

import json
import uuid
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from cli import (
    celery_client,
    doctor,
    doctor_results,
    fee_commands,
    render,
    render_payments,
    run_demo,
    run_dev_stack,
    webhook_commands,
)
from cli.command_line import EXIT_FAILED, AsJson, fail, query, report_errors, stdout_console
from config.settings import settings
from demo.interrupts import Interrupted, Interrupts, interrupts
from worker import flow
from worker.errors import PaymentNotReady
from worker.ledger import payment_report
from worker.rules.job import parse_job
from worker.runtime import build_runtime, utc_now

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Payments that wait for a fresh balance: run payready on this machine, and look at what it does.",
)
payment_app = typer.Typer(no_args_is_help=True, help="Payments: enqueue, look at, cancel.")
app.add_typer(payment_app, name="payment")
app.add_typer(fee_commands.app, name="fees")
app.add_typer(webhook_commands.quarantine_app, name="quarantine")
app.add_typer(webhook_commands.webhooks_app, name="webhooks")

T = TypeVar("T")
EXIT_NOT_READY = 3
"""Exit status of `enqueue --wait` when the payment must not start."""


class State(StrEnum):
    """The states that a list can be narrowed to."""

    WAITING = "waiting"
    RELEASED = "released"
    FAILED = "failed"


class FundsCheck(StrEnum):
    """Whether the balance must cover the amount."""

    REQUIRED = "required"
    ENABLED = "enabled"
    DISABLED = "disabled"


def _run_with_screen(play: Callable[[Console, Interrupts], T], *, as_json: bool) -> T:
    screen = Console(stderr=True) if as_json else stdout_console()
    with report_errors(), interrupts() as signals:
        try:
            return play(screen, signals)
        except Interrupted as interrupted:
            screen.print(f"{interrupted}: stopped, nothing is left running")
            raise typer.Exit(interrupted.status) from None


@app.command("demo")
def demo_command(as_json: AsJson = False) -> None:
    """Run every scenario through the real processes, and check that all comes out as promised."""
    played = _run_with_screen(run_demo.run_demo, as_json=as_json)
    if as_json:
        typer.echo(render.as_json({"as_promised": played.passed, **vars(played)}))
    if not played.passed:
        raise typer.Exit(EXIT_FAILED)


@app.command("up")
def up_command(as_json: AsJson = False) -> None:
    """Run payready on this machine, with a simulator in Quiltt's place, until Ctrl-C."""
    _run_with_screen(partial(run_dev_stack.run_dev_stack, as_json=as_json), as_json=as_json)


@app.command("doctor")
def doctor_command(
    flower: Annotated[str, typer.Option(help="Where Flower answers.")] = "http://127.0.0.1:5555",
    web: Annotated[
        str | None, typer.Option(help="Where `web` answers, best as Quiltt sees it; default: this host.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at everything payready stands on, and say what to do; status 1 if anything is at fault."""
    with report_errors():
        findings = doctor.run_checks(settings(), build_runtime(settings()), flower, web)
        found = list(findings if as_json else map(_print_check_results, findings))
        if as_json:
            typer.echo(render.as_json(found))
    if any(diagnosis.severity == doctor_results.Severity.ERROR for diagnosis in found):
        raise typer.Exit(EXIT_FAILED)


def _print_check_results(diagnosis: doctor_results.CheckResult) -> doctor_results.CheckResult:
    stdout_console().print(render_payments.check_result_table(diagnosis), highlight=False, soft_wrap=True)
    return diagnosis


@app.command("replay")
def redeliver_payment(payment_id: str, as_json: AsJson = False) -> None:
    """Have a settled payment's outcome delivered again: the same outcome, with the same task ids."""
    with report_errors():
        task_ids = flow.redeliver(build_runtime(settings()), payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "tasks": task_ids}))
    if not task_ids:
        fail(f"{payment_id} has no outcome to deliver: it waits, or is not known")
    elif not as_json:
        typer.echo(f"{payment_id}: {', '.join(task_ids)} will be told again within seconds, by `worker`")


@payment_app.command("enqueue")
def enqueue_payment(
    account_id: Annotated[str, typer.Argument(help="Quiltt's id of the payer's account.")],
    amount: Annotated[str | None, typer.Option(help="Decimal, such as 25.00; without it no funds are checked.")] = None,
    payment_id: Annotated[str | None, typer.Option("--id", help="Your id of the payment; default: a new one.")] = None,
    timeout_s: Annotated[int | None, typer.Option(help="How long to wait for the balance.")] = None,
    max_balance_age_s: Annotated[int | None, typer.Option(help="How old a balance may be.")] = None,
    funds_check: Annotated[FundsCheck | None, typer.Option(help="Whether the balance must cover the amount.")] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object, handed back with the outcome.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the outcome; status 3 if the payment must not start.")] = False,
    as_json: AsJson = False,
) -> None:
    """Enqueue a payment-initiation job."""
    given = {
        "account_id": account_id,
        "amount": amount,
        "payment_id": payment_id or f"pay_{uuid.uuid4().hex}",
        "timeout_s": timeout_s,
        "max_balance_age_s": max_balance_age_s,
        "funds_check": funds_check,
        "metadata": _json_object(metadata),
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    with report_errors():
        job = parse_job(arguments, currency=settings().currency)
        wait_s = job.timeout_s + celery_client.RESPONSE_TIMEOUT_S if wait else None
        try:
            answer = celery_client.enqueue(settings(), celery_client.job_arguments(job), wait_s=wait_s)
        except PaymentNotReady as not_ready:
            _print_not_ready(job.payment_id, not_ready, as_json=as_json)
        else:
            _print_enqueued(job.payment_id, answer, waited=wait, as_json=as_json)


def _json_object(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        raise typer.BadParameter("must be JSON", param_hint="--metadata") from None


def _print_enqueued(payment_id: str, answer: Any, *, waited: bool, as_json: bool) -> None:
    if waited:
        typer.echo(render.as_json(answer) if as_json else _print_released(answer))
    elif as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "task_id": answer}))
    else:
        typer.echo(f"{payment_id} enqueued as task {answer}; see: payready payment show {payment_id}")


def _print_released(outcome: dict[str, Any]) -> str:
    fee = outcome["fee"]
    waited = f"after {outcome['waited_ms'] / 1000:.1f} s, fee {fee['amount']} {fee['currency']} {fee['state']}"
    return f"{outcome['payment_id']} released: {outcome['verdict']}, {waited}"


def _print_not_ready(payment_id: str, error: PaymentNotReady, *, as_json: bool) -> None:
    if as_json:
        told = {"payment_id": payment_id, "state": "failed", "reason": error.reason, "detail": error.detail}
        typer.echo(render.as_json(told))
        raise typer.Exit(EXIT_NOT_READY)
    fail(f"{payment_id} is not ready: {error.reason}: {error.detail}", EXIT_NOT_READY)


@payment_app.command("show")
def show_payment(payment_id: str, as_json: AsJson = False) -> None:
    """Everything that is known of one payment: job, refresh, calls, fees, balance, verdict, deliveries."""
    found = query(lambda tx: payment_report.payment_timeline(tx, payment_id))
    if found is None:
        fail(f"the ledger has no payment {payment_id}")
    elif as_json:
        typer.echo(render.as_json(found))
    else:
        stdout_console().print(render_payments.payment_timeline(found, utc_now()), highlight=False, soft_wrap=True)


@payment_app.command("list")
def list_payments(
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Payments, the last requested first."""
    lines = query(lambda tx: payment_report.list_payments(tx, state=state, limit=limit))
    if as_json:
        typer.echo(render.as_json(lines))
    else:
        stdout_console().print(render_payments.payment_table(lines, utc_now()), highlight=False)


@payment_app.command("cancel")
def cancel_payment(payment_id: str, as_json: AsJson = False) -> None:
    """Fail a waiting payment as cancelled."""
    with report_errors():
        cancelled = celery_client.cancel(settings(), payment_id)
    if as_json:
        typer.echo(render.as_json({"payment_id": payment_id, "cancelled": cancelled}))
    elif cancelled:
        typer.echo(f"{payment_id} is cancelled")
    if not cancelled:
        fail(f"{payment_id} was not cancelled: it was settled before, or is not known")


if __name__ == "__main__":
    app()
