"""Jobs of clients in other languages and of other versions of Celery, through the real processes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from redis import Redis

from tests.support import foreign_messages as foreign
from tests.support.foreign_messages import ForeignMessage
from tests.support.system import System, eventually, system

pytestmark = pytest.mark.slow

CLIENTS: dict[str, Callable[..., ForeignMessage]] = {
    "celery.node": foreign.celery_node,
    "celery.node 1": partial(foreign.celery_node, protocol=1),
    "celery-php": foreign.celery_php,
    "rusty-celery": foreign.rusty_celery,
    "gocelery": foreign.gocelery,
    "celery 1": foreign.celery_protocol_1,
    "celery 5.2": foreign.celery_protocol_2,
    "celery 5.4": partial(foreign.celery_protocol_2, version="5.4"),
}


@pytest.fixture(scope="module")
def payready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Every role of payready."""
    folder = tmp_path_factory.mktemp("foreign")
    with system(folder, f"sqlite:///{folder}/payready.db") as running:
        yield running


@pytest.mark.parametrize(("number", "client"), list(enumerate(CLIENTS)), ids=list(CLIENTS))
def test_job_of_foreign_client_is_released(payready: System, number: int, client: str) -> None:
    """Its outcome is under the task id of the client."""
    job = {"payment_id": f"pay_{number}", "account_id": f"acct_prompt{number:06d}", "amount": "25.00", "timeout_s": 20}
    task_id = f"php_5f1d7a3b9c2e1{number}.83920175"
    with Redis.from_url(payready.redis_url) as redis:
        redis.lpush("payments", CLIENTS[client](job, task_id, "payments").redis)
        outcome = eventually(lambda: _outcome(redis, task_id)) or {}
    assert (outcome.get("payment_id"), outcome.get("state")) == (f"pay_{number}", "released")


def _outcome(redis: Any, task_id: str) -> dict[str, Any] | None:
    stored = json.loads(redis.get(f"celery-task-meta-{task_id}") or "{}")
    return stored["result"] if stored.get("status") == "SUCCESS" else None
