"""The message of docs/integrating.md, sent as it stands there, by a program that has no Celery."""

import json
import re
from pathlib import Path
from typing import Any

import redis

from console.processes import ROOT
from simulator.testing import eventually
from tests.support.system import system


def test_the_documented_message_starts_a_payment_and_its_outcome_can_be_read(tmp_path: Path) -> None:
    """A list to push to, a key to read: that is all another language needs."""
    page = (ROOT / "docs" / "integrating.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (message,) = (json.loads(block) for block in blocks if '"body"' in block)
    with (
        system(tmp_path, f"sqlite:///{tmp_path}/payready.db") as payready,
        redis.Redis.from_url(payready.redis_url, decode_responses=True) as client,
    ):
        client.lpush("payments", json.dumps(message))
        key = f"celery-task-meta-{message['headers']['id']}"
        done = eventually(lambda: _done(client.get(key)))
    assert done
    assert done["status"] == "SUCCESS"
    assert done["result"]["payment_id"] == "pay_1"
    assert done["result"]["verdict"] == "sufficient"


def _done(text: Any) -> dict[str, Any] | None:
    told = json.loads(text) if isinstance(text, str) else {}
    return told if told.get("status") in ("SUCCESS", "FAILURE") else None
