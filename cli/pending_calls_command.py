"""`payready fees pending`: calls that only an invoice can post or void."""

from datetime import timedelta
from typing import Annotated

import typer

from cli import fee_tables, render
from cli.command_line import AsJson, query_or_exit, stdout_console_for_terminal_or_log
from config.clock import utc_now
from worker.ledger import fee_calls


def fees_pending(
    age_h: Annotated[int, typer.Option(min=0, max=87_600, help="Minimum age of a call in hours.")] = 24,
    as_json: AsJson = False,
) -> None:
    """List calls that have been pending for --age-h or longer. Only an invoice can post or void them."""
    calls = query_or_exit(lambda tx: fee_calls.pending_calls(tx, utc_now() - timedelta(hours=age_h)))
    if as_json:
        typer.echo(render.as_json(calls))
    else:
        title = f"Calls pending for {age_h} h or longer"
        stdout_console_for_terminal_or_log().print(fee_tables.limited_pending_table(calls, title), highlight=False)
