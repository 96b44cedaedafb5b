"""Log output of Celery's beat."""

import logging

import pytest

from config.log_config import configure_logging
from config.settings import Settings


def test_beat_logs_no_traceback_without_a_broker(capsys: pytest.CaptureFixture[str]) -> None:
    """Celery's beat logs a stack twice a second while the broker is unavailable."""
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
