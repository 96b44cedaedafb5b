"""The group `payready quarantine`: events that payready cannot parse."""

from typing import ClassVar

import typer

from cli.lazy_commands import LazyCommand, LazyGroup


class QuarantineCommands(LazyGroup):
    """The commands about quarantined events. Those that read need no clients."""

    table: ClassVar = {
        "list": LazyCommand(
            module="cli.quarantine_reports",
            attribute="list_quarantined",
            summary="List quarantined events without their content, the newest first.",
        ),
        "show": LazyCommand(
            module="cli.quarantine_reports",
            attribute="show_quarantined",
            summary="Print one quarantined event with its content and the reason.",
        ),
        "replay": LazyCommand(
            module="cli.quarantine_actions",
            attribute="replay_quarantined",
            summary="Parse quarantined events again with this version, and apply their balances to waiting payments.",
        ),
        "delete": LazyCommand(
            module="cli.quarantine_actions",
            attribute="delete_quarantined",
            summary="Delete quarantined events permanently. With --all, ask for confirmation first.",
        ),
    }


app = typer.Typer(
    cls=QuarantineCommands,
    no_args_is_help=True,
    help="Webhook events with a valid signature that payready cannot parse.",
)
