"""The group `payready fees`: statements, reconciliation with the provider's invoice, pending calls."""

from typing import ClassVar

import typer

from cli.lazy_commands import LazyCommand, LazyGroup


class FeeCommands(LazyGroup):
    """The commands about fees. A statement needs nothing of the reconciliation."""

    table: ClassVar = {
        "statement": LazyCommand(
            module="cli.statement_commands",
            attribute="fees_statement",
            summary="Print the fees of a month's calls, and the savings by sharing and reuse.",
        ),
        "reconcile": LazyCommand(
            module="cli.reconcile_commands",
            attribute="fees_reconcile",
            summary="Compare an invoice with the calls of its month: matches, differences, and their possible causes.",
            command_class="ReconcileCommand",
        ),
        "pending": LazyCommand(
            module="cli.pending_calls_command",
            attribute="fees_pending",
            summary="List calls that have been pending for --age-h or longer. Only an invoice can post or void them.",
        ),
    }


app = typer.Typer(
    cls=FeeCommands,
    no_args_is_help=True,
    help="Fees of the provider's calls: statement, reconciliation, pending calls.",
)
