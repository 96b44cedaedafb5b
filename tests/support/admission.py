"""Limits, results and helpers for tests of admission control."""

from datetime import datetime

from tests.support.in_process import SETTINGS, InProcessSystem
from worker.correlation.admission import Admission, BreakerChange
from worker.errors import CallResultUnknown

LIMITS = SETTINGS.model_copy(update={"calls_per_s": 4, "circuit_breaker_failures": 3})
FAILURE = CallResultUnknown("the provider answered 500", 500)
ADMITTED = Admission(granted=1, denied=None)
UNCHANGED = BreakerChange(kind="unchanged")


def opened_until(change: BreakerChange) -> datetime:
    """Return when a circuit breaker that just opened admits calls again."""
    assert change.kind == "opened"
    assert change.open_until is not None
    return change.open_until


def called_payments(payready: InProcessSystem) -> list[str]:
    """Return the payments whose accounts were called, in that order."""
    return [account.removeprefix("acct_") for account in payready.provider.calls]


def fail_until_open(payready: InProcessSystem) -> None:
    """Make the three failed calls that open the circuit breaker."""
    for n in range(3):
        payready.provider.script[f"acct_f{n}"] = [FAILURE]
        payready.initiate(f"f{n}", f"acct_f{n}", timeout_s=300)
        payready.run_tasks()
        payready.clock.advance(1)
