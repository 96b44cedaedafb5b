"""One trace per payment, across messages, the webhook and the wait."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo.processes import ROOT, assign_free_port
from tests.support.databases import migrate
from tests.support.simulator import Simulator
from tests.support.system import API_KEY, SECRET
from tests.support.traced import SENDER, TRACE

INITIATE = ("payments.initiate", "send payments.initiate", "sender")


def test_payment_is_one_trace_from_its_sender_to_its_callback(tmp_path: Path, valkey_url: str) -> None:
    """The wait is a span that starts when the task is suspended, and links to the webhook that resolved the payment."""
    port, database = assign_free_port(), f"sqlite:///{tmp_path}/payready.db"
    migrate(database)
    with Simulator(f"http://127.0.0.1:{port}/webhooks/quiltt", secret=SECRET, api_key=API_KEY) as simulator:
        environ = {
            **os.environ,
            "PAYREADY_REDIS_URL": valkey_url.replace("/0", "/7"),
            "PAYREADY_DATABASE_URL": database,
            "PAYREADY_QUILTT_API_URL": simulator.url,
            "PAYREADY_QUILTT_AUTH_URL": simulator.url,
            "PAYREADY_QUILTT_API_KEY": API_KEY,
            "PAYREADY_WEBHOOK_SECRETS": SECRET,
            "PAYREADY_WEBHOOK_PORT": str(port),
        }
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.traced", "acct_prompt01"]
        completed = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60
        )
    spans: list[dict[str, Any]] = json.loads(completed.stdout)
    by_name = {span["name"]: span for span in spans}
    by_id = {span["id"]: span for span in spans}

    def path_to_root(span: dict[str, Any]) -> list[str]:
        names = [span["name"]]
        while span["parent"] in by_id:
            span = by_id[span["parent"]]
            names.append(span["name"])
        return [*names, "sender"] if span["parent"] == SENDER else names

    wait = by_name["wait, then released"]
    assert path_to_root(by_name["balances.refresh"]) == [
        "balances.refresh",
        "send balances.refresh",
        *INITIATE,
    ]
    assert path_to_root(by_name["ledger.execute_ach"]) == [
        "ledger.execute_ach",
        "send ledger.execute_ach",
        "wait, then released",
        *INITIATE,
    ]
    assert {by_name[name]["trace"] for name in ("balances.refresh", "ledger.execute_ach")} == {TRACE}
    assert wait["links"] == [by_name["outcomes.deliver"]["id"]]
    assert path_to_root(by_name["outcomes.deliver"]) == ["outcomes.deliver", "send outcomes.deliver"], (
        "started by the webhook"
    )
    assert wait["lasted_s"] > by_name["payments.initiate"]["lasted_s"]
    assert not [span for span in spans if "sweep" in span["name"] or "expire" in span["name"]]
