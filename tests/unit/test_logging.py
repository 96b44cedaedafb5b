"""What is logged, and what is left out of it."""

import logging

import pytest

from config.log_config import configure_logging
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
