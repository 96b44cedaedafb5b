"""The code of docs/howto/integrate-a-payments-service.md, run by programs without payready's code."""

import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from demo.processes import ROOT
from tests.support.simulator import eventually
from tests.support.system import System, system

PAGE = (ROOT / "docs" / "howto" / "integrate-a-payments-service.md").read_text()


@pytest.fixture(scope="module")
def payready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Every role of payready."""
    folder = tmp_path_factory.mktemp("integrating")
    with system(folder, f"sqlite:///{folder}/payready.db") as running:
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


def test_documented_service_starts_each_payment_once(payready: System, tmp_path: Path) -> None:
    """A covered payment is started, another one is not. A job that is sent twice starts one payment.

    A rejected job with the `payment_id` of another one does not hide that one's release.
    """
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "service worker" in block)
    (tmp_path / "service.py").write_text(source)
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

    def ended() -> dict[str, str]:
        with closing(sqlite3.connect(orders)) as connection:
            if not connection.execute("SELECT name FROM sqlite_master").fetchall():
                return {}
            return dict(connection.execute("SELECT payment_id, result FROM finished"))

    eventually(lambda: len(ended()) == 4)
    assert ended() == {
        "pay_prompt": "started, fee 0.100000",
        "pay_poor": "insufficient_funds",
        "pay_gone": "account_not_found",
        "pay_slow": "started, fee 0.100000",
    }
