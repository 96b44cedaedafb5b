"""Commands about the webhook: quarantined events, and the subscription at the provider."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer

from cli import render
from cli.command_line import (
    EXIT_FAILED,
    AsJson,
    echo_line,
    fail,
    query_or_exit,
    report_errors,
    stdout_console_for_terminal_or_log,
)
from cli.command_runtime import runtime_or_exit
from cli.webhook_probe import find_problem_by_test_delivery
from config.escaping import escape_unprintable
from config.role_settings import require_in_production
from config.settings import ConfigurationError, settings
from webhook.quarantine_replay import ReplayResult, replay_only_balances
from worker import flow, runtime
from worker.ledger import quarantine
from worker.ledger.engine import read_snapshot
from worker.ledger.quarantine import QuarantinedEvent
from worker.quiltt import subscriptions
from worker.quiltt.subscriptions import Subscription, SubscriptionsClient
from worker.rules.decimals import count_text
from worker.rules.times import utc_time_text
from worker.runtime import Runtime

quarantine_app = typer.Typer(
    no_args_is_help=True, help="Webhook events with a valid signature that payready cannot parse."
)
webhooks_app = typer.Typer(no_args_is_help=True, help="The provider's subscription that delivers events to payready.")

QuarantineId = Annotated[str, typer.Argument(help="Id of an event, from `payready quarantine list`.")]
QuarantineIds = Annotated[list[str] | None, typer.Argument(help="Ids of events, from `payready quarantine list`.")]
AllEvents = Annotated[bool, typer.Option("--all", help="All events in quarantine.")]

# --- quarantine -------------------------------------------------------------------------------------------------------


@quarantine_app.command("list")
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


@quarantine_app.command("show")
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


@quarantine_app.command("replay")
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


@quarantine_app.command("delete")
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


def _summary(event: QuarantinedEvent) -> dict[str, Any]:
    return {
        "quarantine_id": event.quarantine_id,
        "received_at": event.received_at,
        "bytes": len(event.event),
        "reason": event.reason,
    }


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


# --- subscription -----------------------------------------------------------------------------------------------------


class SubscribeAction(StrEnum):
    """What `subscribe` did."""

    CREATED = "created"
    REPAIRED = "repaired"
    UNCHANGED = "unchanged"


@webhooks_app.command("status")
def subscription_status(as_json: AsJson = False) -> None:
    """Check the subscription and its address. Exit status 1 if there is a problem.

    The subscription must be enabled and have all required event types. The address must respond to a test delivery
    without events as `web` does.
    """
    with _subscriptions_client_and_url_or_exit() as (provider, url):
        subscribed = provider.list_all()
        unlike_web = find_problem_by_test_delivery(url, settings(), runtime.utc_now())
    ours = subscriptions.filter_by_url_fewest_problems_first(subscribed, url)
    problems = subscriptions.find_problems_of_best_subscription(subscribed, url)
    if unlike_web is not None:
        problems.append(f"{unlike_web.message}: {unlike_web.fix}")
    if as_json:
        listed = [subscription.model_dump() for subscription in ours]
        typer.echo(render.as_json({"url": url, "problems": problems, "subscriptions": listed}))
    else:
        for subscription in ours:
            state = "disabled" if subscription.disabled else "enabled"
            types = count_text(len(subscription.event_types), "event type")
            echo_line(f"{subscription.id}: {state}, {types}")
        for line in problems or [f"{url} responds, and receives all required event types"]:
            echo_line(line)
    if problems:
        raise typer.Exit(EXIT_FAILED)


@webhooks_app.command("subscribe")
def subscribe(
    additional: Annotated[
        bool, typer.Option("--additional", help="Create another subscription, to rotate the webhook secret.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create the subscription, or repair the existing one: enable it and add missing event types."""
    with _subscriptions_client_and_url_or_exit() as (provider, url):
        ours = subscriptions.filter_by_url_fewest_problems_first(provider.list_all(), url)
        if additional or not ours:
            action, subscription = SubscribeAction.CREATED, provider.create(url)
        elif ours[0].describe_disabled_and_missing_events():
            action, subscription = SubscribeAction.REPAIRED, provider.enable_and_add_missing_events(ours[0])
        else:
            action, subscription = SubscribeAction.UNCHANGED, ours[0]
    if as_json:
        typer.echo(render.as_json({"action": action, "subscription": subscription.model_dump()}))
    else:
        echo_line(f"{subscription.id}: {action.value}")
        if action == SubscribeAction.CREATED:
            typer.echo("Copy its secret from the provider's dashboard to PAYREADY_WEBHOOK_SECRETS and restart `web`.")


@webhooks_app.command("unsubscribe")
def unsubscribe(
    subscription_id: Annotated[str | None, typer.Argument(help="Required if there are several.")] = None,
    disable: Annotated[bool, typer.Option("--disable", help="Disable the subscription, do not delete it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete or disable a subscription: the provider stops its deliveries."""
    with _subscriptions_client_and_url_or_exit() as (provider, url):
        subscription = _single_subscription_or_exit(
            subscriptions.filter_by_url_fewest_problems_first(provider.list_all(), url), url, subscription_id
        )
        if disable:
            provider.update(subscription, disabled=True)
        else:
            provider.delete(subscription)
    action = "disabled" if disable else "deleted"
    if as_json:
        typer.echo(render.as_json({"action": action, "id": subscription.id}))
    else:
        echo_line(f"{subscription.id}: {action}")


@contextmanager
def _subscriptions_client_and_url_or_exit() -> Iterator[tuple[SubscriptionsClient, str]]:
    with report_errors():
        url = settings().webhook_url
        if url is None:
            raise ConfigurationError("set PAYREADY_WEBHOOK_URL to the public https address of the webhook endpoint")
        require_in_production(settings(), "quiltt_api_key")
        with runtime.subscriptions_client(settings()) as provider:
            yield provider, url


def _single_subscription_or_exit(ours: list[Subscription], url: str, subscription_id: str | None) -> Subscription:
    chosen = [subscription for subscription in ours if subscription_id in (None, subscription.id)]
    if not chosen:
        named = f"subscription {subscription_id}" if subscription_id else "subscription"
        fail(f"no {named} to {url}")
    if len(chosen) > 1:
        fail(f"several subscriptions to {url}; give the id of one: {', '.join(one.id for one in chosen)}")
    return chosen[0]
