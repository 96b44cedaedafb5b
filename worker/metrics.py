"""Metrics: every definition with its labels.

Each role is one process with threads, so the default registry is enough; Prometheus sums the replicas. Names begin with
`payready_`. Label values are bounded: never an account and never a payment.

`METRICS` lists all definitions, and the reference pages are generated from them. Declared label values exist at 0 from
the start, because Prometheus does not see the first step of a counter that begins with it.
"""

from collections.abc import Mapping
from functools import partial

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from worker.metric_types import ExpiringValue, Kind, Label, MetricDefinition, Source
from worker.webhook_results import CONNECTION_CLOSED_REASONS, DELIVERY_RESULTS

disable_created_metrics()  # type: ignore[no-untyped-call]  # no dashboard uses these extra samples

DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
SUBSCRIPTION_CHECK_TTL_S = 180.0
"""A result of the subscription check expires after this time, because another worker may have made the next check."""


_definitions: list[MetricDefinition] = []


def _define(definition: MetricDefinition) -> MetricDefinition:
    _definitions.append(definition)
    return definition


def _counter(name: str, help_text: str, label: Label | None = None) -> Counter:
    labels = (label,) if label else ()
    _define(MetricDefinition(name=name, kind="counter", help_text=help_text, labels=labels))
    counter = Counter(name, help_text, [label.name for label in labels])
    for value in label.values if label else ():
        counter.labels(value)
    return counter


def _histogram(name: str, help_text: str, label: Label | None = None) -> Histogram:
    labels = (label,) if label else ()
    _define(MetricDefinition(name=name, kind="histogram", help_text=help_text, labels=labels))
    return Histogram(name, help_text, [label.name for label in labels], buckets=DURATION_BUCKETS_S)


def _define_collected(source: Source, name: str, help_text: str, *labels: Label) -> MetricDefinition:
    kind: Kind = "counter" if name.endswith("_total") else "gauge"
    return _define(MetricDefinition(name=name, kind=kind, help_text=help_text, labels=labels, source=source))


_from_database = partial(_define_collected, "database")
_from_redis = partial(_define_collected, "redis")
_from_broker = partial(_define_collected, "broker")
_from_admission = partial(_define_collected, "admission")

_CAP = {
    "day": "fees of all calls of a day (UTC)",
    "month": "fees of all calls of a month (UTC)",
    "account": "calls for one account in a day (UTC)",
}

# --- metrics that each process counts ---------------------------------------------------------------------------------

PROVIDER_CALLS = _counter(
    "payready_provider_calls_total",
    "Refresh calls to the provider, by result.",
    Label(
        name="result",
        values={
            "accepted": "HTTP 202",
            "rejected": "the provider will not refresh this account",
            "rate_limited": "HTTP 429; retried later",
            "not_sent": "no connection, so nothing was sent; retried later",
            "unknown": "no response or HTTP 5xx; the call may have been accepted and billed",
            "skipped": "claimed but not made: the worker stops or is late, or its own connection pool is full; "
            "says nothing about the provider",
        },
    ),
)
PROVIDER_RESPONSE_STATUS = Label(name="status", meaning="HTTP status; `none` without a response")
RESPONSE_SECONDS = _histogram(
    "payready_provider_response_seconds", "Time until the response to a refresh call.", PROVIDER_RESPONSE_STATUS
)
DELAYED_CALLS = _counter(
    "payready_delayed_calls_total",
    "Calls delayed by the rate limiter or the circuit breaker.",
    Label(
        name="reason",
        values={
            "rate_limited": "no slot of the rate limiter is free",
            "circuit_open": "the circuit breaker is open",
            "half_open": "the circuit breaker is half-open and its probe is in flight",
        },
    ),
)
CIRCUIT_BREAKER_OPENED = _counter(
    "payready_circuit_breaker_opened_total", "Times that the circuit breaker opened because provider calls failed."
)
BALANCE_POLLS = _counter(
    "payready_balance_polls_total",
    "Balance polls before a payment's deadline, by result. A poll is free of charge.",
    Label(
        name="result",
        values={
            "found": "a balance that can resolve payments",
            "nothing": "no such balance",
            "failed": "no response, or one that cannot be parsed",
        },
    ),
)
ACCOUNT_READS = _counter(
    "payready_account_reads_total",
    "Reads of an account's kind and currency before its call, by result. A read is free of charge.",
    Label(name="result", values={"found": "the account", "failed": "no such account, or no valid response"}),
)
FEE_CAPS_REACHED = _counter(
    "payready_fee_caps_reached_total",
    "Calls not made because they would exceed a fee cap.",
    Label(name="cap", values=_CAP),
)
FEE_CAP_WARNINGS = _counter(
    "payready_fee_cap_warnings_total", "Times that the usage of a fee cap crossed 80 %.", Label(name="cap", values=_CAP)
)
BALANCES_REJECTED = _counter(
    "payready_balances_rejected_total",
    "REFRESH balances that arrived for a call and resolved none of its payments.",
    Label(
        name="reason",
        values={
            "too_old": "the balance is older than the payments allow",
            "after_deadline": "the balance arrived after the payments' deadlines",
        },
    ),
)
RETRIED_TASKS = _counter(
    "payready_retried_tasks_total",
    "Tries of a task that failed because the database, Redis or the broker was unavailable. The task is tried again.",
    Label(name="task", values={"payments.initiate": "a payment-initiation job", "balances.refresh": "a refresh call"}),
)
BATCH_FALLBACKS = _counter(
    "payready_batch_fallbacks_total",
    "Batches that failed, so that their items were processed one by one.",
    Label(name="kind", values={"job": "a batch of payment-initiation jobs", "call": "a batch of refresh calls"}),
)
JOBS_WITHOUT_CALLBACK_QUEUE = _counter(
    "payready_jobs_without_callback_queue_total",
    "Accepted jobs with a callback that names no queue, while PAYREADY_CALLBACK_QUEUE is not set.",
)
CALL_TO_BALANCE_SECONDS = _histogram(
    "payready_call_to_balance_seconds", "Time from a refresh call to the arrival of its balance."
)
BALANCE_TO_RESOLUTION_SECONDS = _histogram(
    "payready_balance_to_resolution_seconds",
    "Time from the arrival of a balance to the resolution of the payments that it resolves.",
)
DEAD_LETTERS = _counter(
    "payready_dead_letters_total",
    "Messages that no worker can process, stored as dead letters.",
    Label(
        name="reason",
        values={
            "unreadable": "the envelope or the body cannot be decoded",
            "unknown_task": "no task of payready has this name",
            "worker_died": "the worker died while it processed the message, five times in a row",
        },
    ),
)
WEBHOOK_DELIVERIES = _counter(
    "payready_webhook_deliveries_total",
    "Webhook deliveries, by result.",
    Label(name="result", values={name: f"{r.status}: {r.meaning}" for name, r in DELIVERY_RESULTS.items()}),
)
WEBHOOK_EVENTS = _counter(
    "payready_webhook_events_total",
    "Events of webhook deliveries with a valid signature, by result.",
    Label(
        name="result",
        values={
            "balance": "a REFRESH balance",
            "routine": "an event that payready does not use",
            "connection": "a connection or profile was lost, or an account moved",
            "quarantined": "an event that payready uses, but cannot parse",
            "invalid_json": "not JSON and not storable",
        },
    ),
)
WEBHOOK_CONNECTIONS_CLOSED = _counter(
    "payready_webhook_connections_closed_total",
    "Connections that `web` closed because of a limit, by reason.",
    Label(name="reason", values=CONNECTION_CLOSED_REASONS),
)


SUBSCRIPTION_PROBLEMS = ExpiringValue(SUBSCRIPTION_CHECK_TTL_S)
"""Number of problems of the webhook subscription; set by the worker that made the check."""
_subscription_problems = _define(
    MetricDefinition(
        name="payready_webhook_subscription_problems",
        kind="gauge",
        help_text="Problems of the webhook subscription; 0 is good, NaN unknown. Use the maximum over all workers.",
    )
)
Gauge(_subscription_problems.name, _subscription_problems.help_text).set_function(SUBSCRIPTION_PROBLEMS)

# --- metrics that `beat` and the workers collect from other systems ---------------------------------------------------

UP: Mapping[Source, MetricDefinition] = {
    "database": _from_database("payready_database_up", "1 if the SQL database responded, else 0."),
    "redis": _from_redis("payready_redis_up", "1 if Redis responded, else 0."),
    "broker": _from_broker("payready_broker_up", "1 if the broker responded, else 0."),
}
"""By source. While one is 0, the other metrics of that source are missing. Admission control is in Redis."""

REFRESH_STATE = Label(
    name="refresh",
    values={
        "none": "no refresh",
        "requested": "the call is not made yet",
        "calling": "the call is being made",
        "accepted": "accepted, waiting for the balance",
        "uncertain": "result unknown, waiting for the balance",
        "unanswered": "the refresh window ended without a balance",
    },
)
_STATE = Label(name="state", values={"pending": "opened", "posted": "billed", "void": "not billed"})
_CURRENCY = Label(name="currency", meaning="ISO 4217 code")
WAITING_PAYMENTS = _from_database(
    "payready_waiting_payments", "Waiting payments, by the state of their account's refresh.", REFRESH_STATE
)
OLDEST_WAIT_SECONDS = _from_database(
    "payready_oldest_wait_seconds", "Time since the oldest waiting payment was requested.", REFRESH_STATE
)
PAST_DEADLINE_SECONDS = _from_database(
    "payready_past_deadline_seconds", "Longest time that a waiting payment is past its deadline."
)
UNDELIVERED_OUTCOMES = _from_database("payready_undelivered_outcomes", "Outcomes that are not delivered yet.")
OLDEST_UNDELIVERED_SECONDS = _from_database(
    "payready_oldest_undelivered_seconds", "Time since the payment of the oldest undelivered outcome was resolved."
)
UNDELIVERABLE_OUTCOMES = _from_database(
    "payready_undeliverable_outcomes", "Outcomes whose delivery was given up, because a callback cannot be sent."
)
UNAPPLIED_BALANCES = _from_database("payready_unapplied_balances", "Balances that are not applied yet.")
OLDEST_UNAPPLIED_SECONDS = _from_database(
    "payready_oldest_unapplied_seconds", "Time since the oldest unapplied balance arrived."
)
STORED_DEAD_LETTERS = _from_database("payready_stored_dead_letters", "Dead letters in the database.")
OUTCOMES = _from_database(
    "payready_outcomes_total",
    "Resolved payments since the start of this process.",
    Label(name="state", values={"released": "may start", "failed": "must not start"}),
    Label(name="reason", meaning="the failure reason; `none` for a released payment"),
)
FEE_ENTRIES = _from_database(
    "payready_fee_entries_total", "Fee entries since the start of this process.", _STATE, _CURRENCY
)
FEES = _from_database(
    "payready_fees_total", "Sum of the fee entries since the start of this process.", _STATE, _CURRENCY
)
PENDING_CALLS = _from_database("payready_pending_calls", "Calls whose fee entry is neither posted nor void.")
PENDING_FEES = _from_database("payready_pending_fees", "Sum of the fees of pending calls.", _CURRENCY)
FEE_CAP_USED_RATIO = _from_database(
    "payready_fee_cap_used_ratio",
    "Used share of a fee cap (0 to 1). A cap that is not set is missing.",
    Label(name="cap", values={cap: meaning for cap, meaning in _CAP.items() if cap != "account"}),
)
CIRCUIT_BREAKER_OPEN = _from_admission(
    "payready_circuit_breaker_open", "1 while the circuit breaker is open. Use the maximum over all workers."
)
BURST_USED_RATIO = _from_admission(
    "payready_rate_limiter_burst_used_ratio",
    "Used share of the rate limiter's burst (0 to 1). Use the maximum over all workers.",
)
REDIS_MEMORY_USED_RATIO = _from_redis(
    "payready_redis_memory_used_ratio", "Used share of Redis' maxmemory (0 to 1); 0 without a limit."
)
_QUEUE = Label(name="queue", meaning="`payments`, `refreshes`, `polls`, `balances` or `maintenance`")
QUEUE_MESSAGES = _from_broker("payready_queue_messages", "Messages that no worker has fetched.", _QUEUE)
QUEUE_OLDEST_SECONDS = _from_broker(
    "payready_queue_oldest_seconds",
    "Age of the oldest message that no worker has fetched, or that a worker tries again since a store was unavailable.",
    _QUEUE,
)

METRICS: tuple[MetricDefinition, ...] = tuple(_definitions)
"""Every metric of payready."""
