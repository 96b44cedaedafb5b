"""The meaning of each log event, for `docs/reference/log-events.md`. A test compares the names with the code."""

from collections.abc import Mapping
from dataclasses import dataclass

LOG_EVENT_MEANINGS: Mapping[str, str] = {
    "account.read_failed": "An account could not be read before its call. Its kind and currency are unknown, and the "
    "call is made.",
    "api_key.check_failed": "The mode of the API key could not be fetched at the start of `refresh`. Each call "
    "tries again.",
    "api_key.mode_detected": "The provider reported the mode of the API key, which decides the price of a call.",
    "api_key.rejected": "The provider rejected the API key, or it is a production key that must not be used here. No "
    "call is made.",
    "balance.apply_failed": "Applying balances raised an unexpected error. They were stored, and `balances.apply` "
    "tries again.",
    "balance.apply_postponed": "Balances were stored, but not applied: the database or Redis did not respond. "
    "`balances.apply` tries again.",
    "balance.not_found": "A task names a balance that is not in the ledger. Nothing is applied.",
    "balance.rejected": "A REFRESH balance resolved no payment that its call was made for; `reason` is `too_old` or "
    "`after_deadline`.",
    "balance_poll.failed": "A balance poll failed. The payment still waits for its webhook.",
    "batch.failed": "A micro-batch failed. Its items were not processed; maintenance repeats the work.",
    "batch.fallback": "A batch failed, so Celery's default strategy processes its messages one by one.",
    "call_result.record_retry": "A call result could not be recorded, because the database is unavailable. The worker "
    "retries.",
    "callback.no_queue": "A job was accepted with callbacks that name no queue, and `PAYREADY_CALLBACK_QUEUE` is not "
    "set. They go to `queue`. At most one line per minute and process; `suppressed` counts the jobs in between.",
    "circuit_breaker.closed": "The provider responded again. Calls are made.",
    "circuit_breaker.opened": "Consecutive calls failed. No call is made until `open_until`; then one probe is made.",
    "dead_letters.pruned": "The oldest dead letters were deleted: there are too many, or they are too old.",
    "fee_cap.reached": "A call was not made, because it would exceed a fee cap. Its payments fail with "
    "`fee_cap_reached`.",
    "fee_cap.warning": "A call raised the usage of a fee cap to 80 %. Logged once per day, process and cap; for the "
    "cap `account` also per account.",
    "follow_up.dispatch_failed": "Payments were stored, but follow-up tasks were not enqueued. `payments.sweep` finds "
    "the work.",
    "task.retried": "A task could not be processed, because a store is unavailable. It is tried again until it can.",
    "broker.available": "A worker reads its queue from the broker again.",
    "broker.unavailable": "A worker cannot read its queue from the broker. It tries again each second.",
    "broker.polled": "The broker does not support `CLIENT TRACKING`, so the worker asks for messages at an interval.",
    "consumer.failed": "A consumer met an unexpected error. The messages that it had fetched are delivered again.",
    "maintenance.skipped": "A maintenance task did nothing, because the database is unavailable. The next tick tries "
    "again.",
    "message.dead_lettered": "A message cannot be processed. It was stored as a dead letter, and is acknowledged; see "
    "`payready dead-letters show`.",
    "message.unreadable": "An unexpected error occurred while a message was read. It is stored as a dead letter.",
    "messages.ack_failed": "Messages could not be acknowledged. The broker redelivers them.",
    "messages.give_back_failed": "A worker that stops could not return messages to their queue. The broker redelivers "
    "them after the visibility timeout.",
    "metrics.cap_usage_skipped": "The usage of fee caps is left out of a scrape, because the query took too long.",
    "metrics.collect_failed": "A collector could not read its source. Its metrics are left out of this scrape.",
    "metrics.pending_calls_skipped": "Calls that were pending at the start are not counted, because the query took too "
    "long.",
    "metrics.server_not_started": "The metrics port could not be opened. The role works without metrics.",
    "outcome.delivered": "An outcome was delivered to its task.",
    "outcome.delivery_failed": "An outcome could not be delivered. `payments.sweep` delivers it again.",
    "outcome.undeliverable": "A callback could not be sent several times, though the broker responds. The task's "
    "result is stored, its callbacks are not sent. `payready payment redeliver` tries again.",
    "quarantine.pruned": "The oldest quarantined events were deleted: the quarantine is full, or they are too old.",
    "retention.skipped": "Old rows of `table` were not deleted, because the database role may not delete them. Grant "
    "DELETE on the table, or delete them with another role.",
    "rate_limiter.unavailable": "Redis is unavailable, so calls are made without rate limiting. The provider enforces "
    "its own limit.",
    "redis.unavailable": "Redis did not respond to `operation`. This costs only speed.",
    "refresh.check_postponed": "A due refresh could not be checked, because the database is unavailable. The next "
    "sweep tries again.",
    "refresh_call.accepted": "The provider accepted a refresh call.",
    "refresh_call.crashed": "A refresh call raised an unexpected error. Its result is unknown.",
    "refresh_call.failed": "A refresh call was not accepted, or its result is unknown.",
    "refresh_call.not_priced": "A call was not made, because its price is unknown; `error` gives the reason.",
    "role.started": "A role started. Addresses are logged without credentials.",
    "task_events.publish_failed": "Events for Flower could not be published.",
    "webhook.connection_closed": "`web` closed a connection because of a limit; `reason` is a label of "
    "`payready_webhook_connections_closed_total`. Sampled: `suppressed` counts the lines that were left out before.",
    "webhook.delivery": "A webhook delivery. Sampled: `suppressed` counts the lines that were left out before.",
    "webhook.drain_started": "`web` received SIGTERM. It serves requests for `drain_s` more, is not ready, and closes "
    "each connection with its response.",
    "webhook.follow_up_failed": "A delivery was committed, but its follow-up tasks failed. `payments.sweep` finds the "
    "work.",
    "webhook.internal_error": "A delivery raised an unexpected error. The response is 503, and Quiltt retries.",
    "webhook_subscription.check_failed": "The webhook subscription could not be checked.",
    "webhook_subscription.problem": "The webhook subscription has a problem; see `payready webhooks status`.",
}


@dataclass(frozen=True, kw_only=True)
class EventWithComputedFields:
    """Levels and fields of an event whose calls compute them, by `log.log` or `**fields`."""

    levels: Mapping[str, str]
    """Each level, with the condition for it."""
    fields: tuple[str, ...]


COMPUTED_EVENTS: Mapping[str, EventWithComputedFields] = {
    "webhook.delivery": EventWithComputedFields(
        levels={
            "debug": "`routine`",
            "info": "`balance`, `connection`",
            "warning": "other results",
            "error": "`unavailable`",
        },
        fields=(
            "result",
            "status",
            "suppressed",
            "events",
            "balances",
            "connection_updates",
            "quarantined",
            "reasons",
            "invalid_json",
            "error",
            "age_s",
            "difference",
        ),
    ),
}
