"""Commands that change quarantined events: replay, delete."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cli import render
from cli.command_line import AsJson, fail
from cli.command_runtime import runtime_or_exit
from webhook.quarantine_replay import ReplayResult, replay_only_balances
from worker import flow
from worker.ledger import quarantine
from worker.ledger.engine import read_snapshot
from worker.ledger.quarantine import QuarantinedEvent
from worker.rules.decimals import count_text
from worker.runtime import Runtime

QuarantineIds = Annotated[list[str] | None, typer.Argument(help="Ids of events, from `payready quarantine list`.")]
AllEvents = Annotated[bool, typer.Option("--all", help="All events in quarantine.")]


def replay_quarantined(ids: QuarantineIds = None, all_events: AllEvents = False, as_json: AsJson = False) -> None:
    """Parse quarantined events again with this version, and apply their balances to waiting payments.

    Events that this version cannot parse stay in quarantine. Use it after an upgrade.
    """
    counts = Counter(dict.fromkeys(ReplayResult, 0))
    with _selected_events(ids, all_events=all_events) as (rt, selected):
        for event in selected:
            replay = replay_only_balances(rt, event)
            counts[replay.result] += 1
            if replay.problem is not None:
                typer.echo(f"payready: {replay.problem}; the balance is stored and the sweep will apply it", err=True)
    if as_json:
        typer.echo(render.as_json({result.value: count for result, count in counts.items()}))
    else:
        typer.echo(", ".join(f"{result.replace('_', ' ')} {count}" for result, count in counts.items()))


def delete_quarantined(
    ids: QuarantineIds = None,
    all_events: AllEvents = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all, delete without confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete quarantined events permanently. With --all, ask for confirmation first."""
    with _selected_events(ids, all_events=all_events) as (rt, selected):
        if all_events and not yes:
            typer.confirm("Delete all quarantined events permanently?", abort=True, err=True)
        deleted = sum(flow.delete_quarantined(rt, [event.quarantine_id]) for event in selected)
    typer.echo(render.as_json({"deleted": deleted}) if as_json else f"deleted {count_text(deleted, 'event')}")


@contextmanager
def _selected_events(
    ids: list[str] | None, *, all_events: bool
) -> Iterator[tuple[Runtime, Iterator[QuarantinedEvent]]]:
    """Open a runtime, and iterate over the events with these ids or over all."""
    if bool(ids) == all_events:
        raise typer.BadParameter("give either the ids of events or --all")
    with runtime_or_exit() as rt:
        yield rt, flow.every_quarantined_event(rt) if all_events else _events_by_id_or_exit(rt, ids or [])


def _events_by_id_or_exit(rt: Runtime, ids: list[str]) -> Iterator[QuarantinedEvent]:
    for quarantine_id in ids:
        with read_snapshot(rt.engine) as tx:
            event = quarantine.find(tx, quarantine_id)
        if event is None:
            fail(f"no event {quarantine_id} in quarantine")
        yield event
