"""The provider's balance records: exact amounts, and records that are not as documented."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from worker.quiltt.messages import Balance

RECORD = {
    "id": "bal_1",
    "accountId": "acct_1",
    "at": "2025-01-24T14:15:22Z",
    "source": "REFRESH",
    "available": Decimal("31.41"),
    "current": None,
    "limit": Decimal(0),
}


def balance(**changes: Any) -> Balance:
    """Return a record with these changes."""
    return Balance.model_validate({**RECORD, **changes})


def test_balance_has_exact_amounts() -> None:
    """Null is None, and zero is zero."""
    read = balance()
    assert (read.available, read.current, read.limit) == (Decimal("31.41"), None, Decimal(0))
    assert read.at == datetime(2025, 1, 24, 14, 15, 22, tzinfo=UTC)
    assert read.account_id == "acct_1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "bal 1"),
        ("accountId", None),
        ("at", "2025-01-24T14:15:22"),
        ("at", "yesterday"),
        ("at", "2025-01-24"),
        ("at", 1_700_000_000),
        ("at", Decimal(1_700_000_000)),
        ("at", "1700000000"),
        ("at", "0001-01-01T00:00:00Z"),
        ("at", "0001-01-01T00:00:00+14:00"),
        ("at", "9999-12-31T23:59:59-14:00"),
        ("available", "31.41"),
        ("available", 31.41),
        ("available", True),
        ("available", Decimal("NaN")),
        ("available", Decimal("Infinity")),
        ("available", Decimal(10) ** 30),
        ("available", Decimal("1e-61")),
        ("available", Decimal("0e400")),
        ("limit", []),
        ("source", 5),
    ],
)
def test_undocumented_record_is_rejected(field: str, value: Any) -> None:
    """The error has the field's name and not its value."""
    with pytest.raises(ValidationError) as raised:
        balance(**{field: value})
    assert [error["loc"] for error in raised.value.errors()] == [(field,)]
    assert "input_value" not in str(raised.value)


def test_unknown_fields_are_ignored() -> None:
    """The provider adds fields over time."""
    assert balance(colour="red") == balance()
