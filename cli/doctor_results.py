"""`payready doctor`: looks at everything payready stands on, and says what is wrong and what to do about it.

Each check asks one thing and yields what it found. A check that cannot ask says so as a fault; the others go on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from config.settings import Settings
from worker.runtime import Runtime


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "note"
    """It works; someone should know."""
    ERROR = "fault"
    """Payments suffer, or will."""


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    check: str
    severity: Severity
    message: str
    fix: str = ""


@dataclass(frozen=True)
class CheckContext:
    """What is looked at."""

    settings: Settings
    rt: Runtime
    flower_url: str
    web_url: str


Check = Callable[[CheckContext], Iterator[CheckResult]]


def _ok(check: str, message: str) -> CheckResult:
    return CheckResult(check, Severity.OK, message)


def _warning(check: str, message: str, fix: str) -> CheckResult:
    return CheckResult(check, Severity.WARNING, message, fix)


def _error(check: str, message: str, fix: str) -> CheckResult:
    return CheckResult(check, Severity.ERROR, message, fix)
