"""`payready reconcile-after-failover`: find and close what the ledger lost in a failover."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from celery import Celery

from cli import render
from cli.command_line import EXIT_FAILED, AsJson, echo_line
from cli.command_runtime import runtime_or_exit
from config.celery_config import celery_settings
from config.clock import utc_now
from config.settings import Settings
from tasks import stored_results
from tasks.celery_connection import report_unavailable
from tasks.celery_errors import CeleryUnavailable
from worker import flow
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.correlation.store import ACCOUNT_TTL_S
from worker.flow.failover_findings import Finding, FindingKind, StoredResult
from worker.rules.decimals import count_text


def reconcile_after_failover(
    since: Annotated[
        datetime | None,
        typer.Option(
            help="Time in UTC of the oldest commit that may be lost. Default: 2 h ago; Redis stores no older accounts.",
            formats=["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S"],
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Close what has one right answer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare ledger, Redis and provider after PostgreSQL lost its last commits. Print what a person must decide.

    Without --apply the command changes nothing. With it, payments get the outcome that was delivered, calls without a
    fee entry get a pending one, and tasks that would wait for ever fail. Exit status 1 if something is left to do.
    """
    start = since.replace(tzinfo=UTC) if since else utc_now() - timedelta(seconds=ACCOUNT_TTL_S)
    with runtime_or_exit() as rt, _results_app(rt.settings) as app:
        try:
            results = _read_results(app, as_json=as_json)
            found = flow.find_losses(rt, results, start)
            if apply:
                found = _close(app, flow.close_losses(rt, found, results))
        except REDIS_UNAVAILABLE as error:
            raise CeleryUnavailable(f"Redis did not respond: {error}; check PAYREADY_REDIS_URL") from None
    if as_json:
        typer.echo(render.as_json(found))
    else:
        _print_findings(found, applied=apply)
    if any(finding.decision or not finding.is_closed for finding in found):
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def _results_app(chosen: Settings) -> Iterator[Celery]:
    """Provide a Celery app for the result backend. It needs no broker."""
    with Celery("payready-cli", set_as_current=False) as app:
        app.conf.update(celery_settings(chosen))
        yield app


def _read_results(app: Celery, *, as_json: bool) -> list[StoredResult]:
    if stored_results.can_list(app):
        with report_unavailable():
            return list(stored_results.payment_results(app))
    if not as_json:
        echo_line("results are not compared: only a result backend on Redis can list them")
    return []


def _close(app: Celery, found: Sequence[Finding]) -> list[Finding]:
    """End the tasks of lost payments that are past their deadline. Return all findings."""
    lost = {finding.task_id for finding in found if finding.kind == FindingKind.LOST_PAYMENT and not finding.decision}
    task_ids = sorted(task_id for task_id in lost if task_id)
    with report_unavailable():
        stored_results.fail_lost_payments(app, task_ids)
    return [_ended(finding) if finding.task_id in lost else finding for finding in found]


def _ended(finding: Finding) -> Finding:
    return replace(finding, is_closed=True, decision="send its job again: its callbacks are lost")


def _print_findings(found: Sequence[Finding], *, applied: bool) -> None:
    for finding in found:
        names = [finding.payment_id, finding.account_id, finding.refresh_id, finding.balance_id, finding.task_id]
        subject = " ".join(name for name in names if name)
        echo_line(f"{finding.kind} {subject}: {finding.detail}; {_next_step(finding)}")
    closed = sum(finding.is_closed for finding in found)
    decisions = sum(finding.decision is not None for finding in found)
    if not found:
        echo_line("the ledger lacks nothing that Redis and the provider show")
    elif applied:
        echo_line(f"{count_text(len(found), 'finding')}: {closed} closed, {decisions} to decide")
    else:
        echo_line(
            f"{count_text(len(found), 'finding')}: --apply closes {len(found) - decisions}, {decisions} to decide"
        )


def _next_step(finding: Finding) -> str:
    if finding.is_closed:
        return f"closed; {finding.decision}" if finding.decision else "closed"
    return f"decide: {finding.decision}" if finding.decision else "--apply closes it"
