import ast
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import simulator
from simulator.scenarios import scenario_table
from tests.support.simulator import Simulator, WebhookInbox, eventually

PACKAGE = Path(simulator.__file__).parent


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulator", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=10, cwd=PACKAGE.parent)


def test_simulator_does_not_import_payready() -> None:
    """The modules import only the standard library, each other, and the two required packages."""
    allowed = {*sys.stdlib_module_names, "simulator", "starlette", "uvicorn"}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_scenarios_can_be_listed() -> None:
    """`--list` prints the table and needs no other option."""
    listed = run("--list")
    assert (listed.returncode, listed.stdout.strip()) == (0, scenario_table())


def test_port_in_use_exits_with_error() -> None:
    """The process prints the error and exits with an error status."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("--port", port, "--webhook-url", "http://127.0.0.1:9", "--webhook-secret", "s", "--api-key", "k")
    assert ended.returncode != 0
    assert "in use" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_exits_cleanly(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The exit status is 0 without output, even with an open silent call, which ends with the process."""
    with Simulator("http://127.0.0.1:9/", secret="s", api_key="k") as running:
        failed = threading.Event()

        def call() -> None:
            with httpx.Client(verify=False, timeout=10) as http:
                try:
                    url = f"{running.url}/v1/accounts/acct_silent1/balances/refresh"
                    http.post(url, headers={"Authorization": "Bearer k"})
                except httpx.TransportError:
                    failed.set()

        caller = threading.Thread(target=call)
        caller.start()
        eventually(lambda: running.calls("acct_silent1"))
        assert running.stop(number) == 0
        caller.join()
    assert failed.is_set()
    assert capfd.readouterr().err == ""


def test_log_is_also_appended_to_a_file(tmp_path: Path) -> None:
    """The file has one JSON line per finished call and delivery, as in the log."""
    path = tmp_path / "log.jsonl"
    path.write_text("{}\n")
    with (
        WebhookInbox() as inbox,
        Simulator(inbox.url, secret="s", api_key="k", options=["--log", str(path)]) as running,
    ):
        running.refresh("acct_prompt1")
        running.wait_for_webhooks()
        log = running.http.get("/control/log").json()
    first, call, delivery = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {}
    assert call == {"entry": "call", **log["calls"][0]}
    assert delivery == {"entry": "delivery", **log["deliveries"][0]}


def test_mode_is_set_at_start() -> None:
    """Webhooks and introspection contain the mode."""
    with (
        WebhookInbox() as inbox,
        Simulator(inbox.url, secret="s", api_key="k", options=["--mode", "PRODUCTION"]) as running,
    ):
        key = running.http.post("/v1/introspect/api_key", headers={"Authorization": "Bearer k"}).json()
        running.refresh("acct_prompt1")
        (request,) = eventually(lambda: inbox.received)
    assert key["environment"]["mode"] == json.loads(request.body)["environment"]["mode"] == "PRODUCTION"
