"""Checks of `payready doctor`: broker and workers, clocks, maintenance, Flower."""

import base64
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cli import celery_client, server_probes
from cli.celery_client import WorkerInfo
from cli.doctor_results import CheckContext, CheckResult, error, ok, warning
from config.celery_config import QUEUES, celery_settings
from config.task_queues import DEFAULT_CALLBACK_QUEUE, TASK_QUEUES
from tasks.celery_errors import CeleryUnavailable
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.ledger import dead_letters, metrics_queries, payment_report, schema
from worker.ledger.engine import DATABASE_UNAVAILABLE, read_snapshot
from worker.rules.callbacks import callbacks_of
from worker.rules.decimals import count_text
from worker.rules.times import utc_time_text

MIN_CLOCK_DRIFT = timedelta(seconds=1)
"""A smaller drift is not reported."""
MAX_CLOCK_SAMPLE = timedelta(seconds=2)
"""A round trip that takes longer says nothing about the clocks."""
CLOCK_SAMPLES = 3
"""Round trips for each clock; the fastest one counts. The first one may include the connection's setup."""
MAX_BACKLOG_AGE = timedelta(seconds=15)
"""A payment that waits longer than this after its deadline shows that maintenance does not run."""
MAX_DELIVERY_AGE = timedelta(seconds=60)
LONG_QUEUE = 1000
"""Messages. With more, the workers are too slow."""
CALLBACKS_LOOKBACK = timedelta(hours=1)
"""Callbacks are checked of waiting payments, and of payments that were resolved in this time."""
MAX_CONTINUATIONS = 1000
MAX_TASK_NAMES = 5
HTTP_TIMEOUT_S = 3
DEMO_LOGIN = "demo:demo"
SHARED_CELERY_SETTINGS = (
    "task_acks_late",
    "task_reject_on_worker_lost",
    "task_default_queue",
    "result_expires",
    "timezone",
)
"""Celery settings that must be equal in all roles. Otherwise messages are lost or processed twice."""


def check_broker_and_workers(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the broker responds, each queue has a worker, and all workers have the same settings."""
    try:
        workers = celery_client.responding_payready_workers(context.settings)
        described = server_probes.describe_broker(context.settings)
        yield ok("broker", f"{described}; {count_text(len(workers), 'worker')} of payready connected")
        yield from _check_queues_and_beat(context, workers)
        yield from _check_shared_celery_settings(context, workers)
    except CeleryUnavailable as unavailable:
        message = server_probes.no_response_text(context.settings.effective_broker_url, unavailable.problem)
        yield error("broker", message, "start it, or correct PAYREADY_BROKER_URL or PAYREADY_REDIS_URL")


def _check_queues_and_beat(context: CheckContext, workers: Sequence[WorkerInfo]) -> Iterator[CheckResult]:
    """Yield an error for each queue without a worker, the result on `beat`, and a warning for each long queue."""
    prefix = context.settings.name_prefix
    consumed = frozenset[str]().union(*(worker.queues for worker in workers))
    for queue in QUEUES:
        if f"{prefix}{queue}" not in consumed:
            message = f"no worker consumes the queue {prefix}{queue}"
            yield error("workers", message, f"start the role `{_role_of_queue(queue)}`")
    if f"{prefix}maintenance" in consumed:
        yield _check_beat(context, workers)
    for queue, length in celery_client.queue_lengths(context.settings).items():
        if length > LONG_QUEUE:
            waiting = f"{count_text(length, 'message')} in the queue {queue}"
            yield warning("queues", waiting, f"add replicas of `{_role_of_queue(queue.removeprefix(prefix))}`")


def _role_of_queue(queue: str) -> str:
    return "refresh" if queue == "refreshes" else "worker"


def _check_beat(context: CheckContext, workers: Sequence[WorkerInfo]) -> CheckResult:
    if celery_client.wait_and_count_ticks(context.settings, workers):
        return ok("beat", "ticks")
    return error("beat", f"no tick within {celery_client.TICK_OBSERVATION_S} s", "start the role `beat`")


def _check_shared_celery_settings(context: CheckContext, workers: Sequence[WorkerInfo]) -> Iterator[CheckResult]:
    """Yield an error for each worker whose `SHARED_CELERY_SETTINGS` differ from this release's."""
    expected = celery_settings(context.settings)
    for worker in workers:
        known = [name for name in SHARED_CELERY_SETTINGS if name in worker.settings]
        different = [name for name in known if worker.settings[name] != expected.get(name)]
        if different:
            message = f"{worker.name} has a different {', '.join(different)}"
            yield error("celery", message, "restart it with this release and these settings")


def check_dead_letters(context: CheckContext) -> Iterator[CheckResult]:
    """Warn if there are dead letters: each is a message that no worker can process."""
    try:
        with read_snapshot(context.rt.engine) as tx:
            count, newest = dead_letters.count(tx), dead_letters.newest(tx, 1)
    except DATABASE_UNAVAILABLE:
        return  # check_database reports it
    if not newest:
        yield ok("dead letters", "none")
    for letter in newest:
        message = (
            f"{count_text(count, 'message')} could not be processed; the newest, at {utc_time_text(letter.stored_at)} "
            f"from the queue {letter.queue}: {letter.reason} ({letter.detail})"
        )
        yield warning("dead letters", message, "run `payready dead-letters list`, then `requeue` or `delete` them")


# --- clocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClockSample:
    """A server's time and the round trip that returned it."""

    server_time: datetime
    sent_at: datetime
    round_trip: timedelta

    @property
    def least_drift(self) -> timedelta:
        """Least difference of the clocks that explains the sample. The server read its clock during the round trip."""
        half = self.round_trip / 2
        return max(timedelta(0), abs(self.server_time - (self.sent_at + half)) - half)


def check_clocks(context: CheckContext) -> Iterator[CheckResult]:
    """Compare the clocks of the database and Redis with this host's."""
    for server, read_clock in (("the database", _database_clock_unless_sqlite), ("Redis", _redis_clock)):
        try:
            sample = _fastest_sample(context, read_clock)
        except (*DATABASE_UNAVAILABLE, *REDIS_UNAVAILABLE):
            continue  # another check reports it
        if sample is not None:
            yield clock_result(context, server, sample)


def _fastest_sample(context: CheckContext, read_clock: Callable[[CheckContext], datetime | None]) -> ClockSample | None:
    samples = []
    for _ in range(CLOCK_SAMPLES):
        sent_at = context.rt.clock()
        server_time = read_clock(context)
        if server_time is None:
            return None
        round_trip = context.rt.clock() - sent_at
        samples.append(ClockSample(server_time=server_time, sent_at=sent_at, round_trip=round_trip))
    return min(samples, key=lambda sample: sample.round_trip)


def clock_result(context: CheckContext, server: str, sample: ClockSample) -> CheckResult:
    """Judge the drift: a warning above 1 s, an error above `clock_skew`. After a slow round trip, only warn."""
    if sample.round_trip > MAX_CLOCK_SAMPLE:
        seconds = sample.round_trip.total_seconds()
        message = f"not compared with {server}: a round trip took {seconds:.1f} s"
        return warning("clock", message, "run the doctor on a host nearer to the servers")
    message = f"differs by {sample.least_drift.total_seconds():.1f} s from the clock of {server}"
    if sample.least_drift > context.settings.clock_skew:
        return error("clock", message, "synchronise the hosts' clocks; PAYREADY_CLOCK_SKEW_S is the allowed difference")
    if sample.least_drift > MIN_CLOCK_DRIFT:
        return warning("clock", message, "synchronise the hosts' clocks")
    return ok("clock", message)


def _database_clock_unless_sqlite(context: CheckContext) -> datetime | None:
    with read_snapshot(context.rt.engine) as tx:
        return schema.server_time(tx)


def _redis_clock(context: CheckContext) -> datetime:
    return context.rt.redis_server.time()


# --- maintenance and Flower -------------------------------------------------------------------------------------------


def check_overdue_payments_and_deliveries(context: CheckContext) -> Iterator[CheckResult]:
    """Check that payments expire at their deadline and outcomes are delivered."""
    now = context.rt.clock()
    try:
        with read_snapshot(context.rt.engine) as tx:
            if schema.current_revision(tx) != schema.required_revision():
                return  # check_database reports it
            backlog = metrics_queries.backlog(tx)
    except DATABASE_UNAVAILABLE:
        return  # check_database reports it
    overdue = now - (backlog.first_deadline or now)
    if overdue > MAX_BACKLOG_AGE:
        message = f"a payment is still waiting {overdue.total_seconds():.0f} s after its deadline"
        fix = "check that `beat` and `worker` run, and search the log of `worker` for `maintenance.skipped`"
        yield error("maintenance", message, fix)
    else:
        yield ok("maintenance", f"{count_text(backlog.waiting_count, 'payment')} waiting, none past its deadline")
    undelivered, oldest = backlog.undelivered.count, now - (backlog.undelivered.oldest_at or now)
    if oldest > MAX_DELIVERY_AGE:
        message = f"{count_text(undelivered, 'outcome')} undelivered, the oldest for {oldest.total_seconds():.0f} s"
        yield error("maintenance", message, "search the log of `worker` for `outcome.delivery_failed`")
    yield from _undeliverable_results(backlog.undeliverable_count)


def _undeliverable_results(count: int) -> Iterator[CheckResult]:
    if count:
        message = f"the callbacks of {count_text(count, 'outcome')} cannot be sent"
        fix = "search the log of `worker` for `outcome.undeliverable`, then run `payready payment redeliver ID`"
        yield error("callbacks", message, fix)


def check_callbacks_name_a_queue(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the callbacks of recent jobs name their queue, or a queue is configured for these."""
    if context.settings.callback_queue is not None:
        return
    try:
        with read_snapshot(context.rt.engine) as tx:
            if schema.current_revision(tx) != schema.required_revision():
                return  # check_database reports it
            recent = payment_report.recent_continuations(tx, context.rt.clock() - CALLBACKS_LOOKBACK, MAX_CONTINUATIONS)
    except DATABASE_UNAVAILABLE:
        return  # check_database reports it
    if recent:
        yield callbacks_result(recent)


def callbacks_result(continuations: Sequence[Mapping[str, Any]]) -> CheckResult:
    """Judge the callbacks of these jobs: a warning if one names no queue."""
    without_queue = [
        {callback.task for callback in callbacks_of(continuation, task_queues=TASK_QUEUES) if callback.queue is None}
        for continuation in continuations
    ]
    affected = [tasks for tasks in without_queue if tasks]
    if not affected:
        return ok("callbacks", f"all of {count_text(len(continuations), 'recent job')} name their queue")
    names = ", ".join(sorted(set[str]().union(*affected))[:MAX_TASK_NAMES])
    message = (
        f"{len(affected)} of {count_text(len(continuations), 'recent job')} have callbacks without a queue: {names}; "
        f"payready sends them to the queue {DEFAULT_CALLBACK_QUEUE}"
    )
    return warning("callbacks", message, "set PAYREADY_CALLBACK_QUEUE to the queue of the payments service")


def check_flower_requires_login(context: CheckContext) -> Iterator[CheckResult]:
    """Check that Flower requires a login, and not the demo's in production."""
    try:
        if _permits_access(context.flower_url, None):
            yield error("flower", "requires no login", "set FLOWER_BASIC_AUTH, restart `flower`")
        elif context.settings.env == "production" and _permits_access(context.flower_url, DEMO_LOGIN):
            yield error("flower", f"accepts the login {DEMO_LOGIN}", "set FLOWER_BASIC_AUTH, restart `flower`")
        else:
            yield ok("flower", "requires a login")
    except OSError as unreachable:
        message = f"does not respond at {context.flower_url}: {getattr(unreachable, 'reason', unreachable)}"
        yield warning("flower", message, "start the role `flower`, or give its address with --flower")


def check_dashboard_is_ready(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the dashboard is ready: it can read the ledger and its sessions."""
    url = f"{context.dashboard_url.rstrip('/')}/readyz"
    try:
        is_ready = _permits_access(url, None)
    except OSError as unreachable:
        message = f"does not respond at {context.dashboard_url}: {getattr(unreachable, 'reason', unreachable)}"
        yield warning("dashboard", message, "start the role `dashboard`, or give its address with --dashboard")
        return
    if is_ready:
        yield ok("dashboard", "is ready")
    else:
        yield warning("dashboard", "is not ready", f"{url} has the reason")


def _permits_access(url: str, login: str | None) -> bool:
    """Return whether the URL responds 2xx to this login, or without one to None. Raise OSError if it is unreachable."""
    headers = {} if login is None else {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the operator's own address
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.HTTPError as rejected:
        rejected.close()
        return False
