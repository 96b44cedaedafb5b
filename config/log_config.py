"""Logging: structlog events with fields, JSON in production, readable lines in development.

Lines of libraries take the same shape. Each line carries the ids of the log context (`CONTEXT_IDS`). Secrets, metadata
and the amounts of payments and balances are never logged; fees are. Lines of libraries that quote a message's content
are truncated.
"""

import io
import logging
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

import structlog

from config.addresses import without_credentials_and_query
from config.escaping import escape_unprintable
from config.settings import Settings
from config.version import payready_version

WARNING_LEVEL_LOGGERS = (
    "httpx",
    "httpcore",
    "uvicorn.access",
    "celery.app.trace",
    "celery.worker.strategy",
    "celery.beat",
)
"""Loggers that write a line per request, task or tick. At INFO this costs a third of a worker's throughput."""
CONTEXT_IDS = ("payment_id", "account_id", "refresh_id", "balance_id", "task_id")
MAX_ID_CHARS = 128
TRUNCATED_LOGGERS = ("celery.worker.consumer.consumer", "celery.beat")
"""Loggers that log too much: the whole of a malformed message, a traceback for each tick without a broker."""

_SHARED: tuple[structlog.typing.Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)
"""Processors for our own events and for records of libraries."""


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger for events: `log.warning("redis.unavailable", operation=..., error=...)`.

    It needs no global structlog configuration, so a process that configures no logging writes nothing to standard
    output.
    """
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, *_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return logger


log = get_logger(__name__)


def log_context(**ids: Any) -> AbstractContextManager[None]:
    """Add ids to every line that is logged within the block. Values that are not ids are left out."""
    return structlog.contextvars.bound_contextvars(**_valid_ids(ids))


def replace_log_context(ids: Mapping[str, Any]) -> None:
    """Replace the ids that every later line of this thread carries."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**_valid_ids(ids))


def _valid_ids(given: Mapping[str, Any]) -> dict[str, str]:
    # The ids may come from a job that was not validated yet.
    return {
        name: given[name]
        for name in CONTEXT_IDS
        if isinstance(given.get(name), str) and len(given[name]) <= MAX_ID_CHARS
    }


def _truncate_to_first_line_without_headers(record: logging.LogRecord) -> bool:
    """Truncate a record to its first line, without message headers: they repeat the arguments of the task."""
    record.msg, record.args = re.split(r"\n| headers:", record.getMessage(), maxsplit=1)[0], ()
    return True


def _escape_values(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape the values of an event for a terminal. JSON does it by itself."""
    return {name: escape_unprintable(value) if isinstance(value, str) else value for name, value in event.items()}


def _write_indented_traceback(output: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write a plain traceback. Its lines are indented: the text of an exception must not look like another event."""
    plain = io.StringIO()
    structlog.dev.plain_traceback(plain, exc_info)
    lines = escape_unprintable(plain.getvalue(), keep="\n").strip("\n").split("\n")
    output.write("".join(f"\n    {line}" for line in lines))


def configure_logging(settings: Settings) -> None:
    """Send all log lines to standard error through one formatter."""
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.env == "production"
        # Plain tracebacks: rendering all local variables takes seconds in every thread during an outage.
        else [
            _escape_values,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_write_indented_traceback),
        ]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.PositionalArgumentsFormatter(), *_SHARED],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    logging.captureWarnings(capture=True)
    for name in TRUNCATED_LOGGERS:
        logging.getLogger(name).addFilter(
            _truncate_to_first_line_without_headers
        )  # adding the same filter again has no effect
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in WARNING_LEVEL_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns about each malformed request


def log_start(settings: Settings, role: str) -> None:
    """Log one line that states what starts: version, role, addresses without credentials, and mode of operation."""
    log.info(
        "role.started",
        role=role,
        version=payready_version(),
        env=settings.env,
        instance=settings.instance,
        broker=without_credentials_and_query(settings.effective_broker_url),
        redis=without_credentials_and_query(settings.redis_url),
        database=without_credentials_and_query(settings.database_url),
    )
