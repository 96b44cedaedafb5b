"""Results of `payments.initiate` in a Redis result backend: read all, and end tasks that wait for ever."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from celery import Celery
from celery.backends.redis import RedisBackend
from celery.states import FAILURE, SUCCESS
from kombu.utils.encoding import bytes_to_str

from tasks import result_store
from tasks.result_store import TaskResult
from tasks.suspension import WAITING
from worker.errors import FailureReason, PaymentNotReady
from worker.flow.failover_findings import ResultState, StoredResult, is_failure_reason

SCAN_COUNT = 1000
"""Keys of one SCAN, which takes about 1 ms of the server."""
LOST_DETAIL = "the ledger lost this payment in a failover; no balance was checked for it"


def can_list(app: Celery) -> bool:
    """Return whether the result backend can list its results: only Redis can."""
    return isinstance(app.backend, RedisBackend)


def payment_results(app: Celery) -> Iterator[StoredResult]:
    """Yield all results of `payments.initiate` that the result backend has. It must be a Redis."""
    client, prefix = app.backend.client, bytes_to_str(app.backend.get_key_for_task("-")).removesuffix("-")
    keys: list[Any] = []
    for key in client.scan_iter(match=_literal_pattern(prefix) + "*", count=SCAN_COUNT):
        keys.append(key)
        if len(keys) == SCAN_COUNT:
            yield from _parsed(client.mget(keys))
            keys = []
    if keys:
        yield from _parsed(client.mget(keys))


def _literal_pattern(text: str) -> str:
    """Return a glob pattern that matches only this text."""
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in text)


def _parsed(values: Sequence[Any]) -> Iterator[StoredResult]:
    for value in values:
        if value is None:
            continue  # expired since its key was listed
        try:
            found = _payment_result(json.loads(value))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # a result of another task, or of another app
        if found is not None:
            yield found


def _payment_result(meta: Mapping[str, Any]) -> StoredResult | None:
    """Return the result, or None if it is not of a payment. May raise any error of a mapping of another form."""
    status, result, task_id = meta["status"], meta["result"], str(meta["task_id"])
    if status == WAITING:
        return StoredResult(
            task_id=task_id,
            state=ResultState.WAITING,
            at=datetime.fromisoformat(result["deadline"]),
            account_id=result["account_id"],
        )
    at = _utc(datetime.fromisoformat(meta["date_done"]))
    if status == SUCCESS and result["state"] == "released":
        return StoredResult(task_id=task_id, state=ResultState.RELEASED, at=at, outcome=result)
    if status == FAILURE and result["exc_type"] == PaymentNotReady.__name__:
        reason, detail = result["exc_message"]
        if is_failure_reason(reason):
            outcome = {"reason": reason, "detail": detail}
            return StoredResult(task_id=task_id, state=ResultState.FAILED, at=at, outcome=outcome)
    return None


def _utc(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def fail_lost_payments(app: Celery, task_ids: Sequence[str]) -> None:
    """Store the result `timeout` for suspended tasks whose payments the ledger lost. Their errbacks are lost too."""
    error = PaymentNotReady(FailureReason.TIMEOUT, LOST_DETAIL)
    result_store.store_results(
        app, [TaskResult(task_id=task_id, state=str(FAILURE), value=error) for task_id in task_ids]
    )
