"""The decision on fee caps: a table of examples."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from worker.rules.fee_caps import CapKind, CapUsage, decide_caps, start_of_next_period


def usage(cap: CapKind, used: int, limit: int = 10) -> CapUsage:
    return CapUsage(cap=cap, limit=Decimal(limit), used=Decimal(used), call_cost=Decimal(1), unit="USD")


DAY, MONTH = CapKind.DAY, CapKind.MONTH
EXAMPLES = {
    "no caps": ([], None, []),
    "little used": ([usage(DAY, 3)], None, []),
    "threshold reached": ([usage(DAY, 7)], None, [DAY]),
    "threshold passed before": ([usage(DAY, 8)], None, []),
    "two thresholds reached": ([usage(DAY, 7), usage(MONTH, 7)], None, [DAY, MONTH]),
    "last call": ([usage(DAY, 9)], None, []),
    "exceeded": ([usage(DAY, 10)], DAY, []),
    "two exceeded": ([usage(DAY, 10), usage(MONTH, 10)], DAY, []),
    "one exceeded, one threshold reached": ([usage(DAY, 7), usage(MONTH, 10)], MONTH, []),
}


@pytest.mark.parametrize(("usages", "exceeded", "warnings"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_caps_decide_on_a_call(usages: list[CapUsage], exceeded: CapKind | None, warnings: list[CapKind]) -> None:
    decision = decide_caps(usages)
    assert (decision.exceeded.cap if decision.exceeded else None) == exceeded
    assert [warning.cap for warning in decision.warnings] == warnings


@pytest.mark.parametrize(
    ("cap", "now", "begins"),
    [
        (DAY, datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)),
        (CapKind.ACCOUNT, datetime(2026, 11, 22, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)),
        (MONTH, datetime(2026, 1, 31, 12, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
        (MONTH, datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    ],
)
def test_period_of_a_cap_ends_in_utc(cap: CapKind, now: datetime, begins: datetime) -> None:
    assert start_of_next_period(cap, now) == begins
