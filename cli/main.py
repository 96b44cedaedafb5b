"""The command `payready`. Each command parses its options, calls one use case or query, and prints the result."""

from typing import Annotated, ClassVar

import typer

from cli.lazy_commands import LazyCommand, LazyGroup
from config.version import payready_version


class PaymentCommands(LazyGroup):
    """The group `payready payment`."""

    table: ClassVar = {
        "enqueue": LazyCommand(
            module="cli.payment_actions",
            attribute="enqueue_payment",
            summary="Enqueue a job for a payment, in the currency of PAYREADY_CURRENCY.",
        ),
        "show": LazyCommand(
            module="cli.payment_reports",
            attribute="show_payment",
            summary="Print one payment: what happened, which party must act, and its whole history.",
        ),
        "list": LazyCommand(
            module="cli.payment_reports", attribute="list_payments", summary="Search payments, the newest first."
        ),
        "watch": LazyCommand(
            module="cli.payment_reports",
            attribute="watch_payment",
            summary="Follow one payment until it is resolved. Exit status 3 if it fails.",
        ),
        "cancel": LazyCommand(
            module="cli.payment_actions",
            attribute="cancel_payment",
            summary="Fail a waiting payment with the reason `cancelled`.",
        ),
        "redeliver": LazyCommand(
            module="cli.payment_actions",
            attribute="redeliver_payment",
            summary="Deliver the outcome of a resolved payment again, with the same task ids.",
        ),
        "end-hold": LazyCommand(
            module="cli.payment_actions",
            attribute="end_funds_hold",
            summary="End the funds hold of a released payment: its debit shows in the balance, or will not be made.",
        ),
    }


class RootCommands(LazyGroup):
    """The commands of `payready`."""

    table: ClassVar = {
        "demo": LazyCommand(
            module="cli.stack_commands",
            attribute="demo_command",
            summary="Run 31 jobs in 17 scenarios through all roles on this machine and check the results.",
        ),
        "up": LazyCommand(
            module="cli.stack_commands",
            attribute="up_command",
            summary="Run payready on this machine against a simulator of Quiltt, until Ctrl-C.",
        ),
        "doctor": LazyCommand(
            module="cli.doctor_command",
            attribute="doctor_command",
            summary="Check all dependencies and print how to fix problems. Exit status 1 if a check fails.",
        ),
        "reconcile-after-failover": LazyCommand(
            module="cli.failover_commands",
            attribute="reconcile_after_failover",
            summary="Compare ledger, Redis and provider after PostgreSQL lost its last commits. "
            "Print what a person must decide.",
        ),
        "fees": LazyCommand(
            module="cli.fee_commands",
            attribute="app",
            summary="Fees of the provider's calls: statement, reconciliation, pending calls.",
        ),
        "archive": LazyCommand(
            module="cli.archive_commands",
            attribute="app",
            summary="Archive closed months in files, check the files, restore a month.",
        ),
        "dashboard-user": LazyCommand(
            module="cli.dashboard_user_command",
            attribute="dashboard_user",
            summary="Print a line for PAYREADY_DASHBOARD_USERS or its file: "
            "the name, the role, and a hash of the password.",
        ),
        "dead-letters": LazyCommand(
            module="cli.dead_letter_commands",
            attribute="app",
            summary="Messages of payready's queues that no worker can process.",
        ),
        "quarantine": LazyCommand(
            module="cli.quarantine_commands",
            attribute="app",
            summary="Webhook events with a valid signature that payready cannot parse.",
        ),
        "webhooks": LazyCommand(
            module="cli.webhook_commands",
            attribute="app",
            summary="The provider's subscription that delivers events to payready.",
        ),
    }


app = typer.Typer(
    cls=RootCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Release bank payments only after a fresh balance has been checked. Run payready on this machine, inspect it, "
    "operate it.",
)
app.add_typer(
    typer.Typer(
        cls=PaymentCommands,
        no_args_is_help=True,
        help="Payments: enqueue, show, list, watch, cancel, redeliver, end-hold.",
    ),
    name="payment",
)


def _print_version_and_exit(is_requested: bool) -> None:  # noqa: FBT001 - typer calls it
    if is_requested:
        typer.echo(f"payready {payready_version()}")
        raise typer.Exit


@app.callback()
def payready(
    is_version_requested: Annotated[
        bool,
        typer.Option("--version", callback=_print_version_and_exit, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options of `payready` itself. They end the command."""


if __name__ == "__main__":
    app()
