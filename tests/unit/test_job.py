"""Validation of jobs: an error names the field and the rule, and does not repeat the value."""

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import InvalidJob
from worker.rules.decimals import MINOR_UNIT_DIGITS, amount_with_currency_text
from worker.rules.job import (
    MAX_AMOUNT,
    MAX_METADATA_BYTES,
    Buffer,
    Job,
    parse_job,
    parse_stored_job_ignoring_unknown,
)

JOB = {"payment_id": "pay_1", "account_id": "acct_12Hz9Dz7vEAuljYvhmPcvM9"}
SECRET = "s3cr3t"


def parse(**changes: Any) -> Job:
    """Parse a job with these changes. None removes a field."""
    arguments = {name: value for name, value in {**JOB, **changes}.items() if value is not None}
    return parse_job(arguments, required_currency="USD")


def _error_text(**changes: Any) -> str | None:
    """Return the error and its cause for a job with these changes, or None if the job is valid."""
    try:
        parse(**changes)
    except InvalidJob as raised:
        return f"{raised} {raised.__cause__}".removesuffix(" None")
    return None


def test_job_with_required_fields_only_has_the_documented_defaults() -> None:
    """The required fields are payment_id and account_id."""
    job = parse()
    assert (job.currency, job.timeout_s, job.max_balance_age_s, job.effective_funds_check) == (
        "USD",
        120,
        30,
        "disabled",
    )
    assert (job.amount, job.include_overdraft, job.metadata) == (None, False, {})
    assert (job.buffer.multiplier, job.buffer.fixed) == (Decimal(1), Decimal(0))


def test_funds_check_of_a_job_with_an_amount_is_required_by_default() -> None:
    assert parse(amount="1.00").effective_funds_check == "required"
    assert parse(amount="1.00", funds_check="enabled").effective_funds_check == "enabled"
    assert parse(amount="1.00", funds_check="disabled").effective_funds_check == "disabled"


def test_maximum_balance_age_counts_back_from_the_request() -> None:
    """Zero means the time of the request."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse(max_balance_age_s=0).min_balance_at(now) == now
    assert parse(max_balance_age_s=90).min_balance_at(now) == now - timedelta(seconds=90)


def nested(levels: int) -> dict[str, Any]:
    """Return an object with nested lists. It has this number of levels."""
    value: Any = []
    for _ in range(levels - 2):
        value = [value]
    return {"x": value}


AMOUNT_RULE = (
    "must be a decimal in a string, greater than 0 and with at most 15 whole digits and 38 digits in all, "
    'such as "25.00"'
)
FIXED_RULE = (
    'must be a decimal in a string, "0" or more and with at most 15 whole digits and 38 digits in all, such as "2.00"'
)
INVALID = [
    # field, value, rule in the message
    ("payment_id", "", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "x" * 129, "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "with space", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "tab\t", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "line\n", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "naïve", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "\x00", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", 7, "must be 1 to 128 printable ASCII characters without spaces"),
    ("account_id", "12Hz9Dz7", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_1/../x", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_1\n", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_" + "1" * 65, 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "ACCT_1", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", {"id": "acct_1"}, 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("profile_id", "p 1", 'must be a Quiltt profile id, such as "p_12Hz9Dz7"'),
    ("connection_id", "conn_{}", 'must be a Quiltt connection id, such as "conn_12Hz9Dz7"'),
    ("amount", "0", AMOUNT_RULE),
    ("amount", "-1.00", AMOUNT_RULE),
    ("amount", "25.001", "must have at most 2 decimal places in USD"),
    ("amount", "1e-9", AMOUNT_RULE),
    ("amount", 25.0, AMOUNT_RULE),
    ("amount", 25, AMOUNT_RULE),
    ("amount", True, AMOUNT_RULE),
    ("amount", "a lot", AMOUNT_RULE),
    ("amount", "NaN", AMOUNT_RULE),
    ("amount", "Infinity", AMOUNT_RULE),
    ("amount", "1" * 39, AMOUNT_RULE),
    ("amount", "1e99999", AMOUNT_RULE),
    ("amount", "1e-99999", AMOUNT_RULE),
    ("amount", " 25.00", AMOUNT_RULE),
    ("amount", "25.00\n", AMOUNT_RULE),
    ("amount", "1_000", AMOUNT_RULE),
    ("amount", "２５", AMOUNT_RULE),
    ("amount", "9" * 30, AMOUNT_RULE),
    ("amount", "1" + "0" * 15, AMOUNT_RULE),
    ("currency", "usd", 'must be three capital letters, such as "USD"'),
    ("currency", "DOLLAR", 'must be three capital letters, such as "USD"'),
    ("timeout_s", 0, "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", 3601, "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", 1.5, "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", "120", "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", True, "must be a whole number of seconds from 1 to 3600"),
    ("max_balance_age_s", -1, "must be a whole number of seconds from 0 to 86400"),
    ("max_balance_age_s", 86_401, "must be a whole number of seconds from 0 to 86400"),
    ("max_balance_age_s", "30", "must be a whole number of seconds from 0 to 86400"),
    ("funds_check", "maybe", 'must be "required", "enabled" or "disabled"'),
    (
        "buffer.multiplier",
        {"multiplier": "0.9"},
        'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    ),
    (
        "buffer.multiplier",
        {"multiplier": "5.01"},
        'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    ),
    (
        "buffer.multiplier",
        {"multiplier": 1.5},
        'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    ),
    (
        "buffer.fixed",
        {"fixed": "-0.01"},
        FIXED_RULE,
    ),
    ("buffer.fixed", {"fixed": "1" + "0" * 15}, FIXED_RULE),
    ("buffer.colour", {"colour": "red"}, "is not a field of the buffer"),
    ("include_overdraft", "yes", "must be true or false"),
    ("include_overdraft", 1, "must be true or false"),
    ("hold_s", -1, "must be a whole number of seconds from 0 to 864000"),
    ("hold_s", 864_001, "must be a whole number of seconds from 0 to 864000"),
    ("hold_s", 1.5, "must be a whole number of seconds from 0 to 864000"),
    ("hold_s", "60", "must be a whole number of seconds from 0 to 864000"),
    ("hold_s", True, "must be a whole number of seconds from 0 to 864000"),
    ("metadata", [1], "must be a JSON object"),
    (
        "metadata",
        {"x": "y" * MAX_METADATA_BYTES},
        f"must not have more than {MAX_METADATA_BYTES} bytes of JSON, but has {MAX_METADATA_BYTES + 9}",
    ),
    ("metadata", nested(65), "must not have more than 64 levels of lists and objects"),
    ("metadata", nested(500), "must not have more than 64 levels of lists and objects"),
    ("metadata", {"x": float("nan")}, "must be a JSON object"),
    ("metadata", {"x": object()}, "must be a JSON object"),
    ("amout", "25.00", 'is not a field of a job (did you mean "amount"?)'),
]


@pytest.mark.parametrize(("field", "value", "rule"), INVALID, ids=lambda value: str(value)[:24])
def test_error_names_field_and_rule(field: str, value: Any, rule: str) -> None:
    """The sender can then correct the job."""
    name = field.partition(".")[0]
    with pytest.raises(InvalidJob) as raised:
        parse(**{"amount": "25.00", name: value} if name == "buffer" else {name: value})
    assert str(raised.value) == f"{field}: {rule}"


def test_error_names_all_invalid_fields() -> None:
    """The sender corrects them in one step."""
    with pytest.raises(InvalidJob) as raised:
        parse(amount="-1", timeout_s=0, colour="red")
    for field in ("amount", "timeout_s", "colour"):
        assert f"{field}: " in str(raised.value)


def test_funds_check_requires_an_amount() -> None:
    for check in ("required", "enabled"):
        with pytest.raises(InvalidJob, match="amount: is missing, but a funds check needs it"):
            parse(funds_check=check)
    assert parse(funds_check="disabled").amount is None


@pytest.mark.parametrize(
    ("checked", "cause"),
    [({}, "amount is missing"), ({"amount": "25.00", "funds_check": "disabled"}, "funds_check is disabled")],
)
@pytest.mark.parametrize(
    ("name", "value"), [("buffer", {"multiplier": "1.1"}), ("buffer", {"fixed": "0.01"}), ("include_overdraft", True)]
)
def test_option_of_the_funds_check_is_rejected_without_one(
    checked: dict[str, Any], cause: str, name: str, value: Any
) -> None:
    """The sender expects a check, and payready would release the payment without one."""
    with pytest.raises(InvalidJob) as raised:
        parse(**checked, **{name: value})
    assert str(raised.value) == f"{name}: must not be set without a funds check, but {cause}"
    assert parse(amount="25.00", **{name: value}).effective_funds_check == "required"


def test_default_option_of_the_funds_check_is_accepted_without_one() -> None:
    """A sender may send all fields."""
    job = parse(buffer={"multiplier": "1.0", "fixed": "0.00"}, include_overdraft=False)
    assert job.effective_funds_check == "disabled"


def test_hold_of_a_job_is_optional() -> None:
    """Without it the setting applies; 0 is a hold that ends with the delivery of the outcome."""
    assert [parse(hold_s=hold_s).hold_s for hold_s in (None, 0, 864_000)] == [None, 0, 864_000]


def test_currency_must_be_that_of_the_accounts() -> None:
    """Quiltt's balances have no currency, so all accounts have the configured one."""
    with pytest.raises(InvalidJob, match="currency: is EUR, but the currency of the accounts is USD"):
        parse_job({**JOB, "currency": "EUR"}, required_currency="USD")
    assert parse_job({**JOB, "currency": "EUR"}, required_currency="EUR").currency == "EUR"


@pytest.mark.parametrize(("currency", "places"), [("USD", 2), ("EUR", 2), *MINOR_UNIT_DIGITS.items()])
def test_amount_has_at_most_the_decimal_places_of_its_currency(currency: str, places: int) -> None:
    """Trailing zeros do not count."""
    valid = "7." + "0" * places + "00" if places == 0 else "7." + "1" * places + "00"
    assert parse_job({**JOB, "amount": valid, "currency": currency}, required_currency=currency).amount == Decimal(
        valid
    )
    allowed = f"at most {places} decimal places" if places else "no decimal places"
    with pytest.raises(InvalidJob, match=f"amount: must have {allowed} in {currency}"):
        parse_job({**JOB, "amount": "7." + "1" * (places + 1), "currency": currency}, required_currency=currency)


@given(
    amount=st.decimals(min_value=Decimal("0.01"), max_value=MAX_AMOUNT - 1, places=2, allow_nan=False)
    | st.integers(0, 14).map(lambda exponent: Decimal(f"1e{exponent}"))
)
def test_amount_keeps_all_digits(amount: Decimal) -> None:
    """This includes amounts with 17 digits, which no float has."""
    assert parse(amount=format(amount, "f")).amount == amount


@given(text=st.text(max_size=60) | st.from_regex(r"-?[0-9]{0,40}(\.[0-9]{0,40})?(e-?[0-9]{1,6})?", fullmatch=True))
def test_amount_text_is_valid_or_raises_invalid_job(text: str) -> None:
    """No other exception is raised."""
    error = _error_text(amount=text)
    assert error is None or "amount: " in error


@pytest.mark.parametrize("field", [*Job.model_fields, "colour"])
def test_error_repeats_no_value(field: str) -> None:
    """A value may be private, and errors are in logs and results."""
    for value in (f" {SECRET}", {SECRET: {SECRET: SECRET}}, [SECRET], SECRET * 2000):
        error = _error_text(**{field: value}) or ""
        assert SECRET not in error.replace(f"buffer.{SECRET}: ", "")


WRONG_VALUES: list[Any] = [
    None, "", "x y", "\x00", "?" * 5000, "-1", "1e400", "NaN", -1, 0, 10**40, 1.5, float("nan"), True, b"bytes",
    [], [1], {}, {"x": 1}, {1: 2}, {"multiplier": None}, {"fixed": [1], "multiplier": "9"}, {"mutliplier": "1"},
    (1, 2), {1, 2}, object(), Decimal("NaN"), datetime(2026, 1, 1, tzinfo=UTC), "\ud800",
]  # fmt: skip
FIELDS = [*Job.model_fields, *(f"buffer.{name}" for name in Buffer.model_fields)]
INTERNAL_WORDS = re.compile(
    r"\^|\$|\\|\[|pydantic|pattern|regex|input|dict|integer|boolean|[Ss]tring should|[Ff]ield required|permitted|Extra"
    r"|instance|validator|Value error|literal|finite|NoneType|unhashable|None\b"
)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", WRONG_VALUES, ids=lambda value: type(value).__name__)
def test_error_has_no_words_of_pydantic_or_python(field: str, value: Any) -> None:
    """The payments service receives no text of pydantic, no regular expression and no name of a Python type."""
    name, _, inner = field.partition(".")
    checked = {"amount": "25.00"} if name in ("buffer", "include_overdraft") else {}
    arguments = {**JOB, **checked, name: {inner: value} if inner else value}
    try:
        parse_job(arguments, required_currency="USD")
    except InvalidJob as error:
        for problem in str(error).split("; "):
            named, _, rule = problem.partition(": ")
            assert named.split(".")[0] == name
            assert re.match(r"must |is ", rule), problem
            assert not INTERNAL_WORDS.search(problem), problem


@pytest.mark.parametrize("missing", list(JOB))
def test_error_names_a_missing_field(missing: str) -> None:
    with pytest.raises(InvalidJob, match=rf"^{missing}: is missing$"):
        parse(**{missing: None})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("acount_id", 'acount_id: is not a field of a job (did you mean "account_id"?)'),
        ("fund_check", 'fund_check: is not a field of a job (did you mean "funds_check"?)'),
        ("colour", "colour: is not a field of a job"),
        ("colour" * 100, f"{('colour' * 100)[:64]}: is not a field of a job"),
    ],
)
def test_error_of_an_unknown_field_suggests_a_similar_one(field: str, message: str) -> None:
    with pytest.raises(InvalidJob) as error:
        parse(**{field: 1})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        ("10", "USD", "10.00 USD"),
        ("-0.5", "USD", "-0.50 USD"),
        ("27.500", "USD", "27.50 USD"),
        ("0.1234500", "USD", "0.12345 USD"),
        ("10", "JPY", "10 JPY"),
        ("10.00", "JPY", "10 JPY"),
        ("10.5", "JPY", "10.5 JPY"),
        ("1e2", "BHD", "100.000 BHD"),
    ],
)
def test_amount_text_has_the_decimal_places_of_its_currency(amount: str, currency: str, text: str) -> None:
    assert amount_with_currency_text(Decimal(amount), currency) == text


def test_job_restored_from_json_equals_the_original() -> None:
    """The JSON of the ledger has no defaults."""
    assert parse(metadata=nested(64)).model_dump(mode="json")["metadata"] == nested(64)
    job = parse(amount="25.10", buffer={"multiplier": "1.50", "fixed": "0.1"}, metadata={"a": [1, None, {"b": "ü"}]})
    stored = json.loads(json.dumps(job.model_dump(mode="json", exclude_defaults=True)))
    assert Job.model_validate(stored) == job
    assert stored["amount"] == "25.10"
    assert "timeout_s" not in stored


@pytest.mark.parametrize(
    "fields",
    [
        {"include_overdraft": True},
        {"buffer": {"fixed": "5.00"}},
        {"amount": "25.00", "funds_check": "disabled", "buffer": {"multiplier": "2"}},
        {"amount": "9" * 30, "buffer": {"fixed": "9" * 30}},
    ],
)
def test_stored_job_that_version_0_2_0_accepted_is_readable(fields: dict[str, Any]) -> None:
    """Its payment may be waiting at the upgrade. A row that raises would stop maintenance."""
    assert parse_stored_job_ignoring_unknown({**JOB, **fields}).payment_id == "pay_1"
    with pytest.raises(InvalidJob):
        parse(**fields)
