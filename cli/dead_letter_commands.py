"""The group `payready dead-letters`: messages that no worker can process."""

from typing import ClassVar

import typer

from cli.lazy_commands import LazyCommand, LazyGroup


class DeadLetterCommands(LazyGroup):
    """The commands about dead letters. A list needs neither Celery nor clients."""

    table: ClassVar = {
        "list": LazyCommand(
            module="cli.dead_letter_list",
            attribute="list_dead_letters",
            summary="List dead letters without their messages, the newest first.",
        ),
        "show": LazyCommand(
            module="cli.dead_letter_actions",
            attribute="show_dead_letter",
            summary="Print one dead letter with the reason and its message. The message may be confidential.",
        ),
        "requeue": LazyCommand(
            module="cli.dead_letter_actions",
            attribute="requeue_dead_letters",
            summary="Send dead letters to their queues again, and delete each after the broker has accepted it.",
        ),
        "delete": LazyCommand(
            module="cli.dead_letter_actions",
            attribute="delete_dead_letters",
            summary="Delete dead letters permanently. With --all, ask for confirmation first.",
        ),
    }


app = typer.Typer(
    cls=DeadLetterCommands,
    no_args_is_help=True,
    help="Messages of payready's queues that no worker can process.",
)
