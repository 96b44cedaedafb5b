"""What is logged, and what is left out of it."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from unittest.mock import MagicMock

import pytest

from config.log_config import configure_logging, get_logger
from config.settings import Settings
from config.version import payready_version
from demo.processes import ROOT
from tasks import balance_tasks
from worker.errors import CallFailed, CallNotSent, CallRejected, FailureReason


def test_beat_without_broker_logs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Celery's beat would log a traceback twice a second while the broker is unavailable."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        configure_logging(Settings())
        logging.getLogger("celery.beat").error("Message Error: %s\n%s", "refused", ["a stack"], exc_info=False)
    finally:
        root.handlers, root.level = handlers, level
    output = capsys.readouterr().err
    assert "Message Error: refused" in output
    assert "a stack" not in output


FORGED = "x\r\n2026-01-01T00:00:00.000000Z [info     ] forged\x1b[2J\u2028\x85\x00"


def _log_exception() -> None:
    error = ValueError(FORGED)
    get_logger("ours").error("odd.event", exc_info=(type(error), error, None))


@pytest.mark.parametrize(
    "write",
    [
        lambda: get_logger("ours").warning("odd.event", error=FORGED, count=1),
        lambda: get_logger("ours").warning(FORGED),
        lambda: get_logger("ours").warning(
            "odd.event", items=[FORGED], by_name={"a": FORGED}, error=ValueError(FORGED)
        ),
        lambda: logging.getLogger("theirs").warning("odd %s", FORGED),
        _log_exception,
    ],
)
@pytest.mark.parametrize("env", ["development", "production"])
def test_value_with_line_breaks_forges_no_line(
    capsys: pytest.CaptureFixture[str], write: Callable[[], None], env: Literal["development", "production"]
) -> None:
    """In development a line that continues an event is indented. No terminal obeys a value."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        configure_logging(Settings.model_construct(env=env))
        write()
    finally:
        root.handlers, root.level = handlers, level
    output = capsys.readouterr().err
    assert "forged" in output
    assert output.replace("\n", "").isprintable()
    first, *continued = output.removesuffix("\n").split("\n")
    assert first
    assert all(line.startswith("    ") for line in continued)


def test_version_is_known_if_payready_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the image payready is a directory on PYTHONPATH."""
    installed = payready_version()
    monkeypatch.setattr("config.version.version", MagicMock(side_effect=PackageNotFoundError("payready")))
    assert payready_version() == installed == version("payready")


@pytest.mark.parametrize(
    ("error", "event", "level"),
    [
        (CallRejected(401, FailureReason.NOT_AUTHORIZED, "the API key is wrong"), "api_key.rejected", "error"),
        (CallNotSent("no connection to the provider"), "api_key.check_failed", "warning"),
    ],
)
def test_key_is_logged_as_rejected_only_if_it_was_rejected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: CallFailed, event: str, level: str
) -> None:
    """A network failure says nothing about the key."""

    class Runtime:
        def fetch_allowed_api_key_mode_once(self) -> str:
            raise error

    monkeypatch.setattr(balance_tasks, "runtime", Runtime)
    balance_tasks._detect_and_log_key_mode()
    (line,) = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    assert (line["event"], line["level"]) == (event, level)


MIGRATE_WITHIN_PYTHON = """
from alembic.command import upgrade
from alembic.config import Config
upgrade(Config(toml_file="pyproject.toml"), "head")
"""


@pytest.mark.parametrize(
    ("command", "started"),
    [(["-m", "alembic", "upgrade", "head"], ["release"]), (["-c", MIGRATE_WITHIN_PYTHON], [])],
)
def test_release_logs_its_start(tmp_path: Path, command: list[str], started: list[str]) -> None:
    """Another process that migrates keeps its own logging."""
    environ = {
        **os.environ,
        "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/payready.db",
        "PAYREADY_ENV": "production",
        "PAYREADY_PRICE_LIST_FILE": str(shutil.copy(ROOT / "config" / "price_list.toml", tmp_path)),
        "PAYREADY_QUILTT_API_KEY": "key_of_the_tests",
        "PAYREADY_WEBHOOK_SECRETS": "whsec_of_the_tests",
    }
    completed = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60
    )
    lines = [json.loads(line) for line in completed.stderr.splitlines()]
    assert [line["role"] for line in lines if line["event"] == "role.started"] == started
    assert bool(lines) == bool(started)
