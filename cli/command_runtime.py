"""The runtime of commands that change payments. Its clients take longer to import than a command that only reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from cli.command_line import report_errors
from config.role_settings import require_in_production
from config.settings import settings
from worker.runtime import Runtime, build_runtime


@contextmanager
def runtime_or_exit() -> Iterator[Runtime]:
    """Build a runtime for one command. Print an expected error of the block and exit."""
    with report_errors():
        require_in_production(settings(), "database_url", "redis_url")
        rt = build_runtime(settings())
        try:
            yield rt
        finally:
            rt.engine.dispose()
