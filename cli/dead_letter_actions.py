"""Commands that read and change single dead letters: show, requeue, delete. They decode messages as the broker does."""

from collections.abc import Iterable
from typing import Annotated

import typer

from cli import render
from cli.command_line import (
    EXIT_FAILED,
    AsJson,
    fail,
    query_or_exit,
)
from cli.command_runtime import runtime_or_exit
from config.escaping import escape_unprintable
from config.settings import settings
from tasks.message_requeue import NotRequeueable, decoded_message_and_body, open_message_sender, send_then_delete
from worker import flow
from worker.ledger import dead_letters
from worker.ledger.dead_letters import DeadLetter
from worker.rules.decimals import count_text
from worker.rules.times import utc_time_text
from worker.rules.unhandled_messages import DeadLetterReason

DeadLetterIds = Annotated[
    list[str] | None, typer.Argument(help="Ids of dead letters, from `payready dead-letters list`.")
]


def show_dead_letter(
    dead_letter_id: Annotated[str, typer.Argument(help="Id of a dead letter, from `payready dead-letters list`.")],
    as_json: AsJson = False,
) -> None:
    """Print one dead letter with the reason and its message. The message may be confidential."""
    letter = query_or_exit(lambda tx: dead_letters.find_letter(tx, dead_letter_id))
    if letter is None:
        fail(f"there is no dead letter {dead_letter_id}")
    message, body = decoded_message_and_body(letter)
    if as_json:
        summary = {name: value for name, value in vars(letter).items() if name != "message"}
        typer.echo(render.as_json({**summary, "is_cut": letter.is_cut, "message": message, "body": body}))
        return
    times = "" if letter.occurrences == 1 else f", {letter.occurrences} times"
    typer.echo(f"{letter.dead_letter_id}, stored {utc_time_text(letter.stored_at)}{times}")
    typer.echo(f"queue {letter.queue}, task {letter.task_name or 'unknown'}, task id {letter.task_id or 'unknown'}")
    typer.echo(f"{letter.reason}: {letter.detail}\n")
    typer.echo(f"message, {_size_text(letter)}:")
    typer.echo(escape_unprintable(message, keep="\n"))
    if body is not None:
        typer.echo("\nbody, decoded:")
        typer.echo(escape_unprintable(body, keep="\n"))


def _size_text(letter: DeadLetter) -> str:
    size = count_text(letter.size_bytes, "byte")
    return f"the first {len(letter.message)} of {size} (it cannot be requeued)" if letter.is_cut else size


def requeue_dead_letters(
    ids: DeadLetterIds = None,
    all_of_reason: Annotated[
        DeadLetterReason | None, typer.Option(help="All dead letters with this reason, each once.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send dead letters to their queues again, and delete each after the broker has accepted it.

    A dead letter that cannot be requeued stays. Exit status 1 if there is one.
    """
    if bool(ids) == (all_of_reason is not None):
        raise typer.BadParameter("give either ids of dead letters or --all-of-reason")
    requeued, refused = 0, list[dict[str, str]]()
    with runtime_or_exit() as rt, open_message_sender(settings()) as sender:
        for dead_letter_id in ids or flow.every_dead_letter_id(rt, all_of_reason):
            try:
                send_then_delete(rt, sender, dead_letter_id)
                requeued += 1
            except NotRequeueable as error:
                refused.append({"dead_letter_id": dead_letter_id, "error": str(error)})
    if as_json:
        typer.echo(render.as_json({"requeued": requeued, "refused": refused}))
    else:
        typer.echo(f"requeued {count_text(requeued, 'message')}")
        for line in refused:
            typer.echo(f"payready: {line['dead_letter_id']} was not requeued: {line['error']}", err=True)
    if refused:
        raise typer.Exit(EXIT_FAILED)


def delete_dead_letters(
    ids: DeadLetterIds = None,
    all_letters: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all, delete without confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters permanently. With --all, ask for confirmation first."""
    if bool(ids) == all_letters:
        raise typer.BadParameter("give either ids of dead letters or --all")
    with runtime_or_exit() as rt:
        if all_letters and not yes:
            typer.confirm("Delete all dead letters permanently?", abort=True, err=True)
        selected: Iterable[str] = flow.every_dead_letter_id(rt) if all_letters else ids or []
        deleted = sum(flow.delete_dead_letters(rt, [dead_letter_id]) for dead_letter_id in selected)
    if as_json:
        typer.echo(render.as_json({"deleted": deleted}))
    else:
        typer.echo(f"deleted {count_text(deleted, 'dead letter')}")
    if ids and deleted < len(set(ids)):
        fail(f"{count_text(len(set(ids)) - deleted, 'id')} did not exist")
