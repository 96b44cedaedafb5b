"""The group `payready webhooks`: the subscription at the provider."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from cli import render
from cli.command_line import (
    EXIT_FAILED,
    AsJson,
    echo_line,
    fail,
    report_errors,
)
from cli.webhook_probe import find_problem_by_test_delivery
from config.clock import utc_now
from config.role_settings import require_in_production
from config.settings import ConfigurationError, settings
from worker import runtime
from worker.quiltt import subscriptions
from worker.quiltt.subscriptions import Subscription, SubscriptionsClient
from worker.rules.decimals import count_text

app = typer.Typer(no_args_is_help=True, help="The provider's subscription that delivers events to payready.")


class SubscribeAction(StrEnum):
    """What `subscribe` did."""

    CREATED = "created"
    REPAIRED = "repaired"
    UNCHANGED = "unchanged"


@app.command("status")
def subscription_status(as_json: AsJson = False) -> None:
    """Check the subscription and its address. Exit status 1 if there is a problem.

    The subscription must be enabled and have all required event types. The address must respond to a test delivery
    without events as `web` does.
    """
    with _subscriptions_client_and_url_or_exit() as (provider, url):
        subscribed = provider.list_all()
        unlike_web = find_problem_by_test_delivery(url, settings(), utc_now())
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


@app.command("subscribe")
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


@app.command("unsubscribe")
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
