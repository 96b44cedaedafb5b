"""The role `web` listens on its address, and ends on SIGTERM at any moment of its start."""

import os
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from demo.processes import ROOT, assign_free_port
from tests.support.system import wait_until

pytestmark = pytest.mark.slow

SEND_SIGTERM_DURING_START = """
import importlib, os, signal, sys
from webhook import __main__ as web
module, name = sys.argv[1].split(":")
changed = importlib.import_module(module)
original = getattr(changed, name)
def with_sigterm(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)
setattr(changed, name, with_sigterm)
web.serve_then_finish_follow_ups()
"""


@pytest.mark.parametrize("moment", ["webhook.__main__:collect_and_freeze_objects", "uvicorn:Config"])
def test_sigterm_during_start_ends_the_process(tmp_path: Path, moment: str) -> None:
    """Before `web` or uvicorn handles signals. A lost signal would leave `web` running until SIGKILL."""
    environ = {
        **os.environ,
        "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/payready.db",
        "PAYREADY_WEBHOOK_PORT": str(assign_free_port()),
        "PAYREADY_DRAIN_S": "0",
    }
    command = [sys.executable, "-c", SEND_SIGTERM_DURING_START, moment]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode in (0, -signal.SIGTERM), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("host", "clients"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"]), ("127.0.0.1", ["127.0.0.1"])]
)
def test_web_listens_on_ipv6_addresses(tmp_path: Path, host: str, clients: list[str]) -> None:
    """`::` accepts both families, so that a check at 127.0.0.1 still works."""
    port = assign_free_port()
    environ = {
        **os.environ,
        "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/payready.db",
        "PAYREADY_WEBHOOK_HOST": host,
        "PAYREADY_WEBHOOK_PORT": str(port),
        "PAYREADY_DRAIN_S": "0",
    }
    with subprocess.Popen([sys.executable, "-m", "webhook"], cwd=ROOT, env=environ) as web:
        try:
            for client in clients:
                wait_until(partial(is_alive, f"http://{client}:{port}/healthz"), 15, f"web responds at {client}")
        finally:
            web.terminate()
    assert web.returncode in (0, -signal.SIGTERM)


def test_web_listens_on_the_port_of_the_platform(tmp_path: Path) -> None:
    """A platform such as Heroku states it as `PORT`, and ends a process that listens on another."""
    port = assign_free_port()
    environ = {**os.environ, "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/payready.db", "PORT": str(port)}
    with subprocess.Popen([sys.executable, "-m", "webhook"], cwd=ROOT, env=environ) as web:
        try:
            wait_until(partial(is_alive, f"http://127.0.0.1:{port}/healthz"), 15, "web responds at PORT")
        finally:
            web.terminate()
    assert web.returncode in (0, -signal.SIGTERM)


def is_alive(url: str) -> bool:
    """Return whether the address responds with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
