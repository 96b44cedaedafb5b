"""What is logged, and what is left out of it."""

import logging
from importlib.metadata import PackageNotFoundError, version
from unittest.mock import MagicMock

import pytest

from config.log_config import configure_logging, payready_version
from config.settings import Settings


def test_beat_without_broker_logs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Celery's beat would log a traceback twice a second while the broker is unavailable."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        configure_logging(Settings())
        logging.getLogger("celery.beat").error("Message Error: %s\n%s", "refused", ["a stack"], exc_info=False)
    finally:
        root.handlers, root.level = handlers, level
    said = capsys.readouterr().err
    assert "Message Error: refused" in said
    assert "a stack" not in said


def test_version_is_known_if_payready_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the image payready is a directory on PYTHONPATH."""
    installed = payready_version()
    monkeypatch.setattr("config.log_config.version", MagicMock(side_effect=PackageNotFoundError("payready")))
    assert payready_version() == installed == version("payready")
