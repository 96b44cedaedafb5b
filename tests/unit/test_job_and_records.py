"""Validation of jobs and balance records: errors name the field and the rule, and never show the value."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from worker.errors import InvalidJob
from worker.quiltt.messages import Balance
from worker.rules.decimals import MINOR_UNIT_DIGITS
from worker.rules.job import MAX_METADATA_BYTES, Job, parse_job

JOB = {"payment_id": "pay_1", "account_id": "acct_12Hz9Dz7vEAuljYvhmPcvM9"}
RECORD = {
    "id": "bal_1",
    "accountId": "acct_1",
    "at": "2025-01-24T14:15:22Z",
    "source": "REFRESH",
    "available": Decimal("31.41"),
    "current": None,
    "limit": Decimal(0),
}
SECRET = "s3cr3t"


def parse(**changes: Any) -> Job:
    """Parse a job with these changes; None removes a field."""
    arguments = {name: value for name, value in {**JOB, **changes}.items() if value is not None}
    return parse_job(arguments, currency="USD")


def _error_text(**changes: Any) -> str | None:
    """Return the validation error of a job with these changes, or None for a valid job."""
    try:
        parse(**changes)
    except InvalidJob as error_info:
        return f"{error_info} {error_info.__cause__}".removesuffix(" None")
    return None


def test_minimal_job_has_the_documented_defaults() -> None:
    """Two fields are required."""
    job = parse()
    assert (job.currency, job.timeout_s, job.max_balance_age_s, job.effective_funds_check) == (
        "USD",
        120,
        30,
        "disabled",
    )
    assert (job.amount, job.include_overdraft, job.metadata) == (None, False, {})
    assert (job.buffer.multiplier, job.buffer.fixed) == (Decimal(1), Decimal(0))


def test_amount_requires_a_funds_check_by_default() -> None:
    """`funds_check` overrides the default."""
    assert parse(amount="1.00").effective_funds_check == "required"
    assert parse(amount="1.00", funds_check="enabled").effective_funds_check == "enabled"
    assert parse(amount="1.00", funds_check="disabled").effective_funds_check == "disabled"


def test_max_balance_age_counts_back_from_the_request() -> None:
    """Zero is the time of the request."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse(max_balance_age_s=0).min_balance_at(now) == now
    assert parse(max_balance_age_s=90).min_balance_at(now) == now - timedelta(seconds=90)


def nested(levels: int) -> dict[str, Any]:
    """Return an object with nested lists, `levels` deep in total."""
    value: Any = []
    for _ in range(levels - 2):
        value = [value]
    return {"x": value}


BAD = [
    # field, value, text that the error must contain
    ("payment_id", "", "at least 1 character"),
    ("payment_id", "x" * 129, "at most 128 characters"),
    ("payment_id", "with space", "pattern"),
    ("payment_id", "tab\t", "pattern"),
    ("payment_id", "line\n", "pattern"),
    ("payment_id", "naïve", "pattern"),
    ("payment_id", "\x00", "pattern"),
    ("payment_id", 7, "string"),
    ("account_id", "12Hz9Dz7", "pattern"),
    ("account_id", "acct_", "pattern"),
    ("account_id", "acct_1/../x", "pattern"),
    ("account_id", "acct_1\n", "pattern"),
    ("account_id", "acct_" + "1" * 65, "pattern"),
    ("account_id", "ACCT_1", "pattern"),
    ("account_id", {"id": "acct_1"}, "string"),
    ("profile_id", "p 1", "pattern"),
    ("connection_id", "conn_{}", "pattern"),
    ("amount", "0", "greater than 0"),
    ("amount", "-1.00", "greater than 0"),
    ("amount", "25.001", "more than the 2 decimal places of USD"),
    ("amount", "1e-9", "decimal in a string"),
    ("amount", 25.0, "decimal in a string"),
    ("amount", 25, "decimal in a string"),
    ("amount", True, "decimal in a string"),
    ("amount", "a lot", "decimal in a string"),
    ("amount", "NaN", "decimal in a string"),
    ("amount", "Infinity", "decimal in a string"),
    ("amount", "1" * 39, "38 digits"),
    ("amount", "1e99999", "decimal in a string"),
    ("amount", "1e-99999", "decimal in a string"),
    ("amount", " 25.00", "decimal in a string"),
    ("amount", "25.00\n", "decimal in a string"),
    ("amount", "1_000", "decimal in a string"),
    ("amount", "２５", "decimal in a string"),
    ("currency", "usd", "pattern"),
    ("currency", "DOLLAR", "pattern"),
    ("timeout_s", 0, "greater than or equal to 1"),
    ("timeout_s", 3601, "less than or equal to 3600"),
    ("timeout_s", 1.5, "integer"),
    ("timeout_s", "120", "integer"),
    ("timeout_s", True, "integer"),
    ("max_balance_age_s", -1, "greater than or equal to 0"),
    ("max_balance_age_s", 86_401, "less than or equal to 86400"),
    ("max_balance_age_s", "30", "integer"),
    ("funds_check", "maybe", "'required', 'enabled' or 'disabled'"),
    ("buffer.multiplier", {"multiplier": "0.9"}, "greater than or equal to 1"),
    ("buffer.multiplier", {"multiplier": "5.01"}, "less than or equal to 5"),
    ("buffer.multiplier", {"multiplier": 1.5}, "decimal in a string"),
    ("buffer.fixed", {"fixed": "-0.01"}, "greater than or equal to 0"),
    ("buffer.colour", {"colour": "red"}, "not permitted"),
    ("include_overdraft", "yes", "boolean"),
    ("include_overdraft", 1, "boolean"),
    ("metadata", [1], "dictionary"),
    ("metadata", {"x": "y" * MAX_METADATA_BYTES}, f"more than {MAX_METADATA_BYTES}"),
    ("metadata", nested(65), "more than 64 levels"),
    ("metadata", nested(500), "more than 64 levels"),
    ("metadata", {"x": float("nan")}, "JSON object"),
    ("metadata", {"x": object()}, "JSON object"),
    ("amout", "25.00", "not permitted"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD, ids=lambda value: str(value)[:24])
def test_error_names_the_field_and_the_rule(field: str, value: Any, rule: str) -> None:
    """The sender needs both to fix the job."""
    with pytest.raises(InvalidJob) as error_info:
        parse(**{field.partition(".")[0]: value})
    assert f"{field}: " in str(error_info.value)
    assert rule in str(error_info.value)


@pytest.mark.parametrize("field", ["payment_id", "account_id"])
def test_error_names_a_missing_field(field: str) -> None:
    with pytest.raises(InvalidJob, match=f"{field}: Field required"):
        parse(**{field: None})


def test_error_lists_all_mistakes_at_once() -> None:
    """The sender can fix all of them in one step."""
    with pytest.raises(InvalidJob) as error_info:
        parse(amount="-1", timeout_s=0, colour="red")
    for field in ("amount", "timeout_s", "colour"):
        assert f"{field}: " in str(error_info.value)


def test_funds_check_requires_an_amount() -> None:
    for check in ("required", "enabled"):
        with pytest.raises(InvalidJob, match="amount: is needed for a funds check"):
            parse(funds_check=check)
    assert parse(funds_check="disabled").amount is None


def test_parser_rejects_a_foreign_currency() -> None:
    """Quiltt's balances name no currency, so one setting applies to all accounts."""
    with pytest.raises(InvalidJob, match="currency: is EUR, but the accounts are held in USD"):
        parse_job({**JOB, "currency": "EUR"}, currency="USD")
    assert parse_job({**JOB, "currency": "EUR"}, currency="EUR").currency == "EUR"


@pytest.mark.parametrize(("currency", "places"), [("USD", 2), ("EUR", 2), *MINOR_UNIT_DIGITS.items()])
def test_amount_has_at_most_the_decimal_places_of_its_currency(currency: str, places: int) -> None:
    """Trailing zeros do not count."""
    right = "7." + "0" * places + "00" if places == 0 else "7." + "1" * places + "00"
    assert parse_job({**JOB, "amount": right, "currency": currency}, currency=currency).amount == Decimal(right)
    with pytest.raises(InvalidJob, match=f"amount: has more than the {places} decimal places of {currency}"):
        parse_job({**JOB, "amount": "7." + "1" * (places + 1), "currency": currency}, currency=currency)


@given(
    amount=st.decimals(min_value=Decimal("0.01"), max_value=Decimal("1e34"), places=2, allow_nan=False)
    | st.integers(0, 37).map(lambda exponent: Decimal(f"1e{exponent}"))
)
def test_parser_keeps_every_digit_of_an_amount(amount: Decimal) -> None:
    """This includes large amounts."""
    assert parse(amount=format(amount, "f")).amount == amount


@given(text=st.text(max_size=60) | st.from_regex(r"-?[0-9]{0,40}(\.[0-9]{0,40})?(e-?[0-9]{1,6})?", fullmatch=True))
def test_parser_raises_only_invalid_job_for_any_amount_text(text: str) -> None:
    message = _error_text(amount=text)
    assert message is None or "amount: " in message


@pytest.mark.parametrize("field", [*Job.model_fields, "colour"])
def test_error_never_shows_the_value(field: str) -> None:
    """The value may be private, and errors appear in logs and results."""
    for value in (f" {SECRET}", {SECRET: {SECRET: SECRET}}, [SECRET], SECRET * 2000):
        message = _error_text(**{field: value}) or ""
        assert SECRET not in message.replace(f"buffer.{SECRET}: ", "")


def test_job_survives_a_round_trip_through_the_ledger() -> None:
    """The stored JSON without defaults parses to the same job."""
    assert parse(metadata=nested(64)).model_dump(mode="json")["metadata"] == nested(64)
    job = parse(amount="25.10", buffer={"multiplier": "1.50", "fixed": "0.1"}, metadata={"a": [1, None, {"b": "ü"}]})
    stored = json.loads(json.dumps(job.model_dump(mode="json", exclude_defaults=True)))
    assert Job.model_validate(stored) == job
    assert stored["amount"] == "25.10"
    assert "timeout_s" not in stored


def balance(**changes: Any) -> Balance:
    """Return a balance record with these changes."""
    return Balance.model_validate({**RECORD, **changes})


def test_balance_keeps_every_digit() -> None:
    """Null stays null, and zero stays zero."""
    parsed = balance()
    assert (parsed.available, parsed.current, parsed.limit) == (Decimal("31.41"), None, Decimal(0))
    assert parsed.at == datetime(2025, 1, 24, 14, 15, 22, tzinfo=UTC)
    assert parsed.account_id == "acct_1"


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
def test_balance_rejects_an_undocumented_record(field: str, value: Any) -> None:
    """The error has the field's name, and not its value."""
    with pytest.raises(ValidationError) as error_info:
        balance(**{field: value})
    assert [error["loc"] for error in error_info.value.errors()] == [(field,)]
    assert "input_value" not in str(error_info.value)


def test_balance_ignores_unknown_fields() -> None:
    """Quiltt adds fields over time."""
    assert balance(colour="red") == balance()
