"""The command line. Each command translates, asks, and shows; what it shows is made elsewhere."""

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from config.settings import settings
from console import client, demo, door, show, up
from console.interrupts import Interrupted, Interrupts, interrupts
from console.terminal import AsJson, console, fail, plainly
from worker.errors import PaymentNotReady
from worker.ledger import reports
from worker.ledger.database import Tx, open_engine, reading
from worker.messages import parse_job
from worker.runtime import utc_now

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Payments that wait for a fresh balance: run payready on this machine, and look at what it does.",
)
payment_app = typer.Typer(no_args_is_help=True, help="Payments: enqueue, look at, cancel.")
fees_app = typer.Typer(no_args_is_help=True, help="What the provider's calls cost.")
app.add_typer(payment_app, name="payment")
app.add_typer(fees_app, name="fees")
app.add_typer(door.quarantine_app, name="quarantine")
app.add_typer(door.webhooks_app, name="webhooks")

NOT_READY = 3
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


def _run(play: Callable[[Console, Interrupts], int]) -> None:
    screen = console()
    with plainly(), interrupts() as signals:
        try:
            raise typer.Exit(play(screen, signals))
        except Interrupted as interrupted:
            screen.print(f"{interrupted}: stopped, nothing is left running")
            raise typer.Exit(interrupted.status) from None


@app.command("demo")
def demo_command() -> None:
    """Run every scenario through the real processes, and check that all comes out as promised."""
    _run(demo.demo)


@app.command("up")
def up_command() -> None:
    """Run payready on this machine, with a simulator in Quiltt's place, until Ctrl-C."""
    _run(up.up)


@payment_app.command("enqueue")
def enqueue(
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
        "metadata": _object(metadata),
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    with plainly():
        job = parse_job(arguments, currency=settings().currency)
        wait_s = job.timeout_s + client.ANSWER_S if wait else None
        try:
            answer = client.enqueue(settings(), client.as_arguments(job), wait_s=wait_s)
        except PaymentNotReady as not_ready:
            _say_not_ready(job.payment_id, not_ready, as_json=as_json)
        else:
            _say_enqueued(job.payment_id, answer, waited=wait, as_json=as_json)


def _object(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        raise typer.BadParameter("must be JSON", param_hint="--metadata") from None


def _say_enqueued(payment_id: str, answer: Any, *, waited: bool, as_json: bool) -> None:
    if waited:
        typer.echo(show.as_json(answer) if as_json else _released(answer))
    elif as_json:
        typer.echo(show.as_json({"payment_id": payment_id, "task_id": answer}))
    else:
        typer.echo(f"{payment_id} enqueued as task {answer}; see: payready payment show {payment_id}")


def _released(outcome: dict[str, Any]) -> str:
    fee = outcome["fee"]
    waited = f"after {outcome['waited_ms'] / 1000:.1f} s, fee {fee['amount']} {fee['currency']} {fee['state']}"
    return f"{outcome['payment_id']} released: {outcome['verdict']}, {waited}"


def _say_not_ready(payment_id: str, error: PaymentNotReady, *, as_json: bool) -> None:
    if as_json:
        told = {"payment_id": payment_id, "state": "failed", "reason": error.reason, "detail": error.detail}
        typer.echo(show.as_json(told))
        raise typer.Exit(NOT_READY)
    fail(f"{payment_id} is not ready: {error.reason}: {error.detail}", NOT_READY)


@payment_app.command("show")
def show_payment(payment_id: str, as_json: AsJson = False) -> None:
    """Everything that is known of one payment: job, refresh, calls, fees, balance, verdict, deliveries."""
    found = _ask(lambda tx: reports.timeline(tx, payment_id))
    if found is None:
        fail(f"the ledger has no payment {payment_id}")
    elif as_json:
        typer.echo(show.as_json(found))
    else:
        console().print(show.timeline(found, utc_now()), highlight=False, soft_wrap=True)


@payment_app.command("list")
def list_payments(
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Payments, the last requested first."""
    lines = _ask(lambda tx: reports.payments(tx, state=state, limit=limit))
    if as_json:
        typer.echo(show.as_json(lines))
    else:
        console().print(show.payments(lines, utc_now()), highlight=False)


@payment_app.command("cancel")
def cancel(payment_id: str, as_json: AsJson = False) -> None:
    """Fail a waiting payment as cancelled."""
    with plainly():
        cancelled = client.cancel(settings(), payment_id)
    if as_json:
        typer.echo(show.as_json({"payment_id": payment_id, "cancelled": cancelled}))
    elif cancelled:
        typer.echo(f"{payment_id} is cancelled")
    if not cancelled:
        fail(f"{payment_id} was not cancelled: it was settled before, or is not known")


@fees_app.command("statement")
def fees_statement(
    month: Annotated[str | None, typer.Option(help="As YYYY-MM, in UTC; default: this month.")] = None,
    as_json: AsJson = False,
) -> None:
    """What the calls of a month come to, as they stand now."""
    since, until = _month(month)
    charges = _ask(lambda tx: reports.statement(tx, since, until))
    title = f"Calls of {since:%Y-%m} (UTC)"
    if as_json:
        lines = [{**vars(charge), "amount": charge.amount} for charge in charges]
        typer.echo(show.as_json({"month": f"{since:%Y-%m}", "lines": lines, "totals": show.totals_of(charges)}))
    else:
        console().print(show.statement(charges, title), highlight=False)


def _month(text: str | None) -> tuple[datetime, datetime]:
    if text is None:
        text = f"{utc_now():%Y-%m}"
    match = re.fullmatch(r"([0-9]{4})-(0[1-9]|1[0-2])", text)
    if match is None or int(match[1]) in (0, 9999):
        raise typer.BadParameter("must be a month such as 2026-11", param_hint="--month")
    year, month = int(match[1]), int(match[2])
    following = (year + 1, 1) if month == 12 else (year, month + 1)  # noqa: PLR2004 - December
    return datetime(year, month, 1, tzinfo=UTC), datetime(*following, 1, tzinfo=UTC)


def _ask(question: Callable[[Tx], Any]) -> Any:
    """Ask the ledger, as it is at one moment."""
    with plainly():
        engine = open_engine(settings().database_url)
        try:
            with reading(engine) as tx:
                return question(tx)
        finally:
            engine.dispose()


if __name__ == "__main__":
    app()
