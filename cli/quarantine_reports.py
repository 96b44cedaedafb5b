"""Commands that read quarantined events: list, show. They import neither Celery nor the clients of Redis and Quiltt."""

from typing import Annotated, Any

import typer

from cli import render
from cli.command_line import AsJson, echo_line, fail, query_or_exit, stdout_console_for_terminal_or_log
from config.escaping import escape_unprintable
from worker.ledger import quarantine
from worker.ledger.quarantine import QuarantinedEvent
from worker.rules.times import utc_time_text

QuarantineId = Annotated[str, typer.Argument(help="Id of an event, from `payready quarantine list`.")]


def list_quarantined(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number of events.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List quarantined events without their content, the newest first."""
    found = query_or_exit(lambda tx: quarantine.newest_events(tx, limit))
    if as_json:
        typer.echo(render.as_json([_summary(event) for event in found]))
        return
    table = render.new_table("event", "received", "bytes", "reason", right=["bytes"])
    for event in found:
        table.add_row(event.quarantine_id, utc_time_text(event.received_at), str(len(event.event)), event.reason)
    stdout_console_for_terminal_or_log().print(
        table if found else "the quarantine is empty", highlight=False, markup=False
    )


def show_quarantined(quarantine_id: QuarantineId, as_json: AsJson = False) -> None:
    """Print one quarantined event with its content and the reason."""
    event = query_or_exit(lambda tx: quarantine.find(tx, quarantine_id))
    if event is None:
        fail(f"no event {quarantine_id} in quarantine")
    if as_json:
        typer.echo(render.as_json({**_summary(event), "event": event.event.decode(errors="backslashreplace")}))
    else:
        echo_line(f"{event.quarantine_id}, received {utc_time_text(event.received_at)}: {event.reason}")
        typer.echo("\n" + escape_unprintable(event.event.decode(errors="backslashreplace"), keep="\n"))


def _summary(event: QuarantinedEvent) -> dict[str, Any]:
    return {
        "quarantine_id": event.quarantine_id,
        "received_at": event.received_at,
        "bytes": len(event.event),
        "reason": event.reason,
    }
