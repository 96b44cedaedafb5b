"""`payready dead-letters list`. It imports neither Celery nor the clients of Redis and Quiltt."""

from typing import Annotated

import typer

from cli import render
from cli.command_line import AsJson, query_or_exit, stdout_console_for_terminal_or_log
from worker.ledger import dead_letters
from worker.rules.times import utc_time_text


def list_dead_letters(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number of dead letters.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List dead letters without their messages, the newest first."""
    found = query_or_exit(lambda tx: dead_letters.newest(tx, limit))
    if as_json:
        typer.echo(render.as_json(found))
        return
    table = render.new_table("dead letter", "stored", "queue", "bytes", "task", "reason", right=["bytes"])
    for letter in found:
        stored_at = utc_time_text(letter.stored_at)
        reason = f"{letter.reason}: {letter.detail}"
        table.add_row(
            letter.dead_letter_id, stored_at, letter.queue, str(letter.size_bytes), letter.task_name or "", reason
        )
    stdout_console_for_terminal_or_log().print(
        table if found else "there are no dead letters", highlight=False, markup=False
    )
