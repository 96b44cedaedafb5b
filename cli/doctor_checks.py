"""`payready doctor`: looks at everything payready stands on, and says what is wrong and what to do about it.

Each check asks one thing and yields what it found. A check that cannot ask says so as a fault; the others go on.
"""

import base64
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timedelta

from cli import celery_client
from cli.doctor_results import CheckContext, CheckResult, _error, _ok, _warning
from config.celery_config import QUEUES, celery_settings
from config.settings import DEMO_SECRET_PREFIX
from webhook import signature
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import CallFailed, CallRejected
from worker.ledger import metrics_queries, schema
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, read_only
from worker.ledger_metrics import cap_used_ratios
from worker.quiltt import subscriptions
from worker.rules.pricing import PriceListError
from worker.rules.states import RefreshState
from worker.runtime import subscriptions_client as provider_subscriptions

MIN_CLOCK_DRIFT = timedelta(seconds=1)
"""Clocks that differ by less are called right."""
MAX_BACKLOG_AGE = timedelta(seconds=15)
"""A payment that still waits this long after its deadline is seen to by nobody."""
MAX_DELIVERY_AGE = timedelta(seconds=60)
MEMORY_WARNING_RATIO = 0.9
"""A store or a cap that is used to this share is as good as full."""
LONG_QUEUE = 1000
"""Messages; a queue that holds more is not kept up with."""
CALLS_LOOKBACK = timedelta(minutes=15)
"""Calls of this time, but those whose balance may still come, are looked at for what they brought."""
HTTP_TIMEOUT_S = 3
DEMO_LOGIN = "demo:demo"
SHARED_CELERY_SETTINGS = (
    "task_acks_late",
    "task_reject_on_worker_lost",
    "worker_prefetch_multiplier",
    "task_default_queue",
    "result_expires",
    "timezone",
)
"""Settings of Celery on which all roles must agree, or messages are lost or doubled."""


def _check_database(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        with read_only(patient.rt.engine) as tx:
            found, needed = schema.current_revision(tx), schema.required_revision()
    except DATABASE_UNAVAILABLE as error:
        why = " ".join(str(getattr(error, "orig", None) or error).split())
        yield _error("database", why, "start it, or correct PAYREADY_DATABASE_URL")
        return
    if found == needed:
        yield _ok("database", f"answers, migrated to {found}")
    else:
        told = f"migrated to {found}" if found else "never migrated"
        yield _error("database", f"{told}; this release needs {needed}", "run the role `release`: alembic upgrade head")


def _check_redis(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        facts = patient.rt.correlation.server_info()
    except REDIS_UNAVAILABLE as error:
        yield _error("redis", str(error), "start it, or correct PAYREADY_REDIS_URL")
        return
    yield _ok("redis", f"answers, version {facts.get('valkey_version') or facts.get('redis_version')}")
    if (used := patient.rt.correlation.memory_used_ratio()) >= MEMORY_WARNING_RATIO:
        yield _error("redis", f"{used:.0%} of its maxmemory is used", "raise maxmemory, or find the queue that grows")
    policy = facts.get("maxmemory_policy", "not told")
    if policy != "noeviction":
        yield _error("redis", f"maxmemory-policy is {policy}", "set maxmemory-policy noeviction: queues are data")
    if not facts.get("aof_enabled"):
        yield _warning("redis", "no append-only file", "set appendonly yes, or queued jobs are lost when it restarts")
    elif facts.get("aof_last_write_status", "ok") != "ok":
        yield _error("redis", "cannot write its append-only file", "look at its disk")


def _check_broker(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        yield from _check_workers(patient)
    except celery_client.NoWorkerResponse as error:
        yield _error("broker", str(error), "start it, or correct PAYREADY_BROKER_URL or PAYREADY_REDIS_URL")


def _check_workers(patient: CheckContext) -> Iterator[CheckResult]:
    workers = celery_client.workers(patient.settings)
    yield _ok("broker", f"answers, as do {len(workers)} workers")
    served = frozenset[str]().union(*(worker.queues for worker in workers))
    for queue in QUEUES:
        if queue not in served:
            yield _error("workers", f"nobody takes from the queue {queue}", f"start the role `{_role_of_queue(queue)}`")
    if "maintenance" in served:
        yield _check_beat(patient, len(workers))
    for queue, length in celery_client.queue_lengths(patient.settings).items():
        if length > LONG_QUEUE:
            yield _warning("queues", f"{length} messages lie in {queue}", f"add replicas of `{_role_of_queue(queue)}`")
    ours = celery_settings(patient.settings)
    for worker in workers:
        other = [
            name
            for name in SHARED_CELERY_SETTINGS
            if name in worker.settings and worker.settings[name] != ours.get(name)
        ]
        if worker.queues & set(QUEUES) and other:
            yield _error(
                "celery", f"{worker.name} runs with another {', '.join(other)}", "restart it with this release"
            )


def _role_of_queue(queue: str) -> str:
    return "refresh" if queue == "refreshes" else "worker"


def _check_beat(patient: CheckContext, workers: int) -> CheckResult:
    if celery_client.count_ticks(patient.settings, workers):
        return _ok("beat", "ticks")
    return _error("beat", f"no tick came for {celery_client.TICK_OBSERVATION_S} s", "start the role `beat`")


def _check_result_backend(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        celery_client.check_result_backend(patient.settings)
    except celery_client.NoWorkerResponse as error:
        yield _error("result backend", str(error), "start it, or correct PAYREADY_RESULT_BACKEND_URL")
    else:
        yield _ok("result backend", "answers")


def _check_api_key(patient: CheckContext) -> Iterator[CheckResult]:
    settings, rt = patient.settings, patient.rt
    try:
        mode = rt.provider.api_key_mode()
    except CallRejected as refused:
        yield _error("api key", str(refused), "set PAYREADY_QUILTT_API_KEY to a valid secret, restart `refresh`")
        return
    except CallFailed as failure:
        yield _error("api key", str(failure), "see that PAYREADY_QUILTT_AUTH_URL can be reached from here")
        return
    yield _ok("api key", f"accepted, for an environment of mode {mode}")
    if mode == "PRODUCTION" and settings.env != "production" and not settings.allow_production_key:
        yield _error("api key", "its calls are billed, and this is development", "set PAYREADY_ENV or another key")
    elif mode != "PRODUCTION" and settings.env == "production":
        yield _warning("api key", f"this is production, and the key is for {mode}", "set PAYREADY_QUILTT_API_KEY")
    try:
        price = rt.price_list.price_for(mode, rt.clock().date())
    except PriceListError as error:
        yield _error("price", f"{error}: no call is made", f"write one into {settings.price_list_file}")
    else:
        yield _ok("price", f"{price.per_call} {price.currency} a call, price list {price.price_list}")
        if settings.env == "production" and "price_list_file" not in settings.model_fields_set:
            yield _warning(
                "price", "the price list is the example", "set PAYREADY_PRICE_LIST_FILE to your contract's prices"
            )


def _check_circuit_breaker(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        shut_until = patient.rt.admission.status(patient.rt.clock()).open_until
    except REDIS_UNAVAILABLE:
        return  # told elsewhere
    if shut_until is not None:
        told = f"the provider only failed: no call is made until {shut_until:%H:%M:%S}Z, then one tries again"
        yield _error("calls", told, "look for `the provider only fails` in the log of `refresh`; ask Quiltt")


def _check_caps_and_balances(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        with read_only(patient.rt.engine) as tx:
            if schema.current_revision(tx) == schema.required_revision():
                yield from _check_caps(patient, tx)
                yield from _check_balances(patient, tx)
    except DATABASE_UNAVAILABLE:
        return  # told elsewhere


def _check_caps(patient: CheckContext, tx: Tx) -> Iterator[CheckResult]:
    for cap, used in cap_used_ratios(patient.rt, tx, patient.rt.clock()).items():
        told = f"{used:.0%} of the cap per {cap} is used"
        if used >= MEMORY_WARNING_RATIO:
            remedy = f"raise PAYREADY_FEE_CAP_PER_{cap.upper()}, or payments fail as fee_cap_reached"
            yield _error("fee cap", told, remedy)
        else:
            yield _ok("fee cap", told)


def _check_balances(patient: CheckContext, tx: Tx) -> Iterator[CheckResult]:
    now = patient.rt.clock()
    made = metrics_queries.call_counts_by_refresh_state(
        tx, now - CALLS_LOOKBACK, now - timedelta(seconds=patient.settings.refresh_window_s)
    )
    came = made.get(RefreshState.ANSWERED, 0)
    missing = made.get(RefreshState.ACCEPTED, 0) + made.get(RefreshState.UNANSWERED, 0)
    told = f"of {came + missing} calls accepted in the last quarter of an hour {missing} brought no balance"
    if missing > came:
        remedy = (
            "no events come. Look at `webhook` and `subscription` here, and for `delivery` in the log of `web`: "
            "`mismatch` is a wrong PAYREADY_WEBHOOK_SECRETS, `stale` a wrong clock, no line at all the proxy"
        )
        yield _error("balances", told, remedy)
    elif came:
        yield _ok("balances", told)


def _check_webhook(patient: CheckContext) -> Iterator[CheckResult]:
    """Deliver nothing, rightly signed: that shows the way to `web`, and that it has the secrets that are set here."""
    if not patient.settings.webhook_secrets:
        return  # told elsewhere
    body, where = b'{"eventTypes":[],"events":[]}', f"{patient.web_url.rstrip('/')}/webhooks/quiltt"
    headers = signature.sign(body, patient.settings.webhook_secrets[0].get_secret_value(), patient.rt.clock())
    request = urllib.request.Request(where, body, {**headers, "Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S):  # noqa: S310 - the operator's own address
            yield _ok("webhook", f"{where} takes what is signed with the first secret")
    except urllib.error.HTTPError as refused:
        refused.close()
        yield _error(
            "webhook", f"{where} answers {refused.code} to a signed delivery", _PROXY_FIXES.get(refused.code, _PROXY)
        )
    except OSError as error:
        told = f"does not answer at {patient.web_url}: {getattr(error, 'reason', error)}"
        yield _warning("webhook", told, "start the role `web`, or say --web URL")


_PROXY = "see what stands before `web`, and its log"
_PROXY_FIXES = {
    401: "`web` runs with other secrets than these, or its clock is wrong: restart it, compare the clocks",
    503: "the database or Redis is away, or out of reach of `web`",
}


def _check_subscription(patient: CheckContext) -> Iterator[CheckResult]:
    url = patient.settings.webhook_url
    if url is None:
        yield _warning("subscription", "is not checked", "set PAYREADY_WEBHOOK_URL to the public address of `web`")
        return
    try:
        with provider_subscriptions(patient.settings) as provider:
            found = subscriptions.problems(provider.list_all(), url)
    except CallFailed as failure:
        yield _error("subscription", str(failure), "see what is said of the api key")
        return
    for flaw in found:
        yield _error("subscription", flaw, "payready webhooks subscribe")
    if not found:
        yield _ok("subscription", f"delivers to {url}")


def _check_secrets(patient: CheckContext) -> Iterator[CheckResult]:
    secrets = [secret.get_secret_value() for secret in patient.settings.webhook_secrets]
    if not secrets:
        yield _error(
            "webhook secrets", "none: every delivery is refused", "set PAYREADY_WEBHOOK_SECRETS, restart `web`"
        )
    elif any(secret.startswith(DEMO_SECRET_PREFIX) for secret in secrets):
        yield _warning("webhook secrets", "one is for demonstrations", "set PAYREADY_WEBHOOK_SECRETS before it is real")
    else:
        yield _ok("webhook secrets", f"{len(secrets)} set" + (", as while rotating" if len(secrets) > 1 else ""))


def _check_clocks(patient: CheckContext) -> Iterator[CheckResult]:
    for whose, ask in {"the database": _database_clock, "Redis": _redis_clock}.items():
        before = patient.rt.clock()
        try:
            theirs = ask(patient)
        except (*DATABASE_UNAVAILABLE, *REDIS_UNAVAILABLE):
            continue  # told elsewhere
        if theirs is None:
            continue
        ours = before + (patient.rt.clock() - before) / 2
        apart = abs(theirs - ours)
        told = f"{apart.total_seconds():.1f} s from that of {whose}"
        if apart > patient.settings.clock_skew:
            yield _error("clock", told, "synchronise the hosts' clocks; PAYREADY_CLOCK_SKEW_S says what is allowed for")
        elif apart > MIN_CLOCK_DRIFT:
            yield _warning("clock", told, "synchronise the hosts' clocks")
        else:
            yield _ok("clock", told)


def _database_clock(patient: CheckContext) -> datetime | None:
    with read_only(patient.rt.engine) as tx:
        return schema.server_time(tx)


def _redis_clock(patient: CheckContext) -> datetime | None:
    return patient.rt.correlation.server_time()


def _check_maintenance(patient: CheckContext) -> Iterator[CheckResult]:
    now = patient.rt.clock()
    try:
        with read_only(patient.rt.engine) as tx:
            if schema.current_revision(tx) != schema.required_revision():
                return  # told by the check of the database, as is that it is away
            standing = metrics_queries.backlog(tx)
    except DATABASE_UNAVAILABLE:
        return
    waiting = sum(crowd.count for crowd in standing.waiting.values())
    late = now - (standing.first_deadline or now)
    if late > MAX_BACKLOG_AGE:
        told = f"a payment waits {late.total_seconds():.0f} s past its deadline"
        yield _error("maintenance", told, "see that `beat` and `worker` run, and that the database lets them write")
    else:
        yield _ok("maintenance", f"{waiting} payments wait, none past its deadline")
    since = now - (standing.undelivered.oldest_at or now)
    if since > MAX_DELIVERY_AGE:
        told = f"{standing.undelivered.count} outcomes are undelivered, the first since {since.total_seconds():.0f} s"
        yield _error("maintenance", told, "look for `could not be delivered` in the log of `worker`")


def _check_flower(patient: CheckContext) -> Iterator[CheckResult]:
    try:
        if _accepts_login(patient.flower_url, None):
            yield _error("flower", "lets anyone in", "set FLOWER_BASIC_AUTH, restart `flower`")
        elif _accepts_login(patient.flower_url, DEMO_LOGIN) and patient.settings.env == "production":
            yield _error("flower", f"lets in {DEMO_LOGIN}", "set FLOWER_BASIC_AUTH, restart `flower`")
        else:
            yield _ok("flower", "asks for a login")
    except OSError as error:
        told = f"does not answer at {patient.flower_url}: {getattr(error, 'reason', error)}"
        yield _warning("flower", told, "start the role `flower`, or say --flower URL")


def _accepts_login(url: str, login: str | None) -> bool:
    headers = {} if login is None else {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the operator's own address
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.HTTPError as refused:
        refused.close()
        return False
