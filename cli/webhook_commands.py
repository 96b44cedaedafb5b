"""Commands about the webhook: events in quarantine, and the subscription at the provider."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from cli import celery_client, render
from cli.command_line import AsJson, fail, query, report_errors, stdout_console
from config.settings import ConfigurationError, settings
from webhook import events
from worker import flow, runtime
from worker.ledger import quarantine
from worker.ledger.engine import read_only, transaction
from worker.ledger.quarantine import QuarantinedEvent
from worker.quiltt import subscriptions
from worker.quiltt.subscriptions import Subscription, SubscriptionsClient
from worker.runtime import Runtime

quarantine_app = typer.Typer(no_args_is_help=True, help="Events that were rightly signed and could not be understood.")
webhooks_app = typer.Typer(no_args_is_help=True, help="The subscription by which the provider delivers to us.")

QuarantineId = Annotated[str, typer.Argument(help="As `list` shows it.")]
QuarantineIds = Annotated[list[str] | None, typer.Argument(help="As `list` shows them.")]
AllEvents = Annotated[bool, typer.Option("--all", help="Every one there is.")]
PAGE_SIZE = 200
T = TypeVar("T")


# --- quarantine -------------------------------------------------------------------------------------------------------


@quarantine_app.command("list")
def list_quarantined(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Events in quarantine, the last that came first; without what is in them."""
    found = query(lambda tx: quarantine.newest_events(tx, limit))
    if as_json:
        typer.echo(render.as_json([_summary(kept) for kept in found]))
        return
    table = Table("event", "came", "bytes", "reason", box=None, pad_edge=False, header_style="dim")
    for kept in found:
        table.add_row(kept.quarantine_id, f"{kept.received_at:%Y-%m-%d %H:%M:%S}Z", str(len(kept.event)), kept.reason)
    stdout_console().print(table if found else "the quarantine is empty", highlight=False, markup=False)


@quarantine_app.command("show")
def show_quarantined(quarantine_id: QuarantineId, as_json: AsJson = False) -> None:
    """One event, whole, and why it was set aside."""
    kept = query(lambda tx: quarantine.find(tx, quarantine_id))
    if kept is None:
        fail(f"there is no {quarantine_id} in quarantine")
    if as_json:
        typer.echo(render.as_json({**_summary(kept), "event": kept.event.decode(errors="backslashreplace")}))
    else:
        typer.echo(f"{kept.quarantine_id} came {kept.received_at:%Y-%m-%d %H:%M:%S}Z: {kept.reason}\n")
        typer.echo(_printable_text(kept.event))


@quarantine_app.command("replay")
def replay_quarantined(ids: QuarantineIds = None, all_events: AllEvents = False, as_json: AsJson = False) -> None:
    """Read events again, by the rules of this version: who waits for one that is understood now is settled by it.

    What is still not understood stays. To be used after an upgrade.
    """
    counts = {"taken": 0, "not_ours": 0, "still_odd": 0}
    with report_errors():
        rt = runtime.build_runtime(settings())
        try:
            for kept in _select(rt, ids, all_events=all_events):
                counts[_replay_one(rt, kept)] += 1
        finally:
            rt.engine.dispose()
    if as_json:
        typer.echo(render.as_json(counts))
    else:
        typer.echo(
            f"{counts['taken']} taken, {counts['not_ours']} not ours, {counts['still_odd']} still not understood"
        )


@quarantine_app.command("drop")
def delete_quarantined(ids: QuarantineIds = None, all_events: AllEvents = False, as_json: AsJson = False) -> None:
    """Remove events for good."""
    with report_errors():
        rt = runtime.build_runtime(settings())
        try:
            dropped = sum(_delete_one(rt, kept) for kept in _select(rt, ids, all_events=all_events))
        finally:
            rt.engine.dispose()
    typer.echo(render.as_json({"dropped": dropped}) if as_json else f"{dropped} dropped")


def _summary(kept: QuarantinedEvent) -> dict[str, Any]:
    told = {"quarantine_id": kept.quarantine_id, "received_at": kept.received_at}
    return {**told, "bytes": len(kept.event), "reason": kept.reason}


def _printable_text(raw: bytes) -> str:
    """What a terminal shows, and does not obey."""
    text = raw.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _select(rt: Runtime, ids: list[str] | None, *, all_events: bool) -> Iterator[QuarantinedEvent]:
    """The events that are meant, each read when its turn has come."""
    if bool(ids) == all_events:
        raise typer.BadParameter("name events, or give --all")
    for quarantine_id in ids or ():
        with read_only(rt.engine) as tx:
            kept = quarantine.find(tx, quarantine_id)
        if kept is None:
            fail(f"there is no {quarantine_id} in quarantine")
        yield kept
    page: list[QuarantinedEvent] = []
    while all_events and (page := _page(rt, page[-1].quarantine_id if page else "")):
        yield from page


def _page(rt: Runtime, after: str) -> list[QuarantinedEvent]:
    with read_only(rt.engine) as tx:
        return quarantine.events_after(tx, after_id=after, limit=PAGE_SIZE)


def _replay_one(rt: Runtime, kept: QuarantinedEvent) -> str:
    try:
        found = events.parse_quarantined(kept.event, kept.received_at)
    except events.UnparseableEvent:
        return "still_odd"
    todo = flow.requeue_from_quarantine(rt, kept, found.balances)  # what else a whole delivery tells is old news by now
    try:
        celery_client.enqueue_apply(settings(), todo.balances_to_apply)
    except celery_client.NoWorkerResponse as away:
        typer.echo(f"payready: {away}; the balance is kept, and will be applied by the sweep", err=True)
    return "taken" if found.balances else "not_ours"


def _delete_one(rt: Runtime, kept: QuarantinedEvent) -> int:
    with transaction(rt.engine) as tx:
        return quarantine.delete_events(tx, [kept.quarantine_id])


# --- subscription -----------------------------------------------------------------------------------------------------


@webhooks_app.command("status")
def subscription_status(as_json: AsJson = False) -> None:
    """Whether the provider delivers to us what we need; status 1 if it does not."""
    with _subscriptions_client() as (provider, url):
        found = provider.list_all()
    ours, wrong = subscriptions.for_url(found, url), subscriptions.problems(found, url)
    if as_json:
        typer.echo(render.as_json({"url": url, "flaws": wrong, "subscriptions": [one.model_dump() for one in ours]}))
    else:
        for one in ours:
            typer.echo(f"{one.id} {'disabled' if one.disabled else 'enabled'}, {len(one.event_types)} event types")
        typer.echo("\n".join(wrong) if wrong else f"{url} is subscribed to all that is needed")
    if wrong:
        raise typer.Exit(1)


@webhooks_app.command("subscribe")
def subscribe(
    additional: Annotated[
        bool, typer.Option("--another", help="Make one more beside those there are: to rotate the secret.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """See to it that there is a subscription that does: mend the one there is, or make one."""
    with _subscriptions_client() as (provider, url):
        ours = subscriptions.for_url(provider.list_all(), url)
        if additional or not ours:
            done, one = "made", provider.create(url)
        elif ours[0].problems():
            done, one = "mended", provider.repair(ours[0])
        else:
            done, one = "left as it was", ours[0]
    if as_json:
        typer.echo(render.as_json({"done": done, "subscription": one.model_dump()}))
    else:
        typer.echo(f"{one.id} was {done}")
        if done == "made":
            typer.echo("the provider's dashboard shows its secret: put it into PAYREADY_WEBHOOK_SECRETS")


@webhooks_app.command("unsubscribe")
def unsubscribe(
    subscription_id: Annotated[str | None, typer.Argument(help="Needed if there are several.")] = None,
    disable: Annotated[bool, typer.Option("--disable", help="Keep it, disabled: it can be enabled again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have the provider deliver nothing more by a subscription to our address."""
    with _subscriptions_client() as (provider, url):
        one = _find_subscription(subscriptions.for_url(provider.list_all(), url), url, subscription_id)
        if disable:
            provider.update(one, disabled=True)
        else:
            provider.delete(one)
    done = "disabled" if disable else "deleted"
    typer.echo(render.as_json({"done": done, "id": one.id}) if as_json else f"{one.id} is {done}")


@contextmanager
def _subscriptions_client() -> Iterator[tuple[SubscriptionsClient, str]]:
    with report_errors():
        url = settings().webhook_url
        if url is None:
            raise ConfigurationError("set PAYREADY_WEBHOOK_URL to the public https address of the webhook endpoint")
        with runtime.subscriptions_client(settings()) as provider:
            yield provider, url


def _find_subscription(ours: list[Subscription], url: str, subscription_id: str | None) -> Subscription:
    chosen = [one for one in ours if subscription_id in (None, one.id)]
    if not chosen:
        fail(f"there is no subscription {subscription_id or ''} to {url}")
    if len(chosen) > 1:
        fail(f"there are several to {url}, name one: {', '.join(one.id for one in chosen)}")
    return chosen[0]
