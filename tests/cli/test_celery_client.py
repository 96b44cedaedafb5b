"""Jobs that the command line enqueues, and the errors of their tasks."""

import json
from base64 import b64decode
from typing import Any

import pytest
from celery import Celery
from redis import Redis
from typer.testing import CliRunner

from cli import celery_client
from cli.main import app
from config.settings import Settings, settings
from tasks.celery_connection import NoWorkerResponse
from tasks.celery_errors import CeleryUnavailable
from worker.rules.job import Job

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery stores results with it
JOB = Job(payment_id="pay_1", account_id="acct_a", timeout_s=1)


@pytest.fixture
def celery_settings(valkey_url: str) -> Settings:
    """Settings with a broker, without any worker."""
    return Settings(redis_url=valkey_url)


@pytest.fixture(autouse=True)
def _close_result_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery leaves the connections of a result backend open, which end with the process of a command."""
    close = Celery.close

    def close_with_result_backend(app: Celery) -> None:
        app.backend.result_consumer.stop()
        app.backend.result_consumer._pubsub = None  # a result that is collected later must not connect again
        app.backend.client.connection_pool.disconnect()
        close(app)

    monkeypatch.setattr(Celery, "close", close_with_result_backend)


def finish_at_once(monkeypatch: pytest.MonkeyPatch, result: Any, state: str) -> None:
    """Let each task that is sent have this result at once."""
    send_task = Celery.send_task

    def send_and_finish(app: Celery, *arguments: Any, **options: Any) -> Any:
        sent = send_task(app, *arguments, **options)
        app.backend.store_result(sent.id, result, state)
        return sent

    monkeypatch.setattr(Celery, "send_task", send_and_finish)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("no disk")])
def test_error_of_task_is_not_reported_as_missing_broker(
    celery_settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Celery raises the same classes without a broker."""
    finish_at_once(monkeypatch, error, "FAILURE")
    with pytest.raises(type(error), match=str(error)):
        celery_client.enqueue_job_and_wait(celery_settings, JOB)
    with pytest.raises(type(error), match=str(error)):
        celery_client.cancel(celery_settings, "pay_1")


def test_outcome_is_returned(celery_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting, the id of the task is returned."""
    finish_at_once(monkeypatch, {"state": "released"}, "SUCCESS")
    assert celery_client.enqueue_job_and_wait(celery_settings, JOB) == {"state": "released"}
    assert len(celery_client.enqueue_job(celery_settings, JOB)) == 36


def test_missing_worker_is_distinguished_from_missing_broker(
    celery_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only without a worker the task stays queued."""
    monkeypatch.setattr(celery_client, "RESPONSE_TIMEOUT_S", 0.1)
    with pytest.raises(NoWorkerResponse, match="the task stays queued"):
        celery_client.cancel(celery_settings, "pay_1")
    with pytest.raises(CeleryUnavailable, match="PAYREADY_BROKER_URL") as unavailable:
        celery_client.cancel(Settings(redis_url="redis://127.0.0.1:1/0"), "pay_1")
    assert unavailable.type is CeleryUnavailable


def test_enqueued_job_has_currency_of_settings(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job without a currency is in USD, which a deployment in EUR rejects."""
    monkeypatch.setenv("PAYREADY_REDIS_URL", valkey_url)
    monkeypatch.setenv("PAYREADY_CURRENCY", "EUR")
    for module in ("payment_actions", "payment_reports", "command_line", "command_runtime"):
        monkeypatch.setattr(f"cli.{module}.settings", settings.__wrapped__)
    with Redis.from_url(valkey_url) as redis:
        redis.delete("payments")
        result = CliRunner().invoke(app, ["payment", "enqueue", "acct_a", "--amount", "25.00"])
        assert result.exit_code == 0, result.stderr
        [message] = redis.lrange("payments", 0, -1)
        redis.delete("payments")
    assert b"EUR" in b64decode(json.loads(message)["body"])
