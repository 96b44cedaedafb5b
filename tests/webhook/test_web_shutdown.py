"""The role `web` ends on SIGTERM at any moment of its start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo.processes import ROOT, assign_free_port

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


@pytest.mark.parametrize("moment", ["webhook.__main__:collect_and_freeze_objects", "uvicorn:run"])
def test_sigterm_during_start_ends_the_process(tmp_path: Path, moment: str) -> None:
    """Before `web` or uvicorn handles signals. A lost signal would leave `web` running until SIGKILL."""
    environ = {
        **os.environ,
        "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/payready.db",
        "PAYREADY_WEBHOOK_PORT": str(assign_free_port()),
    }
    command = [sys.executable, "-c", SEND_SIGTERM_DURING_START, moment]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode in (0, -signal.SIGTERM), done.stderr
    assert "Traceback" not in done.stderr
