"""Faults at I/O operations: the process is killed, or killed while Redis is emptied, or only the operation fails."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kombu.exceptions import OperationalError as BrokerUnavailable
from redis.exceptions import ConnectionError as RedisUnavailable
from sqlalchemy.exc import OperationalError as LedgerUnavailable

from worker.errors import CallNotSent, CallResultUnknown

FaultMode = Literal["killed", "killed, and Redis emptied", "the operation fails"]
FAULT_MODES: tuple[FaultMode, ...] = ("killed", "killed, and Redis emptied", "the operation fails")
INJECTED_ERRORS: dict[str, Callable[[], BaseException]] = {
    "sql": lambda: LedgerUnavailable("unavailable", None, Exception("unavailable")),
    "redis": lambda: RedisUnavailable("unavailable"),
    "broker": lambda: BrokerUnavailable("unavailable"),
    "send": lambda: CallNotSent("no connection"),
    "response": lambda: CallResultUnknown("read timeout"),
}
"""Error that a failing operation of each kind raises."""


class ProcessKilled(BaseException):
    """Simulated end of the process. No code catches it, and no operation follows it."""


@dataclass
class Operations:
    """Counter of I/O operations that injects the fault."""

    fault_at: int | None
    fault_mode: FaultMode
    count: int = 0
    runs: list[tuple[int, bool, bool]] = field(default_factory=list)
    """By operation: the number of its run, whether it changes or sends anything, and whether its effect is visible
    from outside. Operations of a transaction are not visible before its commit."""
    run: int = 0
    fault_injected: str | None = None
    is_killed: bool = False

    def before_operation(self, kind: str, what: str, *, changes: bool = True, is_visible: bool = True) -> None:
        """Count an operation before it starts or before its response is read. Inject the fault if it is due."""
        if self.is_killed:
            raise ProcessKilled
        self.runs.append((self.run, changes, is_visible))
        self.count += 1
        if self.count - 1 != self.fault_at:
            return
        self.fault_injected = f"{kind}: {what}"
        if self.fault_mode == "the operation fails":
            failure = INJECTED_ERRORS[kind]()
            raise failure
        self.is_killed = True
        raise ProcessKilled

    def faultable_count(self) -> list[int]:
        """Return the operations at which a fault has a distinct effect.

        Runs that change nothing are left out: they found nothing to do. Of a transaction only the first statement
        counts: a fault at a later one rolls back the same changes.
        """
        changing_runs = {run for run, changes, _ in self.runs if changes}
        return [
            number
            for number, (run, _, _) in enumerate(self.runs)
            if run in changing_runs and (number == 0 or self.runs[number - 1][0] != run or self.runs[number - 1][2])
        ]
