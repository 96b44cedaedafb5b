"""The code of docs/howto/integrate-a-payments-service.md, run by programs without payready's code."""

import json
import re
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.utils import uuid

from demo.processes import ROOT
from tests.support.simulator import eventually
from tests.support.system import System, system
from worker.errors import PaymentNotReady

PAGE = (ROOT / "docs" / "howto" / "integrate-a-payments-service.md").read_text()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),
]  # Celery stores results with it


@pytest.fixture(scope="module")
def payready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Every role of payready."""
    folder = tmp_path_factory.mktemp("integrating")
    with system(folder, f"sqlite:///{folder}/payready.db", PAYREADY_CALLBACK_QUEUE="svc") as running:
        yield running


def test_documented_message_starts_payment_and_outcome_is_readable(payready: System) -> None:
    """Another language needs only a list to push to and a key to read."""
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (message,) = (json.loads(block) for block in blocks if '"body"' in block)
    with redis.Redis.from_url(payready.redis_url, decode_responses=True) as client:
        client.lpush("payments", json.dumps(message))
        key = f"celery-task-meta-{message['headers']['id']}"
        stored = eventually(lambda: _finished_result(client.get(key)))
    assert stored
    assert stored["status"] == "SUCCESS"
    assert stored["result"]["payment_id"] == "pay_1"
    assert stored["result"]["verdict"] == "sufficient"


def _finished_result(text: Any) -> dict[str, Any] | None:
    stored = json.loads(text) if isinstance(text, str) else {}
    return stored if stored.get("status") in ("SUCCESS", "FAILURE") else None


def _write_module(name: str, folder: Path) -> None:
    """Write the module that the page shows under this name."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (source,) = (block for block in blocks if f"-A {name} worker" in block)
    (folder / f"{name}.py").write_text(source)


def test_documented_chain_continues_on_the_callback_queue(payready: System, tmp_path: Path) -> None:
    """The task after `payments.initiate` names no queue: PAYREADY_CALLBACK_QUEUE does."""
    _write_module("service", tmp_path)
    _write_module("chained", tmp_path)
    orders = tmp_path / "orders.db"
    environ = {"BROKER_URL": payready.redis_url, "ORDERS": str(orders), "PYTHONPATH": str(tmp_path)}
    options = "--pool threads --concurrency 2 --hostname chained@%h --loglevel WARNING"
    payready.processes.start("chained", f"celery -A chained worker --queues svc {options}", **environ)
    pay = "import chained; chained.pay_in_chain('pay_chain', 'acct_prompt78', '25.00')"
    payready.processes.run(
        "pay_in_chain",
        f'env PYTHONPATH={tmp_path} BROKER_URL={payready.redis_url} ORDERS={orders} {sys.executable} -c "{pay}"',
    )
    eventually(lambda: _finished_payments(orders) == {"pay_chain": "started, fee 0.100000"})
    payready.processes.stop_running_process("chained", signal.SIGTERM)


def _finished_payments(orders: Path) -> dict[str, str]:
    with closing(sqlite3.connect(orders)) as connection:
        if not connection.execute("SELECT name FROM sqlite_master").fetchall():
            return {}
        return dict(connection.execute("SELECT payment_id, result FROM finished"))


def test_documented_service_starts_each_payment_once(payready: System, tmp_path: Path) -> None:
    """A covered payment is started, another one is not. A job that is sent twice starts one payment.

    A rejected job with the `payment_id` of another one does not hide that one's release.
    """
    _write_module("service", tmp_path)
    orders = tmp_path / "orders.db"
    environ = {"BROKER_URL": payready.redis_url, "ORDERS": str(orders), "PYTHONPATH": str(tmp_path)}
    options = "--pool threads --concurrency 2 --hostname service@%h --loglevel WARNING"
    payready.processes.start("example", f"celery -A service worker --queues svc {options}", **environ)
    pay = (
        "import service; [service.pay(f'pay_{kind}', f'acct_{kind}77', '25.00')"
        " for kind in ('prompt', 'poor', 'gone') for twice in range(2)];"
        " service.pay('pay_slow', 'acct_slow77', '25.00'); service.pay('pay_slow', 'acct_slow77', '26.00')"
    )
    payready.processes.run(
        "pay", f'env PYTHONPATH={tmp_path} BROKER_URL={payready.redis_url} ORDERS={orders} {sys.executable} -c "{pay}"'
    )

    eventually(lambda: len(_finished_payments(orders)) == 4)
    assert _finished_payments(orders) == {
        "pay_prompt": "started, fee 0.100000",
        "pay_poor": "insufficient_funds",
        "pay_gone": "account_not_found",
        "pay_slow": "started, fee 0.100000",
    }

    failed_task_id = uuid()  # an errback that runs before the result is stored, as in a chord
    early = payready.service.send_task(
        "ledger.not_ready", args=(failed_task_id,), kwargs={"payment_id": "pay_early"}, queue="svc"
    )
    eventually(lambda: early.state == "RETRY")
    payready.service.backend.store_result(failed_task_id, PaymentNotReady("timeout", "no balance"), "FAILURE")
    eventually(lambda: _finished_payments(orders).get("pay_early") == "timeout")
