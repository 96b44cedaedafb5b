"""Logs: one line a fact, JSON in production, for people elsewhere. Libraries' own logs take the same shape.

A line carries the ids of what it is about (`IDS`); they are bound for as long as something is worked on. Secrets,
amounts and metadata are not logged: what a library would tell of a message's content is cut off.
"""

import logging
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import structlog

from config.settings import Settings

QUIET = ("httpx", "httpcore", "uvicorn.access", "celery.app.trace", "celery.worker.strategy", "celery.beat")
"""Loggers that write a line per request, task or tick; at INFO that is a third of a worker's throughput."""
IDS = ("payment_id", "account_id", "refresh_id", "balance_id", "task_id")
MAX_ID = 128
TALKATIVE = ("celery.worker.consumer.consumer", "celery.beat")
"""Loggers that tell too much: the whole of a message without sense, a traceback for each tick without a broker."""


def bound(**ids: Any) -> AbstractContextManager[None]:
    """Within the block, every line carries these ids; what is no id is left out."""
    return structlog.contextvars.bound_contextvars(**_ids(ids))


def bind(ids: Mapping[str, Any]) -> None:
    """From here on every line of this thread carries these ids, and no others."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**_ids(ids))


def _ids(given: Mapping[str, Any]) -> dict[str, str]:
    # They may come from a job that nobody has checked yet.
    return {name: given[name] for name in IDS if isinstance(given.get(name), str) and len(given[name]) <= MAX_ID}


def _without_content(record: logging.LogRecord) -> bool:
    """Leave the first line of what is said, and of a message not its headers: they repeat its arguments."""
    record.msg, record.args = re.split(r"\n| headers:", record.getMessage(), maxsplit=1)[0], ()
    return True


def configure_logging(settings: Settings) -> None:
    """Send everything that is logged to standard error, through one formatter."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.env == "production"
        # Plain: a traceback with all its variables takes seconds to draw, in every thread that meets an outage.
        else [structlog.dev.ConsoleRenderer(sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    logging.captureWarnings(capture=True)
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(_without_content)  # adding it again changes nothing
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each request that makes no sense
