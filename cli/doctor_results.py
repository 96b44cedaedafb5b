"""Results of the checks of `payready doctor`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from config.settings import Settings
from worker.runtime import Runtime


class Severity(StrEnum):
    """Severity of a check result."""

    OK = "ok"
    WARNING = "warning"
    """payready works; an operator should know."""
    ERROR = "error"
    """Payments fail or are late, or will be."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Result of one check: what it found and how to fix it."""

    check: str
    severity: Severity
    message: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """Inputs of the checks."""

    settings: Settings
    rt: Runtime
    flower_url: str
    web_url: str
    dashboard_url: str


Check = Callable[[CheckContext], Iterator[CheckResult]]


def ok(check: str, message: str) -> CheckResult:
    """Create a result without a problem."""
    return CheckResult(check=check, severity=Severity.OK, message=message)


def warning(check: str, message: str, fix: str) -> CheckResult:
    """Create a result with a warning."""
    return CheckResult(check=check, severity=Severity.WARNING, message=message, fix=fix)


def error(check: str, message: str, fix: str) -> CheckResult:
    """Create a result with an error."""
    return CheckResult(check=check, severity=Severity.ERROR, message=message, fix=fix)
